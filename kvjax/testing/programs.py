"""Checks of the contract suite over random sequences of operations: against no cache, and a NumPy model of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.codecs import Store
from kvjax.caches.cross import Source
from kvjax.loops.decode import prefill, step
from kvjax.model import Model, attend, cross_attend
from kvjax.ops.attention import EMPTY, Absorb
from kvjax.testing.cases import (
    BATCH,
    CAPACITY,
    SOURCES,
    VOCAB,
    Case,
    equal,
    expect,
    prompt_ids,
    read_of_sources,
)

Choose = Callable[[int, int], int]
"""`choose(low, high)` is a whole number, both ends included: a random generator's, or hypothesis's."""

OPERATIONS = ("extend", "step", "rewind", "take", "reorder", "fork", "resize", "insert", "release", "look")
LENGTHS = np.array([4, 9, 12])
"""Rows of the other cache that `insert` takes rows from."""


def seeded(seed: int) -> Choose:
    """Choices of a random generator."""
    draw = np.random.default_rng(seed)
    return lambda low, high: int(draw.integers(low, high + 1))


def program(choose: Choose, count: int, slack: int | None, refuses: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Legal operations with their arguments; lengths are followed so that nothing is refused.

    Args:
        choose: draws numbers.
        count: of operations.
        slack: tokens that a row may be rewound; None is any number.
        refuses: operations that the plan cannot do.
    """
    lengths, written = np.zeros(BATCH, int), np.zeros(BATCH, int)
    names = [name for name in OPERATIONS if name not in refuses]
    for _ in range(count):
        name = names[choose(0, len(names) - 1)]
        if name == "extend":
            valid = np.array([min(choose(0, 16), CAPACITY - n) for n in lengths])
            yield name, (np.array([[choose(0, VOCAB - 1) for _ in range(16)] for _ in range(BATCH)]), valid)
            lengths = lengths + valid
        elif name in ("step", "look"):
            if (lengths == CAPACITY).any():
                continue
            yield name, np.array([choose(0, VOCAB - 1) for _ in range(BATCH)])
            lengths = lengths + (name == "step")
        elif name == "rewind":
            least = np.zeros(BATCH, int) if slack is None else np.maximum(written - slack, 0)
            lengths = np.array([choose(min(low, high), high) for low, high in zip(least, lengths, strict=True)])
            yield name, lengths
        elif name == "insert":
            row, source = choose(0, BATCH - 1), choose(0, BATCH - 1)
            yield name, np.array([row, source])
            lengths[row] = written[row] = LENGTHS[source]
        elif name == "release":
            row = choose(0, BATCH - 1)
            yield name, np.array([row])
            lengths[row] = written[row] = 0
        elif name == "resize":
            yield name, np.zeros(0, int)
        else:
            rows = np.array([choose(0, BATCH - 1) for _ in range(BATCH)])
            yield name, rows
            lengths, written = lengths[rows], written[rows]
        written = np.maximum(written, lengths)


def perform(cache: Cache, name: str, argument: Any, other: Cache) -> Cache:
    """The cache after an operation that feeds nothing; as shapes do not depend on the argument, also under `jit`."""
    if name == "insert":  # row, and row of the other cache
        return cache.insert(argument[:1], other.take(argument[1:]))
    if name == "resize":
        return cache.resize(cache.capacity + 32).resize(cache.capacity)
    if name == "fork":
        return cache.fork(2).take(2 * argument + 1)
    if name == "join":
        return cache.join(other).take(argument)
    if name == "keep":  # of the last two tokens, or of the last two places of a row that has fewer
        longer = jnp.maximum(cache.lengths, 2)
        return cache.replace(lengths=longer).keep(longer - 2, jnp.array([[0, 1]] * BATCH), argument)
    return getattr(cache, name)(argument)


operate = jax.jit(perform, static_argnames="name")
"""`perform`, compiled once for each operation and plan."""


# ---------------------------------------------------------------- against no cache


def any_program(case: Case, seeds: tuple[int, ...] = (0,), count: int = 16) -> None:
    """Any sequence of operations gives the logits that it gives without a cache."""
    if not case.exact:
        return
    for seed in seeds:
        wanted = _reference(case.of_reference(), seed, count, case.slack)
        for want, got in zip(wanted, _play(case, seed, count, case.slack), strict=True):
            size = float(np.abs(want[2]).max())
            # 1e-5: the float32 bound that parity with other implementations is held to; 1e-12 in float64
            limit = (1e-12 if want[2].dtype == np.float64 else 1e-5) * max(size, 1e-9)
            expect((want[1] == got[1]).all(), f"seed {seed}, {want[0]}: lengths {got[1]}, not {want[1]}")
            worst = float(np.abs(want[2] - got[2]).max())
            expect(worst <= limit, f"seed {seed}, {want[0]}: logits differ by {worst:.2g}, the largest is {size:.3g}")


@functools.cache
def _reference(case: Case, seed: int, count: int, slack: int | None) -> list[Any]:
    return list(_play(case, seed, count, slack))


def _play(case: Case, seed: int, count: int, slack: int | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Operation, lengths and logits after every operation that gives any."""
    model, cache = case.model, case.empty()
    _, other = prefill(model, case.empty(), prompt_ids(7), LENGTHS)
    for name, argument in program(seeded(seed), count, slack, case.refuses):
        if name == "extend":
            logits, cache = prefill(model, cache, *argument)
            yield name, np.asarray(cache.lengths), np.where(argument[1][:, None] > 0, logits, 0)
        elif name in ("step", "look"):  # a look is a step on another branch
            logits, after = step(model, cache, argument)
            cache = after if name == "step" else cache
            yield name, np.asarray(after.lengths), np.asarray(logits)
        else:
            cache = operate(cache, name, jnp.asarray(argument, jnp.int32), other)
    cache.check()


# ---------------------------------------------------------------- against a NumPy model of a cache


_SPELL = np.array([[1, 0, 0, 1, 0.25, 0, 0, 0.25], [0, 1, 0, -1, 0, 0.25, 0, -0.25], [0, 0, 1, 0, 0, 0, 0.25, 0]])
_KEYS = np.stack([_SPELL, -_SPELL], axis=1).astype(np.float32)  # [3, K, D]; sums of these are exact
_VALUES = _KEYS[..., ::-1] / 2


def _spelled(params: Any, config: int, cache: Any, tokens: Any, valid: Any) -> tuple[Any, Any]:
    """A model of `config` layers whose keys and values spell out token, position and layer."""
    logits = jnp.zeros((*tokens.shape, VOCAB)) + params
    for layer in range(config):
        h = jnp.stack([tokens, cache.positions, jnp.full_like(tokens, layer)], axis=-1).astype(logits.dtype)
        cache = cache.record(max(layer - 1, 0), "after_ffn" if layer else "embedding", h)
        q = jnp.ones((*tokens.shape, 4, 8), logits.dtype)
        out, cache = attend(cache, layer, q=q, kv=_spell, h=h, absorb=_absorb)
        if SOURCE in cache.shared:
            logits = logits + cross_attend(cache, layer, q=q, kv=_spell, kv_heads=2, absorb=_absorb)[:, :, 0, :1]
        logits = logits + out[:, :, 0, :1]
    return logits, cache.record(config - 1, "after_ffn", h)


def _spell(h: Any) -> tuple[Any, Any]:
    """`h [B, S, 3]`: token, position, layer, to keys and values `[B, S, 2 heads, 8]`, as wide as the tiny models'."""
    return tuple((h @ w.reshape(3, -1)).reshape(*h.shape[:2], 2, 8) for w in (_KEYS, _VALUES))  # type: ignore[return-value]


def _absorb(h: Any) -> tuple[Absorb, None]:
    keys, values = jnp.asarray(_KEYS, h.dtype), jnp.asarray(_VALUES, h.dtype)
    return Absorb(keys.transpose(1, 2, 0), values.transpose(1, 0, 2)), None


def _spelled_source(rows: int) -> Source:
    places = np.stack(np.broadcast_arrays(np.arange(rows)[:, None], np.arange(16)[None, :], 5), axis=-1)
    lengths = jnp.asarray(SOURCES[:rows])
    live = jnp.arange(16)[None, :, None] < lengths[:, None, None]
    return Source(jnp.where(live, places.astype(np.float32), 0), lengths, jnp.zeros_like(lengths))


class Books:
    """A plain model of a cache: for each layer and row a list, by position, of key and value as stored; and what is
    kept of the source that each row reads."""

    def __init__(self, layers: int, error: float, sources: list[Any]) -> None:
        self.error, self.sources = error, list(sources)
        self.rows: list[list[list[tuple[Any, Any, bool]]]] = [[[] for _ in range(BATCH)] for _ in range(layers)]
        self.tokens: list[list[int]] = [[] for _ in range(BATCH)]

    def extend(self, cache: Cache, tokens: np.ndarray, valid: np.ndarray) -> None:
        """Takes in new tokens: what the cache now holds for them must be what the model spells, and is noted."""
        for row, n in enumerate(valid):
            start = len(self.tokens[row])
            self.tokens[row] += tokens[row, :n].tolist()
            for layer, rows in enumerate(self.rows):
                h = np.array([[t, start + i, layer] for i, t in enumerate(tokens[row, :n])], np.float32).reshape(
                    1, n, 3
                )
                (keys, values), (h,) = (x[0] for x in _spell(h)), h
                held = _held(cache, layer, row)
                for i in range(n):
                    made, sure = (keys[i], values[i]), start + i in held
                    found = held.get(start + i, made)
                    # Some keep what keys and values are made from instead, one head of it.
                    made = made if found[0].shape == made[0].shape else (h[i][None], h[i][None])
                    for mine, theirs in zip(made, found, strict=True):
                        size = _size(cache.layers[layer], mine) * self.error
                        what = f"layer {layer}, row {row}, position {start + i}: {theirs.tolist()}, not {mine.tolist()}"
                        expect((np.abs(mine - theirs) <= size).all(), what)
                    rows[row].append((*found, sure))  # unsure: never seen as stored, a chunk was longer than a window

    def perform(self, name: str, argument: Any, other: Books) -> None:
        """The same operation on lists."""
        mine: list[Any] = [*self.rows, self.tokens]
        theirs: list[Any] = [*other.rows, other.tokens]
        for lists, others in zip(mine, theirs, strict=True):
            rows = list(lists)
            if name == "rewind":
                rows = [row[:n] for row, n in zip(rows, argument, strict=True)]
            elif name == "insert":
                rows[argument[0]] = others[argument[1]]
            elif name == "release":
                rows[argument[0]] = []
            elif name != "resize":
                rows = [rows[row] for row in argument]
            lists[:] = [list(row) for row in rows]
        if name == "insert":
            self.sources[argument[0]] = other.sources[argument[1]]
        elif name not in ("rewind", "release", "resize"):
            self.sources = [self.sources[row] for row in argument]

    def compare(self, cache: Cache, what: str) -> None:
        """Lengths, tokens, positions and what live slots hold, bit by bit."""
        lengths, fed = np.asarray(cache.lengths), np.asarray(cache.tokens)
        equal(read_of_sources(cache), self.sources, f"{what}: what the rows read of their sources")
        for row, tokens in enumerate(self.tokens):
            size = len(tokens)
            expect(lengths[row] == size, f"{what}: row {row} has length {lengths[row]}, not {size}")
            expect(fed[row, :size].tolist() == tokens, f"{what}: tokens of row {row}")
            for layer, rows in enumerate(self.rows):
                if cache.layers[layer].replays:
                    continue
                held = _held(cache, layer, row)
                window, sinks = _seen(cache.layers[layer])
                want = [p for p in range(size) if window is None or p >= size - window or p < sinks]
                expect(sorted(held) == want, f"{what}: layer {layer}, row {row} holds {sorted(held)}, not {want}")
                # Where a group of tokens is coded once it is old, what is stored of a token depends on the length.
                node = cache.layers[layer]
                for at, found in held.items():
                    *noted, sure = rows[row][at]
                    error = 0.0 if sure and not _coded_late(node) else self.error
                    good = [np.abs(a - b).max() <= error * _size(node, b) for a, b in zip(found, noted, strict=True)]
                    expect(all(good), f"{what}: layer {layer}, row {row}, position {at} changed")


def _seen(node: Any) -> tuple[int | None, int]:
    """The window of a node, or of one inside it, and how many sinks are seen."""
    inside = [getattr(node, name) for name in ("recent", "inner", "suffix") if hasattr(node, name)]
    window, sinks = _seen(inside[0]) if inside else (None, 0)
    return getattr(node, "window", None) or window, max(getattr(node, "sinks", 0) or 0, sinks)


def _size(node: Any, x: np.ndarray) -> float:
    """What an error is measured against: the largest number of a token, or that of a group of any tokens."""
    return max(float(np.abs(x).max()), float(VOCAB) if _coded_late(node) else 0.0)


def _coded_late(node: Any) -> bool:
    stores = jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, Store))
    return any(isinstance(store, Store) and store.max_rewind is not None for store in stores)


def _held(cache: Cache, layer: int, row: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Key and value `[K, D]` by position, of live slots."""
    node = cache.layers[layer]
    if node.replays:
        return {}
    keys, values, at = (np.asarray(x)[row] for x in node.contents(cache.lengths, cache.shared))
    live = np.flatnonzero(at != EMPTY)
    expect(len(set(at[live].tolist())) == len(live), f"layer {layer}, row {row} holds a position twice")
    return {int(at[slot]): (keys[:, slot], values[:, slot]) for slot in live}


def bookkeeping(case: Case, choose: Choose | None = None, count: int = 24) -> None:
    """Any sequence of operations leaves what a NumPy model of a cache says: positions, keys, values, as stored."""
    if not case.keeps:
        return
    layers = case.config.num_layers
    model = Model(jnp.zeros(()), layers, _spelled)
    source = None if case.config.encoder is None else _spelled_source(BATCH // case.share)
    empty = case.empty_for(model, source=source)
    error = 0.0 if case.exact else 0.1  # half a step of int4 is 1 / 14 of the largest; here only bookkeeping is meant
    sources = read_of_sources(empty)
    if source is not None:
        for row, found in enumerate(sources):
            _check_source(found, np.asarray(source.states)[row // case.share, : len(found[0][0])], layers, error)
    ids, other_books = prompt_ids(7), Books(layers, error, sources)
    _, other = prefill(model, empty, ids, LENGTHS)
    other_books.extend(other, ids, LENGTHS)
    cache, books = empty, Books(layers, error, sources)
    for name, argument in program(choose or seeded(0), count, case.slack, case.refuses):
        if name == "extend":
            _, cache = prefill(model, cache, *argument)
            books.extend(cache, *argument)
        elif name == "step":
            _, cache = step(model, cache, argument)
            books.extend(cache, argument[:, None], np.ones(BATCH, int))
        elif name == "look":
            step(model, cache, argument)
        else:
            cache = operate(cache, name, jnp.asarray(argument, jnp.int32), other)
            expect(not np.asarray(cache.flags).any(), f"{name} set the flags {cache.flags}")
            books.perform(name, argument, other_books)
        books.compare(cache, name)


def _check_source(found: list[np.ndarray], states: np.ndarray, layers: int, error: float) -> None:
    """What is kept of one source is its states, or every layer's keys and then values of them."""
    made = [np.asarray(x)[0].swapaxes(0, 1) for x in _spell(states[None])]
    wanted = [states[None]] if len(found) == 1 else [x for x in made for _ in range(layers)]
    for mine, theirs in zip(wanted, found, strict=True):
        good = mine.shape == theirs.shape and np.abs(mine - theirs).max() <= error * np.abs(mine).max()
        expect(good, f"of a source is kept {theirs.tolist()}, not {mine.tolist()}")


__all__ = ["any_program", "bookkeeping", "program", "perform", "operate", "seeded", "Books", "Choose", "OPERATIONS"]
