"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115): Llama with biases on q, k and v, and windows on some layers."""

from __future__ import annotations

from typing import Any

from kvjax.checkpoint import rotary
from kvjax.checkpoint.families.llama import IGNORED, RULES, SHAPE_KEYS, shape
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.checkpoint.reader import show
from kvjax.checkpoint.rules import Family
from kvjax.config import Config
from kvjax.errors import CheckpointError

WINDOW_KEYS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})
"""Keys that `windows` reads."""


def windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Per layer, how far it sees: `layer_types` where given, else the layers from `max_window_layers` on.

    Args:
        fields: config.json.
        layers: how many there are.

    Raises:
        CheckpointError: layer_types of another length, of an unknown kind, or sliding without a window.
    """
    window = fields.integer("sliding_window", 4096, nullable=True)
    if not fields.flag("use_sliding_window", False):
        window = None
    types = fields.raw("layer_types")
    if types is None:
        first = fields.raw("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise CheckpointError(f"config.json: max_window_layers must be an integer from 0, not {show(first)}")
        return tuple(window if i >= first else None for i in range(layers))
    return by_type(types, layers, window)


def by_type(types: Any, layers: int, window: int | None) -> tuple[int | None, ...]:
    """Per layer, how far it sees, by the names in `layer_types`.

    Args:
        types: the value in config.json.
        layers: how many there are.
        window: of the sliding ones; None is none.

    Raises:
        CheckpointError: a list of another length, of an unknown kind, or sliding without a window.
    """
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"config.json: layer_types must be a list of {layers} names, not {show(types)}")
    if unknown := [t for t in types if t not in ("full_attention", "sliding_attention")]:
        raise CheckpointError(
            f"config.json: layer_types knows full_attention and sliding_attention, not {show(unknown[0])}"
        )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def config(fields: Fields) -> Config:
    """Qwen2's config.json as a `Config`."""
    shapes = shape(fields, kv_heads=32, head_dim=None, max_positions=32768)
    return Config(**shapes, qkv_bias=True, windows=windows(fields, shapes["num_layers"]))


FAMILY = Family(
    model_type="qwen2",
    config=config,
    keys=Keys(
        used=SHAPE_KEYS | WINDOW_KEYS,
        refused={
            **rotary.REFUSED,
            "attention_bias": (True, None),
            "mlp_bias": (False, None),
            "use_mrope": (False, None),
        },
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY", "WINDOW_KEYS", "by_type", "windows"]
