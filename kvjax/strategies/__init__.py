"""What could be kept of a text, side by side: bytes, FLOPs and time of each, predicted and found."""

from kvjax.strategies.kept import (
    ABSORBED,
    STRATEGIES,
    WITH_SOURCE,
    OfSource,
    Strategy,
    with_encoder,
    without_rotation,
)
from kvjax.strategies.runs import OPERATIONS, Comparison, Row, SourceShape, compare
from kvjax.strategies.told import sentences

__all__ = [
    "ABSORBED",
    "OPERATIONS",
    "STRATEGIES",
    "WITH_SOURCE",
    "Comparison",
    "OfSource",
    "Row",
    "SourceShape",
    "Strategy",
    "compare",
    "sentences",
    "with_encoder",
    "without_rotation",
]
