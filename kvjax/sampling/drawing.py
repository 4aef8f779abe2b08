"""How a token is chosen of filtered logits: the largest, or a draw; and the random keys of rows and positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax import struct
from kvjax.errors import InputError
from kvjax.sampling.contract import Text
from kvjax.types import Array


@struct.node
class Greedy(struct.Value):
    """Filters in order, then the first of the largest logits.

    Args:
        filters: see `Filter`.
    """

    filters: tuple[Any, ...] = ()

    def __call__(self, logits: Array, keys: Array, text: Text | None = None) -> Array:
        """See `Sampler`."""
        return chosen(self.scores(logits, keys, text))

    def scores(self, logits: Array, keys: Array, text: Text | None = None) -> Array:
        """`[B, V]`, of which the largest is chosen."""
        return filtered(self.filters, logits, text)


@struct.node
class Chain(struct.Value):
    """Filters in order, then a draw from the softmax of what is left.

    Args:
        filters: see `Filter`.
    """

    filters: tuple[Any, ...]

    def __call__(self, logits: Array, keys: Array, text: Text | None = None) -> Array:
        """See `Sampler`."""
        return chosen(self.scores(logits, keys, text))

    def scores(self, logits: Array, keys: Array, text: Text | None = None) -> Array:
        """`[B, V]`, of which the largest is chosen: the filtered logits with the noise of a draw."""
        return noisy(self.law(logits, text), keys)

    def law(self, logits: Array, text: Text | None = None) -> Array:
        """`[B, V]`, logits of the distribution that tokens are drawn from."""
        return filtered(self.filters, logits, text)


@struct.node
class Filtered(struct.Value):
    """A sampler of any kind after some filters: those that belong to a model.

    Args:
        filters: see `Filter`.
        sampler: sees what they leave.
    """

    filters: tuple[Any, ...]
    sampler: Any

    def __call__(self, logits: Array, keys: Array, text: Text | None = None) -> Array:
        """See `Sampler`."""
        return self.sampler(filtered(self.filters, logits, text), keys, text)

    def law(self, logits: Array, text: Text | None = None) -> Array:
        """See `Chain`; of one that draws."""
        return self.sampler.law(filtered(self.filters, logits, text), text)


def filtered(filters: tuple[Any, ...], logits: Array, text: Text | None) -> Array:
    """`[B, V]`, after all filters in order.

    Raises:
        InputError: a filter gives something of another shape, which could be broadcast to other rows.
    """
    for each in filters:
        found = each(logits, text)
        if getattr(found, "shape", None) != logits.shape or not jnp.issubdtype(found.dtype, jnp.floating):
            raise InputError(f"sampling: a filter must give logits {list(logits.shape)}, not {_seen(found)}")
        logits = found
    return logits


def drawn(sampler: Any, logits: Array, keys: Array, text: Text) -> Array:
    """`[B]` int32, what a sampler of any kind chooses; see `Sampler`.

    Raises:
        InputError: it gives something of another shape, or no whole numbers.
    """
    tokens = sampler(logits, keys, text)
    if getattr(tokens, "shape", None) != logits.shape[:1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"sampling: a sampler must give ids [{logits.shape[0]}], not {_seen(tokens)}")
    return tokens.astype(jnp.int32)


def _seen(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)


def greedy(*filters: Any) -> Greedy:
    """The most probable token, after filters if there are any: `greedy(repetition_penalty(1.2))`."""
    return Greedy(tuple(own(each) for each in filters))


def chain(*filters: Any) -> Chain:
    """Filters in order, then a draw: `chain(temperature(0.8), top_p(0.95))`; `chain()` samples the model as it is.

    A filter of one's own is a module-level function `(logits, text) -> logits`, or a `jax.tree_util.Partial` of one
    with arrays; a closure over arrays would bake them into the program.
    """
    return Chain(tuple(own(each) for each in filters))


def own(each: Any) -> Any:
    """A filter as a pytree.

    Raises:
        InputError: a sampler, or nothing that can be called.
    """
    if not isinstance(each, Greedy | Chain | Filtered) and callable(each):
        return jax.tree_util.Partial(each) if jax.tree_util.all_leaves([each]) else each
    raise InputError(f"sampling: {each!r} is no filter, such as sampling.temperature(0.8)")


def checked(sampler: Any) -> Any:
    """A sampler as a pytree, greedy for None; a function of one's own `(logits, keys, text) -> tokens` as it is.

    Raises:
        InputError: a filter alone, or something that cannot be called.
    """
    if sampler is None:
        return Greedy()
    if not callable(sampler):
        raise InputError(f"sampler: {sampler!r} cannot be called; give one such as sampling.greedy()")
    if type(sampler).__module__.startswith(__package__) and not isinstance(sampler, Greedy | Chain | Filtered):
        raise InputError(f"sampler: {type(sampler).__name__} is a filter; wrap it, as in sampling.chain(…)")
    return jax.tree_util.Partial(sampler) if jax.tree_util.all_leaves([sampler]) else sampler


def draws(sampler: Any) -> bool:
    """Whether the sampler draws from a distribution that it can tell (`law`), which a greedy one does not."""
    return draws(sampler.sampler) if isinstance(sampler, Filtered) else hasattr(sampler, "law")


def noisy(logits: Array, keys: Array) -> Array:
    """`[B, V]`, whose largest is a draw from the softmax of `logits[B, V]`; one of `keys[B]` a row."""
    # Gumbel-max (Maddison et al. 2014, 1411.0030), one key a row: a row's draw does not see its neighbours.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return jnp.where(jnp.isneginf(logits), -jnp.inf, logits + noise)


def largest(logits: Array) -> Array:
    """`[B]` int32, index of the first of the largest of `logits[B, V]`; faster on CPU than `argmax`. 0 on NaN."""
    return _first(logits, jnp.max(logits, axis=1))


def _first(logits: Array, top: Array) -> Array:
    """Where `top[B]` stands first in `logits[B, V]`; 0 where it does not."""
    v = logits.shape[1]
    index = jnp.arange(v, dtype=jnp.int32)[None, :]
    found = jnp.min(jnp.where(logits == top[:, None], index, v), axis=1)
    return jnp.where(found < v, found, 0)


def chosen(scores: Array) -> Array:
    """`[B]` int32, as `largest`, and -1 where all of `scores[B, V]` are -inf, or one is NaN: no filter may make one."""
    top = jnp.max(scores, axis=1)  # NaN if one is
    return jnp.where(jnp.isneginf(top) | jnp.isnan(top), -1, _first(scores, top))


def row_keys(seeds: Array) -> Array:
    """`[B]` random keys from `[B]` uint32 seeds: a seed means the same in any row of any batch."""
    return jax.vmap(jax.random.key)(seeds)


def position_keys(keys: Array, positions: Array) -> Array:
    """`[B]` keys for the tokens at `positions[B]`: `fold_in(row_key, absolute position)`."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


__all__ = [
    "Greedy",
    "Chain",
    "Filtered",
    "filtered",
    "drawn",
    "greedy",
    "chain",
    "own",
    "checked",
    "draws",
    "noisy",
    "largest",
    "chosen",
    "row_keys",
    "position_keys",
]
