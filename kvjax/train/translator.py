"""The Hugging Face layout of a trained transliterator: an mBART folder with a character tokenizer, card and record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from kvjax.config import Config
from kvjax.train import accuracy, package, pairs
from kvjax.types import Params

SKIPPED = 2
"""Rows before the first of mBART's position tables that mean nothing."""

DATA = (
    "Names in Arabic script with their English spelling, published by Rosca and Breuel (2016, 1610.09565):\n"
    "google/transliteration, Apache License 2.0."
)


def to_hf(params: Params, config: Config, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    """mBART's names and [out, in] matrices for the nested dict of `kvjax.params`, one embedding table, in `dtype`."""
    out: dict[str, Any] = {
        "model.shared.weight": params["embed"]["table"],
        "final_logits_bias": np.asarray(params["head"]["bias"])[None, :],
    }

    def linear(name: str, of: Params, part: int = 0, parts: int = 1) -> None:
        out[f"{name}.weight"] = np.split(np.asarray(of["kernel"]), parts, axis=1)[part].T
        out[f"{name}.bias"] = np.split(np.asarray(of["bias"]), parts)[part]

    def norm(name: str, of: Params) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = of["scale"], of["bias"]

    for name, own, layers in (
        ("model.decoder", params, config.num_layers),
        ("model.encoder", params["encoder"], config.encoder.num_layers if config.encoder else 0),
    ):
        table = np.asarray(own["positions"]["table"])
        out[f"{name}.embed_positions.weight"] = np.pad(table, ((SKIPPED, 0), (0, 0)))
        norm(f"{name}.layernorm_embedding", own["embed_norm"])
        norm(f"{name}.layer_norm", own["final_norm"])
        for i in range(layers):
            layer, at = own["layers"][str(i)], f"{name}.layers.{i}"
            for part, letter in enumerate("qkv"):
                linear(f"{at}.self_attn.{letter}_proj", layer["attn"]["qkv"], part, 3)
            linear(f"{at}.self_attn.out_proj", layer["attn"]["out"])
            norm(f"{at}.self_attn_layer_norm", layer["attn_norm"])
            if "cross" in layer:
                linear(f"{at}.encoder_attn.q_proj", layer["cross"]["q"])
                for part, letter in enumerate("kv"):
                    linear(f"{at}.encoder_attn.{letter}_proj", layer["cross"]["kv"], part, 2)
                linear(f"{at}.encoder_attn.out_proj", layer["cross"]["out"])
                norm(f"{at}.encoder_attn_layer_norm", layer["cross_norm"])
            linear(f"{at}.fc1", layer["ffn"]["up"])
            linear(f"{at}.fc2", layer["ffn"]["down"])
            norm(f"{at}.final_layer_norm", layer["ffn_norm"])
    return {name: np.ascontiguousarray(np.asarray(x), dtype) for name, x in out.items()}


def config_json(config: Config, dtype: str = "float16") -> dict[str, Any]:
    """config.json of an mBART model whose tokens are characters."""
    assert config.encoder is not None
    return {
        "architectures": ["MBartForConditionalGeneration"],
        "model_type": "mbart",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "encoder_layers": config.encoder.num_layers,
        "decoder_layers": config.num_layers,
        "encoder_attention_heads": config.encoder.query_heads,
        "decoder_attention_heads": config.query_heads,
        "encoder_ffn_dim": config.encoder.ffn_width,
        "decoder_ffn_dim": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "activation_function": "gelu_new",
        "scale_embedding": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": pairs.BOS_ID,
        "pad_token_id": pairs.PAD_ID,
        "eos_token_id": pairs.EOS_ID,
        "decoder_start_token_id": pairs.BOS_ID,
        "forced_eos_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def write_package(out: Path, params: Params, config: Config, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Writes the whole package to the directory `out`, the model card last.

    Args:
        out: created where it is missing; files of the same names are replaced.
        params: float32 parameters; stored in float16.
        config: the model.
        tokenizer: its tokenizer.
        record: what `training.json` holds; see `kvjax.train.seq2seq.train`.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_hf(params, config), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    package.write_json(out / "config.json", config_json(config))
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    special = {"bos_token": pairs.BOS, "pad_token": pairs.PAD, "eos_token": pairs.EOS, "unk_token": pairs.UNKNOWN}
    package.write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_positions,
        },
    )
    package.write_json(
        out / "generation_config.json",
        {
            "decoder_start_token_id": pairs.BOS_ID,
            "bos_token_id": pairs.BOS_ID,
            "pad_token_id": pairs.PAD_ID,
            "eos_token_id": pairs.EOS_ID,
            "max_length": config.max_positions,
            "num_beams": accuracy.BEAMS,
        },
    )
    package.write_record(out, record, card)


def record_accuracy(folder: Path, name: str, found: dict[str, accuracy.Accuracy]) -> None:
    """Writes what `kvjax.train.accuracy.measure` found on pairs called `name` into the record and the model card of the
    package in `folder`."""
    record = package.read_record(folder)
    record["accuracy"] = record.get("accuracy", {}) | {name: {search: x._asdict() for search, x in found.items()}}
    package.write_record(folder, record, card)


def card(out: Path, record: dict[str, Any]) -> str:
    """The model card: what `training.json` holds, for people."""
    shape = json.loads((out / "config.json").read_text(encoding="utf-8"))
    data = record["pairs"]
    lines = [
        f"# {out.resolve().parent.name if out.name == 'model' else out.name}",
        "",
        f"A transliterator of {package.count(out):,} parameters that `python -m kvjax.train seq2seq` trained: it",
        "writes a name in another script. An encoder-decoder Transformer of mBART's architecture, in the layout of",
        "Hugging Face. It knows single names like those of its data: no sentences, and no character that is not there.",
        "",
        "| | |",
        "|---|---|",
        f"| encoder layers, decoder layers | {shape['encoder_layers']}, {shape['decoder_layers']} |",
        f"| width, feed-forward, heads | {shape['d_model']}, {shape['encoder_ffn_dim']}, "
        f"{shape['encoder_attention_heads']} |",
        f"| longest name | {shape['max_position_embeddings'] - 1} characters; of the data {data['longest']}, beyond "
        "which nothing was learnt |",
        f"| tokenizer | {shape['vocab_size']} entries, one a character |",
        "| stored in | float16 |",
        "",
        "## Accuracy",
        "",
        "Of this package as stored. Exact: the share of names that are right. Error rate: the fewest insertions,",
        "deletions and substitutions that make the answers right, over the characters of the right ones. There is one",
        "right answer a name.",
        "",
        "| pairs | search | exact | character error rate |",
        "|---|---|---|---|",
        *(
            f"| {name} | {search} | {x['exact']:.4f} | {x['errors']:.4f} |"
            for name, found in record.get("accuracy", {}).items()
            for search, x in found.items()
        ),
        "",
        "`python -m kvjax.train eval MODEL --text PAIRS` measures a file.",
        "",
        "## Data",
        "",
        *([DATA, ""] if data["sha256"] == AR2EN else []),
        f"`{data['name']}`, SHA-256",
        f"`{data['sha256']}`:",
        f"{data['train']:,} pairs to learn from, and {data['heldout']:,}, spread evenly, that chose the checkpoint.",
        "",
        *package.how_it_was_made(
            record, f"the lowest held-out loss, {record['nats']:.4f} nats per character, the end included", "pairs"
        ),
        *package.files(out, record),
    ]
    return "\n".join(lines)


AR2EN = "06062d35810ca5c106efc2fe8f64319910d99c05a53794b606ec20885bbab7bd"
"""SHA-256 of the pairs that the bundled model learnt from."""

__all__ = ["to_hf", "config_json", "write_package", "record_accuracy", "card"]
