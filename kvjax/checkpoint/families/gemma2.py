"""Gemma 2 (2408.00118): norms around every sub-layer, soft caps, a window on every other layer; shared with Gemma 3."""

from __future__ import annotations

import math
from typing import Any

from kvjax.checkpoint import rotary
from kvjax.checkpoint.activations import ACTIVATIONS
from kvjax.checkpoint.families.llama import IGNORED
from kvjax.checkpoint.families.qwen2 import by_type
from kvjax.checkpoint.fields import MOST_LAYERS, Fields, Keys
from kvjax.checkpoint.rules import Family, Rule, linear
from kvjax.config import Config, NormOrder
from kvjax.ops.norms import OffsetRMSNorm

SHAPE_KEYS = frozenset(
    """attention_bias final_logit_softcapping head_dim hidden_activation hidden_size intermediate_size layer_types
    num_attention_heads num_hidden_layers num_key_value_heads query_pre_attn_scalar rms_norm_eps
    sliding_window""".split()
)
"""Keys that `shape` reads."""

HARMLESS = frozenset({"cache_implementation", "hidden_act", "sliding_window_size"})
"""Written by old versions and read by none: `hidden_activation` and `sliding_window` are what counts."""

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
}
RULES = (
    Rule("embed/table", ("embed_tokens.weight",)),
    *(Rule(f"layers/{{i}}/{ours}/offset", (f"layers.{{i}}.{theirs}.weight",)) for ours, theirs in _NORMS.items()),
    *linear("layers/{i}/attn/qkv", *(f"layers.{{i}}.self_attn.{x}_proj" for x in "qkv")),
    *linear("layers/{i}/attn/out", "layers.{i}.self_attn.o_proj"),
    *linear("layers/{i}/ffn/gate_up", "layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    *linear("layers/{i}/ffn/down", "layers.{i}.mlp.down_proj"),
    Rule("final_norm/offset", ("norm.weight",)),
    Rule("head/kernel", ("lm_head.weight",), transposed=True),
)


def shape(fields: Fields, *, every: int, logit_softcap: float | None) -> dict[str, Any]:
    """What Gemma 2 and 3 read alike, as keyword arguments of `Config`.

    Args:
        fields: config.json.
        every: where it names no layer types, each so-manyth layer sees everything.
        logit_softcap: what the family takes where config.json says nothing.
    """
    width, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers", most=MOST_LAYERS)
    types = fields.raw("layer_types")
    if types is None:
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    bias = fields.flag("attention_bias", False)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "num_layers": layers,
        "width": width,
        "query_heads": fields.integer("num_attention_heads"),
        "kv_heads": fields.integer("num_key_value_heads", 4),
        "head_dim": fields.integer("head_dim", 256),
        "ffn_width": fields.integer("intermediate_size"),
        "norm": OffsetRMSNorm(fields.number("rms_norm_eps", 1e-6)),
        "norm_order": NormOrder.SANDWICH,
        "activation": fields.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        "qkv_bias": bias,
        "out_bias": bias,
        "windows": by_type(types, layers, fields.integer("sliding_window", 4096)),
        "tied": fields.flag("tie_word_embeddings", True),
        "scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "embed_scale": math.sqrt(width),
        "logit_softcap": fields.number("final_logit_softcapping", logit_softcap, nullable=True),
    }


def config(fields: Fields) -> Config:
    """Gemma 2's config.json as a `Config`; without `layer_types` the layers 0, 2, 4, … are local."""
    positions, limit = rotary.rotary(fields, 8192)
    return Config(
        **shape(fields, every=2, logit_softcap=30.0),
        positions=positions,
        max_positions=limit,
        attention_softcap=fields.number("attn_logit_softcapping", 50.0, nullable=True),
    )


FAMILY = Family(
    model_type="gemma2",
    config=config,
    keys=Keys(
        used=rotary.KEYS | SHAPE_KEYS | {"attn_logit_softcapping"},
        harmless=HARMLESS,
        refused={**rotary.REFUSED, "use_bidirectional_attention": (False, None)},
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY", "HARMLESS", "RULES", "SHAPE_KEYS", "shape"]
