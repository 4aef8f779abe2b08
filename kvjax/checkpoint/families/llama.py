"""Llama 1 to 3.x (Touvron et al. 2302.13971, 2307.09288; Grattafiori et al. 2407.21783) and what others share."""

from __future__ import annotations

from typing import Any

from kvjax.checkpoint import rotary
from kvjax.checkpoint.activations import ACTIVATIONS
from kvjax.checkpoint.fields import MOST_LAYERS, Fields, Keys
from kvjax.checkpoint.rules import Family, Rule, linear
from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.ops.norms import RMSNorm

SHAPE_KEYS = rotary.KEYS | frozenset(
    """head_dim hidden_act hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads
    rms_norm_eps""".split()
)
"""Keys that `shape` reads."""

RULES = (
    Rule("embed/table", ("embed_tokens.weight",)),
    Rule("layers/{i}/attn_norm/scale", ("layers.{i}.input_layernorm.weight",)),
    *linear("layers/{i}/attn/qkv", *(f"layers.{{i}}.self_attn.{x}_proj" for x in "qkv")),
    *linear("layers/{i}/attn/out", "layers.{i}.self_attn.o_proj"),
    Rule("layers/{i}/attn/q_norm/scale", ("layers.{i}.self_attn.q_norm.weight",)),
    Rule("layers/{i}/attn/k_norm/scale", ("layers.{i}.self_attn.k_norm.weight",)),
    Rule("layers/{i}/ffn_norm/scale", ("layers.{i}.post_attention_layernorm.weight",)),
    *linear("layers/{i}/ffn/gate_up", "layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    *linear("layers/{i}/ffn/down", "layers.{i}.mlp.down_proj"),
    Rule("final_norm/scale", ("norm.weight",)),
    Rule("head/kernel", ("lm_head.weight",), transposed=True),
)
IGNORED = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)  # made from config.json; stored by old versions


def shape(fields: Fields, *, kv_heads: int | None, head_dim: int | None, max_positions: int) -> dict[str, Any]:
    """What all descendants of Llama read alike, as keyword arguments of `Config`.

    Args:
        fields: config.json.
        kv_heads, head_dim, max_positions: what the family takes where config.json says nothing; None is derived.
    """
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", head_dim, nullable=True)
    if head_dim is None and width % heads:
        raise CheckpointError(f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}")
    positions, limit = rotary.rotary(fields, max_positions)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "num_layers": fields.integer("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "query_heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", kv_heads, nullable=True) or heads,
        "head_dim": head_dim or width // heads,
        "ffn_width": fields.integer("intermediate_size"),
        "max_positions": limit,
        "norm": RMSNorm(fields.number("rms_norm_eps", 1e-6)),
        "activation": fields.choice("hidden_act", "silu", ACTIVATIONS),
        "positions": positions,
        "tied": fields.flag("tie_word_embeddings", False),
    }


def config(fields: Fields) -> Config:
    """Llama's config.json as a `Config`."""
    bias = fields.flag("attention_bias", False)
    return Config(
        **shape(fields, kv_heads=None, head_dim=None, max_positions=2048),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=fields.flag("mlp_bias", False),
    )


FAMILY = Family(
    model_type="llama",
    config=config,
    keys=Keys(
        used=SHAPE_KEYS | {"attention_bias", "mlp_bias"},
        harmless=frozenset({"is_llama_config"}),
        refused={
            **rotary.REFUSED,
            "layer_types": (None,),
            "rope_interleaved": (False, None),
            "sliding_window": (None,),
            "use_sliding_window": (False, None),
        },
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY", "RULES", "IGNORED", "SHAPE_KEYS", "shape"]
