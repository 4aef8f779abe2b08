"""Qwen3 (2505.09388): Llama with a norm over each query and key head, and windows on some layers."""

from __future__ import annotations

from kvjax.checkpoint import rotary
from kvjax.checkpoint.families.llama import IGNORED, RULES, SHAPE_KEYS, shape
from kvjax.checkpoint.families.qwen2 import WINDOW_KEYS, windows
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.checkpoint.rules import Family
from kvjax.config import Config


def config(fields: Fields) -> Config:
    """Qwen3's config.json as a `Config`; heads are 128 wide unless it says otherwise."""
    shapes = shape(fields, kv_heads=32, head_dim=128, max_positions=32768)
    bias = fields.flag("attention_bias", False)
    return Config(
        **shapes,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=shapes["norm"],
        windows=windows(fields, shapes["num_layers"]),
    )


FAMILY = Family(
    model_type="qwen3",
    config=config,
    keys=Keys(
        used=SHAPE_KEYS | WINDOW_KEYS | {"attention_bias"},
        refused={**rotary.REFUSED, "mlp_bias": (False, None)},
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY"]
