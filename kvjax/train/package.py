"""The Hugging Face layout of a trained model: config.json, model.safetensors, tokenizer files, model card, record.

`training.json` is the record that `kvjax.train eval` reads and the card is written from: settings, the text's
SHA-256, losses, versions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.ops.norms import RMSNorm
from kvjax.ops.positions import Rope
from kvjax.train.data import BOS, BOS_ID
from kvjax.types import Params

RECORD = "training.json"
SOURCES = {
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": (
        ", Shakespeare's plays in one file (karpathy/char-rnn, `data/tinyshakespeare/input.txt`; public domain)"
    )
}


def to_hf(params: Params, config: Config, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    """Llama's names and [out, in] matrices for the nested dict of `kvjax.params`, tied head, in `dtype`."""
    query, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    out = {"model.embed_tokens.weight": params["embed"]["table"], "model.norm.weight": params["final_norm"]["scale"]}
    for i in range(config.num_layers):
        p, at = params["layers"][str(i)], f"model.layers.{i}."
        qkv = np.asarray(p["attn"]["qkv"]["kernel"])
        gate_up = np.asarray(p["ffn"]["gate_up"]["kernel"])
        out[at + "input_layernorm.weight"] = p["attn_norm"]["scale"]
        out[at + "self_attn.q_proj.weight"] = qkv[:, :query].T
        out[at + "self_attn.k_proj.weight"] = qkv[:, query : query + kv].T
        out[at + "self_attn.v_proj.weight"] = qkv[:, query + kv :].T
        out[at + "self_attn.o_proj.weight"] = np.asarray(p["attn"]["out"]["kernel"]).T
        out[at + "post_attention_layernorm.weight"] = p["ffn_norm"]["scale"]
        out[at + "mlp.gate_proj.weight"] = gate_up[:, : config.ffn_width].T
        out[at + "mlp.up_proj.weight"] = gate_up[:, config.ffn_width :].T
        out[at + "mlp.down_proj.weight"] = np.asarray(p["ffn"]["down"]["kernel"]).T
    return {name: np.ascontiguousarray(np.asarray(x), dtype) for name, x in out.items()}


def config_json(config: Config, special: int | None = BOS_ID, dtype: str = "float16") -> dict[str, Any]:
    """config.json of a Llama model; the one special token, if any, is both beginning and end."""
    assert isinstance(config.positions, Rope) and isinstance(config.norm, RMSNorm)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "rope_theta": config.positions.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": special,
        "eos_token_id": special,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def write_package(
    out: Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer | None,
    record: dict[str, Any],
    card: Callable[[Path, dict[str, Any]], str] | None = None,
) -> None:
    """Writes the whole package to the directory `out`, the model card last.

    Args:
        out: created where it is missing; files of the same names are replaced.
        params: float32 parameters; stored in float16.
        config: the model.
        tokenizer: its tokenizer; None for a model of ids, which has no special token.
        record: what `training.json` holds; see `kvjax.train.loop.train`.
        card: writes the model card, from the directory and the record; None is that of a language model.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_hf(params, config), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    write_json(out / "config.json", config_json(config, None if tokenizer is None else BOS_ID))
    if tokenizer is not None:
        _write_tokenizer(out, tokenizer, config)
    write_record(out, record, card)


def _write_tokenizer(out: Path, tokenizer: Tokenizer, config: Config) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": BOS,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_positions,
        },
    )
    write_json(
        out / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": BOS_ID, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
    )


def write_record(out: Path, record: dict[str, Any], card: Callable[[Path, dict[str, Any]], str] | None = None) -> None:
    """Replaces `training.json` and the model card of the package at `out`."""
    record = dict(record, model_sha256=hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    write_json(out / RECORD, record)
    (out / "README.md").write_text((card or _card)(out, record), encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """`training.json` of the package at `path`.

    Raises:
        CheckpointError: if it is not there or not JSON.
    """
    try:
        return json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no model of kvjax.train: its {RECORD} cannot be read ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by `value`, for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(out: Path, record: dict[str, Any]) -> str:
    """The model card: what `training.json` holds, for people."""
    text, losses = record["text"], record.get("nats_per_char", {})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    kinds = {"train": "training part", "heldout": "held-out part, which chose the checkpoint"}
    kinds["test"] = f"last {text['test_chars']:,} characters, which nothing but this measurement read"
    lines = [
        f"# {out.resolve().parent.name if out.name == 'model' else out.name}",
        "",
        f"A Llama-architecture language model of {count(out):,} parameters that `python -m kvjax.train lm` trained",
        "on one text. It is small enough for examples and tests, and knows nothing but the style of that text.",
        "",
        *shape_table(
            config,
            f", the beginning `{BOS}` included",
            f"| tokenizer | byte-level BPE, {config['vocab_size']} entries, learnt from the training part |",
        ),
        "",
        "## Loss",
        "",
        "Nats per character of this package as stored: total negative log-likelihood over the number of characters,",
        "each window beginning with the special token, context filled with stride half the context.",
        "",
        "| part | nats per character |",
        "|---|---|",
        *(f"| {kinds[name]} | {value:.4f} |" for name, value in losses.items()),
        "",
        f"`python -m kvjax.train eval MODEL --text {text['name']}` measures the last part again.",
        "",
        *([record["remark"], ""] if "remark" in record else []),
        "## Data",
        "",
        f"`{text['name']}`{SOURCES.get(text['sha256'], '')}, SHA-256",
        f"`{text['sha256']}`.",
        f"From the front: {text['train_chars']:,} characters of training, {text['heldout_chars']:,} held out to choose",
        f"the checkpoint, {text['test_chars']:,} of test.",
        "",
        *how_it_was_made(
            record,
            f"the lowest held-out loss, its logits divided by {record['temperature']:.3f} (the best temperature on\n"
            "the held-out part, folded into the scale of the final norm)",
        ),
        *files(out, record),
    ]
    return "\n".join(lines)


def shape_table(config: dict[str, Any], context: str = "", *more: str) -> list[str]:
    """Lines of a model card: a table of what `config.json` holds, a remark on the context, and more rows."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return [
        "| | |",
        "|---|---|",
        f"| layers, width, feed-forward | {', '.join(str(config[name]) for name in sizes)} |",
        f"| query heads, kv heads, head dim | {', '.join(str(config[name]) for name in heads)} |",
        f"| context | {config['max_position_embeddings']} tokens{context} |",
        *more,
        "| stored in | float16 |",
    ]


def how_it_was_made(record: dict[str, Any], chosen: str, rows: str = "windows") -> list[str]:
    """The part of a model card on the run; `chosen` ends the sentence "the moving average at step n had ...", `rows` is
    what a batch is made of."""
    settings = record["settings"]
    return [
        "## Training",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Seed {settings['seed']}, {settings['steps']:,} steps of {settings['batch']} {rows}, "
        f"{record['train_seconds'] / 60:.0f} minutes on {record['machine']}; the moving average at step "
        f"{record['best_step']:,}",
        f"had {chosen}. All settings and the course of the losses are in",
        "`training.json`. Versions: "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        "",
    ]


def files(out: Path, record: dict[str, Any]) -> list[str]:
    """The end of a model card: what lies beside it."""
    sizes = {p.name: p.stat().st_size for p in sorted(out.iterdir()) if p.name != "README.md"}
    return [
        "## Files",
        "",
        "| file | bytes |",
        "|---|---|",
        *(f"| {name} | {size:,} |" for name, size in sizes.items()),
        "",
        f"SHA-256 of `model.safetensors`: `{record['model_sha256']}`.",
        "",
    ]


def count(out: Path) -> int:
    """How many numbers the package's parameters hold."""
    with safe_open(out / "model.safetensors", "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


__all__ = [
    "to_hf",
    "config_json",
    "write_package",
    "write_record",
    "write_json",
    "read_record",
    "how_it_was_made",
    "shape_table",
    "files",
    "count",
]
