"""Trains a small draft model for a larger one: it learns the larger one's distributions, on texts that one writes.

Nothing else is read: the texts are drawn from the model anew at every step, so that none is seen twice and no text of
people is needed. Distillation on the model's own samples, for speculation: Zhou et al. 2023,
https://arxiv.org/abs/2310.08461.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tokenizers import Tokenizer

from kvjax import caches, sampling
from kvjax.caching import init_cache
from kvjax.checkpoint.source import resolve
from kvjax.errors import InputError
from kvjax.lm import load
from kvjax.loops.decode import step
from kvjax.model import Model, decoder, forward
from kvjax.train import lm, loop, package
from kvjax.train.data import BOS_ID
from kvjax.train.optimise import State
from kvjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Settings(lm.Settings):
    """What made the bundled draft. Vocabulary and context are those of the model that it is for."""

    steps: int = 3000
    width: int = 128
    layers: int = 1
    heads: int = 4
    kv_heads: int = 1
    ffn: int = 256
    lr: float = 8e-3
    weight_decay: float = 0.01
    dropout: float = 0.0  # no text is read twice
    recut: float = 0.0

    def train_block(self, vocab_size: int) -> Callable[[State, Any], tuple[State, Array]]:
        """See `lm.train_block`."""
        return lm.train_block(self, vocab_size, loss)


OPTIONS = ("seed", "steps", "batch", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "lr")
"""Settings that the command line takes."""

HELDOUT_SEED, EVALUATION_SEED = 10_000, 20_000
HELDOUT_ROWS, ROWS = 32, 128
"""Texts that choose the checkpoint, and those that the finished package is measured on."""


@partial(jax.jit, static_argnames="length")
def written(model: Model, seeds: Array, length: int) -> tuple[Array, Array]:
    """Texts that a model draws, and what it draws them from.

    Args:
        model: whose texts begin with `BOS_ID`.
        seeds: `[B]` uint32, one a text.
        length: tokens of each, the first included.

    Returns:
        Tokens `[B, S]` int32 and logits `[B, S, V]`, for the token after each.
    """
    keys, first = sampling.row_keys(seeds), jnp.full(seeds.shape, BOS_ID, jnp.int32)

    def one(carry: Any, _: None) -> Any:
        cache, tokens = carry
        logits, cache = step(model, cache, tokens)
        drawn = sampling.chain()(logits, sampling.position_keys(keys, cache.lengths))
        return (cache, drawn), (tokens, logits)

    cache = init_cache(model, caches.dense(), batch=len(seeds), capacity=length)
    _, (tokens, logits) = lax.scan(one, (cache, first), None, length=length)
    return tokens.T, jnp.swapaxes(logits, 0, 1)


def seeds_of(*what: int, rows: int) -> Array:
    """`[rows]` uint32, a function of the arguments."""
    return jnp.asarray(np.random.default_rng(what).integers(2**32, size=rows, dtype=np.uint32))


def loss(model: Model, batch: tuple[Array, Array]) -> Array:
    """Mean Kullback-Leibler divergence of a draft from what `written` gave, in nats per token."""
    tokens, logits = batch
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(forward(model, tokens))  # [B, S, V]
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


@jax.jit
def acceptance(model: Model, tokens: Array, logits: Array) -> tuple[Array, Array]:
    """The share of a draft's tokens that speculation keeps, over all positions of texts that begin with `BOS_ID`.

    Args:
        model: the draft.
        tokens: `[B, S]` int32.
        logits: `[B, S, V]`, of the model that it is for.

    Returns:
        Means of the overlap Σ min(p, q), which is the chance that a drawn token is kept (Leviathan et al. 2022,
        https://arxiv.org/abs/2211.17192), and of whether both have the same largest logit.
    """
    own = forward(model, tokens)
    overlap = jnp.sum(jnp.minimum(jax.nn.softmax(own), jax.nn.softmax(logits)), axis=-1)
    return jnp.mean(overlap), jnp.mean(jnp.argmax(own, axis=-1) == jnp.argmax(logits, axis=-1))


def train(source: str, out: Path, settings: Settings | None = None, *, quiet: bool = False) -> loop.Progress:
    """Trains, or goes on where the checkpoint in `out` stands, and writes `out/model` at the end.

    Args:
        source: bundled name or directory of the model that the draft is for.
        out: directory for the checkpoint and, once finished, the package.
        settings: of the run; those of a checkpoint in `out` must be the same. None is `Settings()`.
        quiet: no progress bar.

    Returns:
        The progress at the end; its held-out losses are shares of drawn tokens that would not be kept.

    Raises:
        InputError: the model has no `tokenizer.json`, or its texts do not begin with `BOS_ID`.
        CheckpointError: `out` holds a checkpoint of another run.
        KeyboardInterrupt: after an interrupt, with the checkpoint written.
    """
    folder, name = resolve(source, None)
    target = load(source)
    tokenizer = None if target.tokenizer is None else target.tokenizer.backend
    if not isinstance(tokenizer, Tokenizer) or target.bos_id != BOS_ID:
        raise InputError(
            f"{source} has {type(tokenizer).__name__} and begins a text with id {target.bos_id}; a draft is made for a "
            f"model with tokenizer.json whose texts begin with id {BOS_ID}"
        )
    vocab, context = target.model.config.vocab_size, target.model.config.max_positions
    settings = dataclasses.replace(settings or Settings(), vocab=vocab, context=context)
    config = settings.config(vocab)

    def batches(step: int, steps: int) -> Any:
        made = written(target.model, seeds_of(settings.seed, step, rows=steps * settings.batch), context)
        return jax.tree.map(lambda x: x.reshape(steps, settings.batch, *x.shape[1:]), made)

    def of(seed: int, rows: int) -> tuple[Array, Array]:
        return written(target.model, seeds_of(seed, rows=rows), context)

    chosen_on = of(HELDOUT_SEED, HELDOUT_ROWS)

    def heldout(params: Params) -> float:
        return 1.0 - float(acceptance(decoder(config, params), *chosen_on)[0])

    mark = package.read_record(folder)["model_sha256"]
    progress = loop.run(out, settings, vocab, mark, batches, heldout, quiet=quiet)
    record = {
        "command": command(name, settings),
        "target": {"name": name, "model_sha256": mark},
        "settings": dataclasses.asdict(settings),
        **loop.circumstances(progress),
    }
    package.write_package(out / "model", progress.best, config, tokenizer, record, card)
    stored = load(out.resolve() / "model").model  # what is measured is the file, rounding included
    drawn, greedy = acceptance(stored, *of(EVALUATION_SEED, ROWS))
    record["acceptance"] = {"drawn": float(drawn), "greedy": float(greedy)}
    package.write_record(out / "model", record, card)
    return progress


def command(name: str, settings: Settings) -> str:
    """What to type for a run of these settings."""
    plain = Settings()
    changed = [x for x in OPTIONS if getattr(settings, x) != getattr(plain, x)]
    options = [f"--{x.replace('_', '-')} {getattr(settings, x)}" for x in changed]
    return " ".join([f"python -m kvjax.train draft {name} --out DIR", *options])


def card(out: Path, record: dict[str, Any]) -> str:
    """The model card: what `training.json` holds, for people."""
    shape = json.loads((out / "config.json").read_text(encoding="utf-8"))
    name, found = record["target"]["name"], record.get("acceptance", {})
    lines = [
        f"# {name}-draft",
        "",
        f"A Llama-architecture language model of {package.count(out):,} parameters that `python -m kvjax.train draft`",
        f"trained to guess what `{name}` would say next, for speculation. Its tokenizer is that of `{name}`.",
        "",
        *package.shape_table(shape),
        "",
        "## Acceptance",
        "",
        f"Of this package as stored, in float32, over {ROWS} texts of {shape['max_position_embeddings']} tokens that "
        f"`{name}` draws from",
        f"seed {EVALUATION_SEED}, without temperature or filters, and training does not: the mean of Σ min(p, q), the",
        "share of drawn tokens that is kept, and the share of positions at which both models have the same largest",
        "logit.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {how} | {value:.4f} |" for how, value in found.items()),
        "",
        "## Data",
        "",
        f"None but texts that `{name}` draws, new ones at every step, and the distributions that it draws them from.",
        f"SHA-256 of its `model.safetensors`: `{record['target']['model_sha256']}`.",
        "",
        *package.how_it_was_made(record, f"the highest acceptance on {HELDOUT_ROWS} texts of seed {HELDOUT_SEED}"),
        *package.files(out, record),
    ]
    return "\n".join(lines)


__all__ = ["Settings", "OPTIONS", "written", "loss", "acceptance", "train", "command", "card"]
