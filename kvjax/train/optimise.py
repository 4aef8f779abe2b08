"""One optimiser step, whatever the model: AdamW with a warm-up and a cosine, and a moving average of the parameters."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from kvjax.types import Array, Params


class Rates(Protocol):
    """What the settings of a run say of its optimiser."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def lr(self) -> float:
        """The highest rate, after the warm-up."""

    @property
    def warmup(self) -> int:
        """Steps until then."""

    @property
    def final_lr(self) -> float:
        """The last rate, as a share of `lr`."""

    @property
    def weight_decay(self) -> float:
        """Of matrices."""

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""

    @property
    def clip(self) -> float:
        """Bound on the gradient's global norm."""

    @property
    def ema(self) -> float:
        """Decay of the moving average."""


class State(NamedTuple):
    """What a step reads and writes; with the settings and the text it determines the rest of the run."""

    params: Params
    opt: Any
    ema: Params
    step: Array


def optimizer(rates: Rates) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine, clipped; norm scales do not decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, rates.lr, rates.warmup, rates.steps, rates.lr * rates.final_lr)
    matrices = partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(rates.clip),
        optax.adamw(rate, b1=0.9, b2=rates.beta2, weight_decay=rates.weight_decay, mask=matrices),
    )


def begin(rates: Rates, params: Params) -> State:
    """The state at step 0."""
    return State(params, optimizer(rates).init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def advance(rates: Rates, state: State, grads: Params) -> State:
    """The state after one step."""
    updates, opt = optimizer(rates).update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    # A fixed decay would keep the random start for a thousand steps.
    decay = jnp.minimum(rates.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    return State(params, opt, ema, state.step + 1)


__all__ = ["Rates", "State", "optimizer", "begin", "advance"]
