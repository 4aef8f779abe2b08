"""What one optimiser step of the bundled language model is: settings, state, loss, the compiled block of steps.

A few million parameters learn a million characters by heart. Against it: words are cut anew in each block
(BPE-dropout), the residual stream has dropout, what is kept is a moving average of the parameters, and its logits are
divided by a temperature that is found on held-out text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.model import Model, decoder, forward
from kvjax.params import init_params
from kvjax.train import data
from kvjax.train.dropout import dropping
from kvjax.train.optimise import State, advance, begin
from kvjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the result depends on besides the text. The defaults made the bundled model."""

    seed: int = 0
    steps: int = 9600
    batch: int = 8  # windows per optimiser step
    micro: int = 2  # windows per gradient; small ones stay in a core's cache
    context: int = 256  # tokens, the BOS included
    vocab: int = 768
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 464
    lr: float = 1.5e-3
    warmup: int = 200
    final_lr: float = 0.02  # of lr
    weight_decay: float = 0.8  # large: the text is read some forty times
    beta2: float = 0.99
    clip: float = 1.0  # of the gradient's global norm
    ema: float = 0.998
    dropout: float = 0.2
    recut: float = 0.5  # share of words cut anew in the first part of the run ...
    recut_from: float = 0.4  # ... falling from this share of the run on ...
    recut_until: float = 0.9  # ... to none at this one
    recut_drop: float = 0.25  # BPE-dropout of a word that is cut anew
    heldout_chars: int = 30_000
    test_chars: int = data.TEST_CHARS
    block: int = 10  # steps per device call; an interrupt waits for its end
    eval_every: int = 200  # steps; a multiple of block

    def __post_init__(self) -> None:
        for name, part in (("batch", "micro"), ("eval_every", "block")):
            whole, piece = getattr(self, name), getattr(self, part)
            if piece < 1 or whole < 1 or whole % piece:
                raise InputError(f"Settings: {name} {whole} must be a multiple of {part} {piece}")
        for name in ("dropout", "recut", "recut_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"Settings: {name} must be in [0, 1), not {getattr(self, name)}")
        if not self.warmup < self.steps:
            raise InputError(f"Settings: warmup {self.warmup} must be less than steps {self.steps}")

    def config(self, vocab_size: int) -> Config:
        """The model for a tokenizer of `vocab_size` entries."""
        return Config(
            vocab_size=vocab_size,
            num_layers=self.layers,
            width=self.width,
            query_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn_width=self.ffn,
            max_positions=self.context,
        )

    def initial_state(self, vocab_size: int) -> State:
        """See `initial_state`."""
        return initial_state(self, vocab_size)

    def train_block(self, vocab_size: int) -> Callable[[State, Any], tuple[State, Array]]:
        """See `train_block`."""
        return train_block(self, vocab_size)

    def recut_share(self, step: int) -> float:
        """The share of words that are cut anew from `step` on."""
        left = (self.recut_until - step / self.steps) / (self.recut_until - self.recut_from)
        return self.recut * min(1.0, max(0.0, left))


def initial_state(settings: Settings, vocab_size: int) -> State:
    """The state at step 0, a function of the settings' seed."""
    return begin(settings, init_params(settings.config(vocab_size), jax.random.key(settings.seed), jnp.float32))


def loss(model: Model, tokens: Array) -> Array:
    """Mean cross-entropy in nats per token; `tokens[B, S + 1]` int32, the first of each row is input only."""
    logits = forward(model, tokens[:, :-1])  # [B, S, V]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@cache
def train_block(
    settings: Settings, vocab_size: int, loss: Callable[[Model, Any], Array] = loss
) -> Callable[[State, Any], tuple[State, Array]]:
    """The compiled `(state, batches) -> (state, losses [steps])`; donates the state.

    `batches` are arrays `[steps, batch, ...]`, and `loss` is a mean over the rows that it is given of each.
    """
    config = settings.config(vocab_size)
    micros = settings.batch // settings.micro

    def noisy_loss(params: Params, key: Array, batch: Any) -> Array:
        if not settings.dropout:  # random bits that drop nothing cost a tenth of a step
            return loss(decoder(config, params), batch)
        return loss(dropping(config, params, key, settings.dropout), batch)

    def step(state: State, batch: Any) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), state.step)

        def micro(total: Params, part: tuple[Array, Any]) -> tuple[Params, Array]:
            value, grads = jax.value_and_grad(noisy_loss)(state.params, jax.random.fold_in(key, part[0]), part[1])
            return jax.tree.map(jnp.add, total, grads), value

        rows = jax.tree.map(lambda x: x.reshape(micros, settings.micro, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, values = jax.lax.scan(micro, zeros, (jnp.arange(micros), rows))
        grads = jax.tree.map(lambda g: g / micros, grads)
        return advance(settings, state, grads), jnp.mean(values)

    @partial(jax.jit, donate_argnums=0)
    def run(state: State, batches: Any) -> tuple[State, Array]:
        return jax.lax.scan(step, state, batches)

    return run


__all__ = ["Settings", "initial_state", "loss", "train_block"]
