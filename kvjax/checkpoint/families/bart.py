"""BART (Lewis et al. 1910.13461): two stacks with norms after each sub-layer, learned positions; what others share."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from kvjax.checkpoint.activations import ACTIVATIONS
from kvjax.checkpoint.fields import MOST_LAYERS, Fields, Keys
from kvjax.checkpoint.rules import Family, Rule, linear
from kvjax.config import Config, NormOrder
from kvjax.errors import CheckpointError
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned

SHAPE_KEYS = frozenset(
    """activation_function d_model decoder_attention_heads decoder_ffn_dim decoder_layers encoder_attention_heads
    encoder_ffn_dim encoder_layers max_position_embeddings scale_embedding hidden_size num_attention_heads
    num_hidden_layers""".split()
)
"""Keys that `shape` reads."""

ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
HARMLESS = frozenset(
    """activation_dropout classif_dropout classifier_dropout decoder_layerdrop dropout encoder_layerdrop
    gradient_checkpointing init_std save_step""".split()
)
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_bias_logits": (False, None),
    "extra_pos_embeddings": (2, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (True,),
}


def _norm(target: str, source: str) -> tuple[Rule, Rule]:
    return Rule(f"{target}/scale", (f"{source}.weight",)), Rule(f"{target}/bias", (f"{source}.bias",))


def _stack(ours: str, theirs: str) -> tuple[Rule, ...]:
    layer, source = f"{ours}layers/{{i}}", f"{theirs}.layers.{{i}}"
    return (
        Rule(f"{ours}embed/table", (f"{theirs}.embed_tokens.weight",)),
        Rule(f"{ours}positions/table", (f"{theirs}.embed_positions.weight",), skip=2),
        *_norm(f"{ours}embed_norm", f"{theirs}.layernorm_embedding"),
        *linear(f"{layer}/attn/qkv", *(f"{source}.self_attn.{x}_proj" for x in "qkv")),
        *linear(f"{layer}/attn/out", f"{source}.self_attn.out_proj"),
        *_norm(f"{layer}/attn_norm", f"{source}.self_attn_layer_norm"),
        *linear(f"{layer}/cross/q", f"{source}.encoder_attn.q_proj"),
        *linear(f"{layer}/cross/kv", *(f"{source}.encoder_attn.{x}_proj" for x in "kv")),
        *linear(f"{layer}/cross/out", f"{source}.encoder_attn.out_proj"),
        *_norm(f"{layer}/cross_norm", f"{source}.encoder_attn_layer_norm"),
        *linear(f"{layer}/ffn/up", f"{source}.fc1"),
        *linear(f"{layer}/ffn/down", f"{source}.fc2"),
        *_norm(f"{layer}/ffn_norm", f"{source}.final_layer_norm"),
        *_norm(f"{ours}final_norm", f"{theirs}.layer_norm"),
    )


RULES = (
    *_stack("", "decoder"),
    *_stack("encoder/", "encoder"),
    Rule("head/kernel", ("lm_head.weight",), transposed=True),
    Rule("head/bias", ("final_logits_bias",), row=True, optional=True),
)
IGNORED = (r"(en|de)coder\.version",)  # stored by the trainer


def tables(config: Config, stored: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Names of one embedding table: of both stacks, or of the decoder's and the head's alone; see `Family`."""
    both = ("shared.weight", "encoder.embed_tokens.weight") if config.encoder and config.encoder.tied else ()
    return ((*both, "decoder.embed_tokens.weight", *(("lm_head.weight",) if config.tied else ())),)


def shape(fields: Fields, *, source_vocab: int | None = None, **common: Any) -> Config:
    """What all descendants of BART read alike.

    Args:
        fields: config.json.
        source_vocab: rows of the encoder's table, if it has its own.
        common: keyword arguments of `Config` for both stacks.
    """
    width, tied = fields.integer("d_model"), fields.flag("tie_word_embeddings", True)
    common = {
        "width": width,
        "max_positions": fields.integer("max_position_embeddings", 1024),
        "norm": LayerNorm(1e-5),
        "activation": fields.choice("activation_function", "gelu", ACTIVATIONS),
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "embed_scale": math.sqrt(width) if fields.flag("scale_embedding", False) else 1.0,
    } | common

    def stack(side: str) -> dict[str, Any]:
        heads = fields.integer(f"{side}_attention_heads")
        if width % heads:
            raise CheckpointError(f"config.json: d_model {width} is no multiple of {side}_attention_heads {heads}")
        return common | {
            "num_layers": fields.integer(f"{side}_layers", most=MOST_LAYERS),
            "query_heads": heads,
            "kv_heads": heads,
            "head_dim": width // heads,
            "ffn_width": fields.integer(f"{side}_ffn_dim"),
        }

    encoder = stack("encoder") | {"tied": source_vocab is None}
    if source_vocab is not None:
        encoder["vocab_size"] = source_vocab
    return Config(**stack("decoder"), tied=tied, head_bias=True, encoder=Config(**encoder))


def config(fields: Fields) -> Config:
    """BART's config.json as a `Config`."""
    return shape(
        fields,
        vocab_size=fields.integer("vocab_size"),
        norm_order=NormOrder.POST,
        positions=Learned(fields.integer("max_position_embeddings", 1024)),
        embed_norm=True,
    )


FAMILY = Family(
    model_type="bart",
    config=config,
    keys=Keys(
        used=SHAPE_KEYS,
        harmless=HARMLESS,
        refused={
            **REFUSED,
            "add_final_layer_norm": (False, None),
            "normalize_before": (False, None),
            "normalize_embedding": (True, None),
            "static_position_embeddings": (False, None),
        },
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    ignored_if_tied=(),
    tables=tables,
    aliases=ALIASES,
)

__all__ = ["FAMILY", "ALIASES", "HARMLESS", "IGNORED", "REFUSED", "RULES", "SHAPE_KEYS", "shape", "tables"]
