"""T5 and T5 v1.1, FLAN-T5 (Raffel et al. 1910.10683; Chung et al. 2210.11416): relative positions, no biases.

In float16 their streams overflow: give `load` another dtype where that is the default.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvjax.checkpoint.activations import ACTIVATIONS
from kvjax.checkpoint.families import bart
from kvjax.checkpoint.fields import MOST_LAYERS, Fields, Keys
from kvjax.checkpoint.rules import Family, Rule
from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.ops.norms import RMSNorm
from kvjax.ops.positions import Relative

FEED_FORWARD: dict[str, tuple[str, bool]] = {
    **{name: (name, False) for name in ACTIVATIONS},
    **{f"gated-{name}": (name, True) for name in ACTIVATIONS},
    "gated-gelu": ("gelu_new", True),  # as v1.1 was trained
}
"""`feed_forward_proj` to the name of the activation and whether there is a gate."""


def config(fields: Fields) -> Config:
    """T5's config.json as a `Config`.

    Only v1.0 scales what the head reads. Files say so by `tie_word_embeddings`, or by `scale_decoder_outputs` since
    version 5 of Transformers, which writes that tables are tied in any case.
    """
    width, tied = fields.integer("d_model"), fields.flag("tie_word_embeddings", True)
    scaled = fields.flag("scale_decoder_outputs", tied)
    name, gated = fields.choice("feed_forward_proj", "relu", FEED_FORWARD)
    if fields.flag("is_gated_act", gated) is not gated:
        raise CheckpointError(f"config.json: is_gated_act is {not gated}, feed_forward_proj says {gated}")
    heads, layers = fields.integer("num_heads"), fields.integer("num_layers", most=MOST_LAYERS)
    buckets, distance = _distances(fields)
    common: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "query_heads": heads,
        "kv_heads": heads,
        "head_dim": fields.integer("d_kv"),
        "ffn_width": fields.integer("d_ff"),
        "norm": RMSNorm(fields.number("layer_norm_epsilon", 1e-6)),
        "activation": ACTIVATIONS[fields.choice("dense_act_fn", name, {name: name})],
        "gated": gated,
        "scale": 1.0,
    }
    return Config(
        **common,
        num_layers=fields.integer("num_decoder_layers", layers, nullable=True, most=MOST_LAYERS) or layers,
        positions=Relative(buckets, distance),
        tied=tied and scaled,
        logit_scale=width**-0.5 if scaled else 1.0,
        encoder=Config(**common, num_layers=layers, positions=Relative(buckets, distance, bidirectional=True)),
    )


def _distances(fields: Fields) -> tuple[int, int]:
    buckets = fields.integer("relative_attention_num_buckets", 32, most=2**16)
    distance = fields.integer("relative_attention_max_distance", 128, most=2**20)
    if buckets % 4 or distance <= buckets // 2:
        raise CheckpointError(
            f"config.json: relative_attention_num_buckets {buckets} must be a multiple of 4, and half of it less than "
            f"relative_attention_max_distance {distance}"
        )
    return buckets, distance


def tables(config: Config, stored: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """As BART's; an untied head that is not stored is the table."""
    (names,) = bart.tables(config, stored)
    return (names if "lm_head.weight" in {*names, *stored} else (*names, "lm_head.weight"),)


def _stack(ours: str, theirs: str, ffn: int) -> tuple[Rule, ...]:
    layer, block = f"{ours}layers/{{i}}", f"{theirs}.block.{{i}}.layer"
    dense = f"{block}.{ffn}.DenseReluDense"
    kernels = {
        "attn/qkv": [f"{block}.0.SelfAttention.{x}" for x in "qkv"],
        "attn/out": [f"{block}.0.SelfAttention.o"],
        "cross/q": [f"{block}.1.EncDecAttention.q"],
        "cross/kv": [f"{block}.1.EncDecAttention.{x}" for x in "kv"],
        "cross/out": [f"{block}.1.EncDecAttention.o"],
        "ffn/up": [f"{dense}.wi"],
        "ffn/gate_up": [f"{dense}.wi_0", f"{dense}.wi_1"],
        "ffn/down": [f"{dense}.wo"],
    }
    norms = {"attn": 0, "cross": 1, "ffn": ffn}
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule(f"{ours}embed/table", (f"{theirs}.embed_tokens.weight",)),
        Rule(f"{ours}positions/table", (bias,)),
        *(
            Rule(f"{layer}/{target}/kernel", tuple(f"{source}.weight" for source in sources), transposed=True)
            for target, sources in kernels.items()
        ),
        *(Rule(f"{layer}/{x}_norm/scale", (f"{block}.{place}.layer_norm.weight",)) for x, place in norms.items()),
        Rule(f"{ours}final_norm/scale", (f"{theirs}.final_layer_norm.weight",)),
    )


FAMILY = Family(
    model_type="t5",
    config=config,
    keys=Keys(
        used=frozenset(
            """d_ff d_kv d_model dense_act_fn feed_forward_proj is_gated_act layer_norm_epsilon num_decoder_layers
            num_heads num_layers relative_attention_max_distance relative_attention_num_buckets scale_decoder_outputs
            head_dim hidden_size num_attention_heads num_hidden_layers""".split()
        ),
        harmless=frozenset(
            "classifier_dropout dropout_rate gradient_checkpointing initializer_factor n_positions".split()
        ),
        refused={"is_decoder": (False, None), "is_encoder_decoder": (True,)},
    ),
    rules=(
        *_stack("", "decoder", 2),
        *_stack("encoder/", "encoder", 1),
        Rule("head/kernel", ("lm_head.weight",), transposed=True),
    ),
    prefix="",
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),  # read by nobody
    ignored_if_tied=(),
    tables=tables,
    aliases={
        "head_dim": "d_kv",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    },
)

__all__ = ["FAMILY"]
