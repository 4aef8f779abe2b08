"""Trains the bundled transliterator: an encoder-decoder of mBART's architecture on pairs of names.

Thirteen thousand pairs are few, and most names can be written in more than one way. Against learning them by heart:
dropout, a share of what is written spread over all characters (Szegedy et al. 2015, 1512.00567), and a moving average
of the parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caching import encode
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.lm import load as load_lm
from kvjax.model import Model, decoder, forward
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned
from kvjax.params import init_params
from kvjax.train import accuracy, loop, pairs, translator
from kvjax.train.dropout import dropping
from kvjax.train.optimise import State, advance, begin
from kvjax.types import Array, Params

ROWS = 256
"""Pairs in a call that does not learn."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the result depends on besides the pairs. The defaults made the bundled model."""

    seed: int = 0
    steps: int = 7_600
    batch: int = 64  # pairs per optimiser step
    positions: int = 20  # characters of a name with its end
    width: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    ffn: int = 384
    lr: float = 1.2e-3
    warmup: int = 300
    final_lr: float = 0.01  # of lr
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0  # of the gradient's global norm
    ema: float = 0.999
    dropout: float = 0.3
    smoothing: float = 0.1  # of the written answer: this share is spread over all characters
    heldout: int = 500  # pairs
    block: int = 20  # steps per look at interrupts
    eval_every: int = 400  # steps; a multiple of block

    def __post_init__(self) -> None:
        if self.block < 1 or self.eval_every < 1 or self.eval_every % self.block:
            raise InputError(f"Settings: eval_every {self.eval_every} must be a multiple of block {self.block}")
        for name in ("dropout", "smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"Settings: {name} must be in [0, 1), not {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"Settings: width {self.width} is no multiple of heads {self.heads}")
        if not self.warmup < self.steps:
            raise InputError(f"Settings: warmup {self.warmup} must be less than steps {self.steps}")

    def config(self, vocab_size: int) -> Config:
        """The model for a tokenizer of `vocab_size` entries: mBART's architecture."""
        both = {
            "vocab_size": vocab_size,
            "width": self.width,
            "query_heads": self.heads,
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "ffn_width": self.ffn,
            "max_positions": self.positions,
            "norm": LayerNorm(1e-5),
            "activation": activations.gelu_tanh,
            "gated": False,
            "positions": Learned(self.positions),
            "qkv_bias": True,
            "out_bias": True,
            "ffn_bias": True,
            "embed_norm": True,
        }
        encoder = Config(num_layers=self.encoder_layers, **both)  # type: ignore[arg-type]
        return Config(num_layers=self.decoder_layers, head_bias=True, encoder=encoder, **both)  # type: ignore[arg-type]

    def initial_state(self, vocab_size: int) -> State:
        """The state at step 0, a function of the settings' seed."""
        params = init_params(self.config(vocab_size), jax.random.key(self.seed), jnp.float32)
        return begin(self, jax.tree_util.tree_map_with_path(_widened, params))

    def train_block(self, vocab_size: int) -> Callable[[State, list[pairs.Rows]], tuple[State, Array]]:
        """See `train_block`."""
        return train_block(self, vocab_size)


def _widened(path: Any, x: Array) -> Array:
    """Random numbers with deviation inputs ** -0.5 where `init_params` has 0.02, which is little for a narrow model."""
    if x.ndim < 2:
        return x
    inputs = x.shape[1] if path[-1].key == "table" else x.shape[0]
    return x / (0.02 * math.sqrt(inputs))


def log_probabilities(model: Model, rows: pairs.Rows) -> tuple[Array, Array]:
    """Log-probabilities `[B, T, V]` of what may follow each token of the targets, and which are real `[B, T]`."""
    source = encode(model, rows.source, rows.source_valid)
    logits = forward(model, rows.target, rows.target_valid, source=source)
    columns = jnp.arange(rows.target.shape[1], dtype=jnp.int32)[None, :]
    return jax.nn.log_softmax(logits, axis=-1), columns < rows.target_valid[:, None]


def loss(model: Model, rows: pairs.Rows, smoothing: float) -> Array:
    """Mean cross-entropy in nats per token, a share `smoothing` of each target spread over all tokens."""
    found, real = log_probabilities(model, rows)
    written = jnp.take_along_axis(found, rows.wanted[..., None], axis=-1)[..., 0]  # [B, T]
    gain = written + smoothing * (jnp.mean(found, axis=-1) - written)
    return -jnp.sum(jnp.where(real, gain, 0.0)) / jnp.sum(real)


@cache
def train_block(settings: Settings, vocab_size: int) -> Callable[[State, list[pairs.Rows]], tuple[State, Array]]:
    """`(state, batches) -> (state, losses [steps])`, one compiled program for each width of a batch; donates the
    state."""
    config = settings.config(vocab_size)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, rows: pairs.Rows) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), state.step)

        def noisy_loss(params: Params) -> Array:
            return loss(dropping(config, params, key, settings.dropout), rows, settings.smoothing)

        value, grads = jax.value_and_grad(noisy_loss)(state.params)
        return advance(settings, state, grads), value

    def run(state: State, batches: list[pairs.Rows]) -> tuple[State, Array]:
        losses = []
        for rows in batches:
            state, value = step(state, rows)
            losses.append(value)
        return state, jnp.stack(losses)

    return run


@jax.jit
def _written_nats(model: Model, rows: pairs.Rows) -> tuple[Array, Array]:
    found, real = log_probabilities(model, rows)
    written = jnp.take_along_axis(found, rows.wanted[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(real, -written, 0.0), axis=-1), jnp.sum(real, axis=-1)


def nats_per_token(model: Model, rows: pairs.Rows) -> float:
    """Total negative log-likelihood of the targets with their ends, over their characters with their ends."""
    total, count = 0.0, 0
    for picked, part in _parts(rows):
        lost, tokens = _written_nats(model, part)
        total += float(np.asarray(lost, np.float64)[:picked].sum())
        count += int(np.asarray(tokens)[:picked].sum())
    return total / count


def _parts(rows: pairs.Rows) -> list[tuple[int, pairs.Rows]]:
    """Calls of one shape: how many of their rows count, and the rows, the first of all standing in for none."""
    count, columns = rows.source.shape
    out = []
    for start in range(0, count, ROWS):
        picked = np.arange(start, min(start + ROWS, count))
        out.append((len(picked), rows.cut(np.pad(picked, (0, ROWS - len(picked))), columns)))
    return out


def train(text: Path, out: Path, settings: Settings, *, quiet: bool = False) -> loop.Progress:
    """Trains, or goes on where the checkpoints in `out` stand, and writes `out/model` at the end.

    Args:
        text: a file of pairs; see `kvjax.train.pairs`.
        out: directory for the checkpoint and, once finished, the package.
        settings: of the run; those of a checkpoint in `out` must be the same.
        quiet: no progress bar.

    Returns:
        The progress at the end; its losses are nats per character of the target, the end included.

    Raises:
        InputError: the file holds no pairs, too few, or one that is too long.
        CheckpointError: if `out` holds a checkpoint of another run.
        KeyboardInterrupt: after an interrupt, with the checkpoint written.
    """
    split = pairs.split_pairs(text, settings.heldout)
    tokenizer = pairs.character_tokenizer(split.train)
    vocab_size = tokenizer.get_vocab_size()
    config = settings.config(vocab_size)
    rows = pairs.rows_of(tokenizer, split.train, settings.positions)
    heldout = pairs.rows_of(tokenizer, split.heldout, settings.positions)

    def batches(step: int, steps: int) -> list[pairs.Rows]:
        return pairs.block_of_batches(rows, seed=settings.seed, step=step, steps=steps, batch=settings.batch)

    def heldout_loss(params: Params) -> float:
        return nats_per_token(decoder(config, params), heldout)

    progress = loop.run(out, settings, vocab_size, split.sha256, batches, heldout_loss, quiet=quiet)
    record = {
        "command": command(text, settings),
        "pairs": {
            "name": text.name,
            "sha256": split.sha256,
            "train": len(split.train),
            "heldout": len(split.heldout),
            "longest": int(max(rows.source_valid.max(), rows.target_valid.max() - 1)),
        },
        "settings": dataclasses.asdict(settings),
        "nats": progress.best_loss,
        **loop.circumstances(progress),
    }
    folder = out / "model"
    translator.write_package(folder, progress.best, config, tokenizer, record)
    stored = load_lm(str(folder.resolve()))  # what is measured is the file, rounding included
    translator.record_accuracy(folder, "held out", accuracy.measure(stored, split.heldout))
    return progress


def command(text: Path, settings: Settings) -> str:
    """What to type for a run of these settings."""
    changed = [
        f"--{f.name.replace('_', '-')} {getattr(settings, f.name)}"
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != f.default
    ]
    return " ".join(["python -m kvjax.train seq2seq", f"--text {text.name}", "--out DIR", *changed])


__all__ = ["Settings", "log_probabilities", "loss", "train_block", "nats_per_token", "train", "command"]
