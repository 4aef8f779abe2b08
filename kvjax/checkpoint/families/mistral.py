"""Mistral (Jiang et al. 2310.06825): Llama with a sliding window on every layer."""

from __future__ import annotations

from kvjax.checkpoint import rotary
from kvjax.checkpoint.families.llama import IGNORED, RULES, SHAPE_KEYS, shape
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.checkpoint.rules import Family
from kvjax.config import Config


def config(fields: Fields) -> Config:
    """Mistral's config.json as a `Config`; a missing sliding_window is 4,096, null is none."""
    window = fields.integer("sliding_window", 4096, nullable=True)
    shapes = shape(fields, kv_heads=8, head_dim=None, max_positions=4096 * 32)
    return Config(**shapes, windows=(window,) * shapes["num_layers"])


FAMILY = Family(
    model_type="mistral",
    config=config,
    keys=Keys(
        used=SHAPE_KEYS | {"sliding_window"},
        refused={
            **rotary.REFUSED,
            "attention_bias": (False, None),
            "layer_types": (None,),
            "mlp_bias": (False, None),
            "use_sliding_window": (True, None),
        },
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY"]
