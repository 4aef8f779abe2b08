"""The models of `peers.py`, as folders that all peers read, and prompts whose greedy texts can be compared.

Kernels are larger than those of `init_params`, with which a tied head repeats the last token for ever. A prompt is
taken if what follows it has many different tokens, and no step at which two logits are nearly alike.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
from safetensors.numpy import save_file

import kvjax
from kvjax.config import Config
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned
from kvjax.train import package, translator
from kvjax.types import Params

POSITIONS = 2048
SPECIAL = 4
"""Ids below are the start, padding, end and unknown tokens of the encoder-decoder; no prompt has them."""

DISTINCT, NEAR = 16, 1e-4
"""Different tokens of a text, at least; difference of the two largest logits, of the largest, that is no tie."""


def translating(vocab: int, layers: int, width: int, heads: int, ffn: int) -> Config:
    """mBART's architecture: as many layers on both sides."""
    both: dict[str, Any] = {
        "vocab_size": vocab,
        "num_layers": layers,
        "width": width,
        "query_heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": ffn,
        "max_positions": 512,
        "norm": LayerNorm(1e-5),
        "activation": activations.gelu_tanh,
        "gated": False,
        "positions": Learned(512),
        "embed_norm": True,
        **{f"{x}_bias": True for x in ("qkv", "out", "ffn")},
    }
    return Config(head_bias=True, encoder=Config(**both), **both)


SEQ2SEQ = {"tiny seq2seq": translating(512, 2, 64, 4, 128), "6+6": translating(32_000, 6, 512, 8, 2048)}


def config_of(shape: str) -> Config:
    """A shape by its name."""
    return SEQ2SEQ.get(shape) or dataclasses.replace(harness.SHAPES[shape], max_positions=POSITIONS)


def wide(params: Params) -> Params:
    """The same with all kernels of deviation inputs ** -0.5, where `init_params` has 0.02 or less.

    With an encoder, a norm keeps the embedding large: that is made small, and attention sharper.
    """
    sharp = 2.0 if "encoder" in params else 1.0

    def larger(path: Any, x: jax.Array) -> jax.Array:
        names = [each.key for each in path]
        if "embed_norm" in names:
            return x * 0.05
        if names[-1] != "kernel":
            return x
        return x / (x.std() * x.shape[0] ** 0.5) * (sharp if names[-2] in ("qkv", "q", "kv") else 1.0)

    return jax.tree_util.tree_map_with_path(larger, params)


def write(folder: Path, shape: str, seed: int = 0) -> Path:
    """A folder in the Hugging Face layout, in float32, if it is not there yet: `folder/shape`.

    Args:
        folder: of all of them.
        shape: a name.
        seed: of the weights.
    """
    out, config = folder / shape.replace(" ", "-"), config_of(shape)
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    params = wide(kvjax.init_params(config, jax.random.key(seed)))
    if config.encoder is None:
        tensors, hf = package.to_hf(params, config, np.float32), package.config_json(config, None, "float32")
    else:
        tensors, hf = translator.to_hf(params, config, np.float32), translator.config_json(config, "float32")
        hf["normalize_before"] = hf["normalize_embedding"] = True  # CTranslate2 asks for them
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf, indent=2))  # the last: then the folder is whole
    return out


def gaps(logits: np.ndarray) -> np.ndarray:
    """How far the second largest logit lies below the largest, of the largest magnitude: `[..., V]` to `[...]`."""
    two = np.partition(logits, -2, axis=-1)[..., -2:]
    return (two[..., 1] - two[..., 0]) / np.abs(logits).max(axis=-1)


def logits_of(lm: kvjax.LM, prompt: list[int], text: list[int]) -> np.ndarray:
    """From which each token of `text` is chosen, `[tokens, V]`; with an encoder, `prompt` is the source."""
    if lm.model.encode is None:
        fed, source = [*prompt, *text[:-1]], None
    else:
        fed, source = [*lm.start_ids, *text[:-1]], kvjax.encode(lm.model, [prompt])
    return np.asarray(kvjax.forward(lm.model, [fed], source=source))[0, -len(text) :]


def prompts(lm: kvjax.LM, rows: int, length: int, new: int, seed: int = 0) -> list[list[int]]:
    """Random prompts `[rows, length]` whose next `new` tokens can be compared; see the docstring of this file.

    Raises:
        RuntimeError: too few of many are good.
    """
    random, found = np.random.default_rng(seed), []
    for _ in range(8):
        tried = random.integers(SPECIAL, lm.model.config.vocab_size, (rows, length)).tolist()
        for prompt, text in zip(tried, texts(lm, tried, new), strict=True):
            good = len(set(text)) >= min(DISTINCT, new // 2 + 1) and min(text) >= SPECIAL
            if good and gaps(logits_of(lm, prompt, text)).min() > NEAR:
                found.append(prompt)
        if len(found) >= rows:
            return found[:rows]
    raise RuntimeError(f"{rows} prompts were to be found whose texts have no tie; there are {len(found)}")


def texts(lm: kvjax.LM, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """What `generate` gives, nothing ending a row early."""
    made = kvjax.generate(lm, prompts, max_new_tokens=new, stop_ids=(), **options)
    return [np.asarray(row).tolist() for row in made.tokens]


def difference(lm: kvjax.LM, prompt: list[int], mine: list[int], theirs: list[int], beams: int = 1) -> str | None:
    """None if both texts are equal, or the first difference, and by how much ours is the better choice there: of the
    largest logit; for a search, of the log-probability of the whole text."""
    if mine == theirs:
        return None
    if len(mine) != len(theirs):
        return f"differs: {len(mine)} tokens and {len(theirs)}"
    at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    if beams > 1:
        sums = [logprob(logits_of(lm, prompt, text), text) for text in (mine, theirs)]
        gap, of = (sums[0] - sums[1]) / abs(sums[0]), "log-probability"
    else:
        logits = logits_of(lm, prompt, mine)[at]
        gap, of = float(logits[mine[at]] - logits[theirs[at]]) / float(np.abs(logits).max()), "largest logit"
    return f"{'tie' if abs(gap) < NEAR else 'differs'} at token {at}: {gap:.1e} of the {of}"


def brief(said: str) -> str:
    """What the benchmark says of rows that differ, in the width of a table: the largest gap between two choices."""
    gaps = [abs(float(gap)) for gap in re.findall(r"([-+.\de]+) of the ", said.partition(": ")[2])]
    return f"{said.partition(' rows')[0]} differ, by ≤ {max(gaps):.0e}" if gaps else said


def logprob(logits: np.ndarray, text: list[int]) -> float:
    """Of a text, from the logits `[tokens, V]` that it was chosen from."""
    logits = logits.astype(np.float64)
    most = logits.max(axis=1)
    return float((logits[np.arange(len(text)), text] - most - np.log(np.exp(logits - most[:, None]).sum(1))).sum())
