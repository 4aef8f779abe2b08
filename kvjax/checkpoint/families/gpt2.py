"""GPT-2 (Radford et al. 2019): layer norms, learned positions, maps stored [inputs, outputs], one for q, k, v."""

from __future__ import annotations

from kvjax.checkpoint.activations import ACTIVATIONS
from kvjax.checkpoint.fields import MOST_LAYERS, Fields, Keys
from kvjax.checkpoint.rules import Family, Rule
from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned


def config(fields: Fields) -> Config:
    """GPT-2's config.json as a `Config`."""
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    if width % heads:
        raise CheckpointError(f"config.json: n_embd {width} is no multiple of n_head {heads}")
    positions = fields.integer("n_positions", 1024)
    return Config(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("n_layer", most=MOST_LAYERS),
        width=width,
        query_heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn_width=fields.integer("n_inner", None) or 4 * width,
        max_positions=positions,
        norm=LayerNorm(fields.number("layer_norm_epsilon", 1e-5)),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        gated=False,
        positions=Learned(positions),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
    )


def _both(target: str, source: str) -> tuple[Rule, Rule]:
    # Conv1D: the kernel lies [inputs, outputs] already
    return Rule(f"{target}/kernel", (f"{source}.weight",)), Rule(f"{target}/bias", (f"{source}.bias",))


def _norm(target: str, source: str) -> tuple[Rule, Rule]:
    return Rule(f"{target}/scale", (f"{source}.weight",)), Rule(f"{target}/bias", (f"{source}.bias",))


FAMILY = Family(
    model_type="gpt2",
    config=config,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    keys=Keys(
        used=frozenset(
            """n_embd n_head n_inner n_layer n_positions activation_function layer_norm_epsilon
            hidden_size max_position_embeddings num_attention_heads num_hidden_layers""".split()
        ),
        harmless=frozenset(
            """attn_pdrop embd_pdrop gradient_checkpointing n_ctx resid_pdrop summary_activation summary_first_dropout
            summary_proj_to_labels summary_type summary_use_proj""".split()
        ),
        refused={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
    ),
    rules=(
        Rule("embed/table", ("wte.weight",)),
        Rule("positions/table", ("wpe.weight",)),
        *_norm("layers/{i}/attn_norm", "h.{i}.ln_1"),
        *_both("layers/{i}/attn/qkv", "h.{i}.attn.c_attn"),
        *_both("layers/{i}/attn/out", "h.{i}.attn.c_proj"),
        *_norm("layers/{i}/ffn_norm", "h.{i}.ln_2"),
        *_both("layers/{i}/ffn/up", "h.{i}.mlp.c_fc"),
        *_both("layers/{i}/ffn/down", "h.{i}.mlp.c_proj"),
        *_norm("final_norm", "ln_f"),
        Rule("head/kernel", ("lm_head.weight",), transposed=True),
    ),
    prefix="transformer.",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, stored by old versions
)

__all__ = ["FAMILY"]
