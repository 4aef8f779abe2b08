"""The tiny models that parity is proved on: their config.json, and weights made from a seed, with or without torch."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from typing import Any

import numpy as np

VOCAB = 128
RANDOM = 64  # random tokens, teacher-forced
PROMPT = 8  # of them, the greedy run's prompt
STEPS = 64  # greedy
RAGGED = (5, 23, 40)  # lengths of the rows of the ragged batch
SOURCES = (33, 20, 1, 9, 40)  # lengths of the sources: of the random tokens, the greedy run, and those rows
SMALL = 64  # vocabulary of the models with an encoder
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant of a family.

    Args:
        name: of its golden file.
        config: config.json as a hub file would have it.
        gain: deviation of a matrix's entries, times sqrt(inputs); high enough that greedy text does not loop.
        centre: around which the vectors lie that are no biases; 0 for norms that add 1 themselves.
        peak: further factor on the maps to queries and keys.
        bias: factor on biases; large ones drown the text.
        tables, places: factors on embedding tables and on tables of positions.
        salts: what the models of the three seeds are made from.
        distinct: tokens that each greedy run has at least; with fewer it would prove little.
    """

    name: str
    config: dict[str, Any]
    gain: float = 1.25
    centre: float = 1.0
    peak: float = 1.0
    bias: float = 1.0
    tables: float = 1.0
    places: float = 1.0
    salts: tuple[int, int, int] = SEEDS
    distinct: int = 16

    @property
    def made(self) -> dict[str, float]:
        """How weights are made, for `weights`."""
        return {name: getattr(self, name) for name in ("gain", "centre", "peak", "bias", "tables", "places")}


_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN2 = {**_LLAMA, "model_type": "qwen2", "rms_norm_eps": 1e-6}
_QWEN3 = {**_LLAMA, "model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 12}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GEMMA = {
    "model_type": "gemma2",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 12.0,
    "tie_word_embeddings": False,
}
_GEMMA3 = {
    **{key: value for key, value in _GEMMA.items() if "softcapping" not in key},
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Original lengths of 16 to 32 lie inside the tested one, so that text crosses them.
CASES = (
    Case("gpt2", {**_GPT2}, gain=2.0),
    Case(
        "gpt2_untied_inner",
        {
            **_GPT2,
            "n_layer": 3,
            "n_inner": 100,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
        gain=1.75,
    ),
    Case(
        "llama_tied_theta",
        {**_LLAMA, "tie_word_embeddings": True, "rope_theta": 500.0, "num_hidden_layers": 3},
        gain=1.4,
    ),
    Case("llama_bias_wide_heads", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16}, gain=1.5),
    Case("llama_linear", {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    Case(
        "llama_llama3",
        {
            **_LLAMA,
            "rope_theta": 10000.0,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    Case(
        "llama_yarn",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 8,
                "beta_slow": 1,
            },
        },
    ),
    Case(
        "qwen2_yarn_parameters",
        {
            **_QWEN2,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 2,
                "beta_slow": 0.25,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
        },
        gain=1.3,
    ),
    Case(
        "mistral_window",
        {
            **_LLAMA,
            "model_type": "mistral",
            "sliding_window": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    ),
    Case("mistral_no_window", {**_LLAMA, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}),
    Case(
        "qwen2_windows",
        {**_QWEN2, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    Case(
        "qwen3_tied_windows",
        {
            **_QWEN3,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        gain=2.25,
    ),
    Case(
        "qwen3_bias_linear",
        {
            **_QWEN3,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
        gain=1.75,
    ),
    # Windows shorter than the text, caps that bite, heads that are not a share of the width.
    Case("gemma2", {**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}, gain=2.5, centre=0),
    Case(
        "gemma2_types_bias",
        {
            **_GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        gain=1.75,
        centre=0,
    ),
    Case(
        "gemma3_old_layout",
        {
            **_GEMMA3,
            "sliding_window_pattern": 3,
            "rope_theta": 50000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        gain=1.75,
        centre=0,
    ),
    Case(
        "gemma3_new_layout",
        {
            **_GEMMA3,
            "num_hidden_layers": 3,
            "final_logit_softcapping": 9.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
            "_sliding_window_pattern": 6,
        },
        gain=1.5,
        centre=0,
    ),
)

_T5 = {
    "model_type": "t5",
    "vocab_size": SMALL,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BART = {
    "model_type": "bart",
    "vocab_size": SMALL,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 96,
    "activation_function": "gelu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "is_encoder_decoder": True,
}
_MARIAN = {
    **{key: value for key, value in _BART.items() if key not in ("bos_token_id", "forced_bos_token_id")},
    "model_type": "marian",
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": SMALL - 1,
    "eos_token_id": 0,
    "decoder_start_token_id": SMALL - 1,
    "forced_eos_token_id": 0,
}
# Distances beyond the largest, stacks of different depth and heads, heads that are not a share of the width. High gains
# make text varied and float32 far from float64; these keep within 5e-6 of it.
SEQ2SEQ = (
    Case("t5", {**_T5}, gain=3.0, peak=0.35, salts=(2, 3, 4), distinct=13),
    Case(
        "t5_v11",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        gain=3.0,
        peak=0.2,
        salts=(3, 6, 2),
    ),
    Case("bart", {**_BART}, gain=0.75, bias=0.1, places=4.0),
    Case(
        "bart_untied",
        {**_BART, "tie_word_embeddings": False, "scale_embedding": True, "activation_function": "relu"},
        gain=0.75,
        bias=0.3,
        places=4.0,
        salts=(0, 2, 4),
    ),
    Case("marian", {**_MARIAN}, gain=1.0, peak=1.5, bias=0.05, tables=2.0, salts=(4, 18, 47), distinct=8),
    Case(
        "marian_separate",
        {
            **_MARIAN,
            "activation_function": "gelu",
            "vocab_size": SMALL + 16,
            "decoder_vocab_size": SMALL,
            "share_encoder_decoder_embeddings": False,
        },
        gain=1.0,
        peak=1.5,
        bias=0.05,
        tables=3.0,
        salts=(51, 19, 18),
        distinct=7,
    ),
    Case(
        "mbart", {**_BART, "model_type": "mbart", "scale_embedding": True}, gain=1.5, bias=0.1, places=8.0, distinct=11
    ),
)

ALL = CASES + SEQ2SEQ


def weights(
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    gain: float,
    centre: float = 1.0,
    peak: float = 1.0,
    bias: float = 1.0,
    tables: float = 1.0,
    places: float = 1.0,
) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint from its name and a seed.

    From the raw words of the bit generator, which NumPy promises to keep, unlike the distributions on top of them.

    Args:
        shapes: by the checkpoint's own names.
        seed: which model.
        gain, centre, peak, bias, tables, places: see `Case`.

    Returns:
        float32 arrays.
    """
    made = {}
    separate = not any("shared" in name for name in shapes)
    for name, shape in sorted(shapes.items()):
        alike = name if separate else re.sub(r"(en|de)coder\.embed_tokens", "shared", name)
        words = np.random.PCG64([seed, zlib.crc32(alike.encode())]).random_raw(math.prod(shape))
        uniform = ((words >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape) * math.sqrt(3)  # deviation 1
        if len(shape) == 1:
            made[name] = (0.2 * bias * uniform if name.endswith("bias") else 0.2 * uniform + centre).astype(np.float32)
        elif "emb" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight")):
            made[name] = (0.15 * (places if "position" in name else tables) * uniform).astype(np.float32)
        else:
            inputs = shape[0] if ".c_" in name else shape[1]  # GPT-2 stores [inputs, outputs]
            factor = gain * peak if re.search(r"_attn\.[qk]_proj\.|Attention\.[qk]\.", name) else gain
            made[name] = (factor / math.sqrt(inputs) * uniform).astype(np.float32)
    return made


def tokens(seed: int, config: dict[str, Any] = CASES[0].config) -> tuple[np.ndarray, list[np.ndarray]]:
    """`RANDOM` random tokens, and the rows of the ragged batch; with an encoder, each begins as targets do."""
    ids = _ids(seed, 1, RANDOM + sum(RAGGED), VOCAB) % config.get("decoder_vocab_size", config["vocab_size"])
    rows = np.split(ids, np.cumsum((RANDOM, *RAGGED))[:-1])
    start = [config[key] for key in ("decoder_start_token_id", "forced_bos_token_id") if key in config]
    for row in rows:
        row[: len(start)] = start
    return rows[0], rows[1:]


def sources(seed: int, config: dict[str, Any]) -> list[np.ndarray]:
    """What a model with an encoder reads: a row for `RANDOM`, one for the greedy run, those of the ragged batch."""
    if "decoder_start_token_id" not in config:
        return []
    ids = _ids(seed, 2, sum(SOURCES), config["vocab_size"])
    return np.split(ids, np.cumsum(SOURCES)[:-1])


def _ids(seed: int, stream: int, count: int, vocab: int) -> np.ndarray:
    words = np.random.PCG64([seed, stream]).random_raw(count) % np.uint64(vocab)
    return words.astype(np.int32)


__all__ = [
    "ALL",
    "CASES",
    "SEQ2SEQ",
    "Case",
    "weights",
    "tokens",
    "sources",
    "VOCAB",
    "SMALL",
    "RANDOM",
    "PROMPT",
    "STEPS",
]
__all__ += ["RAGGED", "SOURCES", "SEEDS"]
