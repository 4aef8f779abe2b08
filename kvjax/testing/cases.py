"""What the contract suite runs on: a case, tiny models, and prompts; few shapes, so that programs are shared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import caches, sampling
from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.codecs import Store
from kvjax.caches.cross import Source
from kvjax.caching import encode, init_cache
from kvjax.config import Config, NormOrder
from kvjax.loops.decode import prefill, step
from kvjax.model import Model, decoder
from kvjax.ops import activations
from kvjax.ops.attention import EMPTY
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned, Relative, Sinusoidal
from kvjax.params import init_params
from kvjax.types import Array

VOCAB, WINDOW, BATCH, CAPACITY, STEPS = 96, 6, 3, 96, 12
PROMPTS = np.array([16, 7, 1], np.int32)
"""Lengths of a ragged batch of prompts: a whole bucket, a part of one, a single token."""
SOURCES = np.array([11, 1, 16], np.int32)
"""Lengths of source texts: a part of a bucket, a single token, a whole bucket."""

FULL = Config(VOCAB, 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, tied=False)
WINDOWED = dataclasses.replace(FULL, windows=(WINDOW, WINDOW))
MIXED = dataclasses.replace(FULL, windows=(WINDOW, None))
RELATIVE = dataclasses.replace(
    MIXED,
    positions=Relative(8, 16),
    encoder=Config(VOCAB, 1, 32, 4, 2, 8, 40, positions=Relative(8, 16, bidirectional=True)),
)
"""An encoder and a decoder that count distances in buckets, as T5 does, with norms before the sub-layers."""
POSTNORM = Config(
    VOCAB,
    1,
    32,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_width=24,
    max_positions=CAPACITY,
    norm=LayerNorm(),
    norm_order=NormOrder.POST,
    activation=activations.relu,
    gated=False,
    positions=Learned(CAPACITY),
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=False,
    encoder=Config(VOCAB, 1, 24, 3, 1, 8, 40, max_positions=16, norm=LayerNorm(), positions=Sinusoidal(), tied=False),
)
"""Tables of positions, norms after the sub-layers, biases; its encoder has another width, waves, a table of its own and
16 positions."""
SAMPLER = sampling.chain(sampling.temperature(0.9))


@functools.cache
def tiny(config: Config = FULL, seed: int = 0, dtype: Any = None) -> Model:
    """A random decoder, in float32, or float64 where JAX has it enabled.

    Its weights are 20 times larger than at initialisation: otherwise it repeats a few tokens.
    """
    params = init_params(config, jax.random.key(seed), jnp.result_type(float) if dtype is None else dtype)
    return decoder(config, jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, params))


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan, a model that it is right on, and what it promises there.

    Args:
        name: for people.
        plan: under test.
        config: of a tiny random model of this library.
        reference: the plan that computes the same from scratch.
        keeps: whether there are keys and values to look at.
        slack: tokens that a row can be rewound; None is any number.
        exact: whether it gives the tokens of the reference; else only its bookkeeping is promised.
        refuses: operations that it cannot do at all, each a row of `kvjax.testing.REFUSED`.
        begin: `(model, plan, batch, capacity) -> Cache` for plans whose caches do not begin empty; None is
            `init_cache`.
        scarce: for kinds whose layers share something that can run out, a plan that has enough for the prompts of the
            suite, 16, 7 and 1 tokens, and not for a token more in the first row.
        error: of an approximation, how far its logits may be from those of the reference, root mean square.
        cross: for a model with an encoder, what is kept of the source; None is `caches.cross()`. The reference projects
            it again at every call.
        share: for such a model, rows that read one source; a divisor of 3.
    """

    name: str
    plan: Any
    config: Config = MIXED
    reference: Any = caches.recompute()
    keeps: bool = True
    slack: int | None = None
    exact: bool = True
    refuses: tuple[str, ...] = ()
    begin: Callable[..., Cache] | None = None
    scarce: Any = None
    error: float = 0.0
    cross: Any = None
    share: int = 1

    @property
    def model(self) -> Model:
        """The model, made once."""
        return tiny(self.config)

    def seeded(self, seed: int) -> Model:
        """The model with other weights."""
        return tiny(self.config, seed)

    def empty(self, batch: int = BATCH, capacity: int = CAPACITY) -> Cache:
        """A cache that nothing was fed to."""
        return self.empty_for(self.model, batch, capacity)

    def empty_for(
        self, model: Model, batch: int = BATCH, capacity: int = CAPACITY, source: Source | None = None
    ) -> Cache:
        """A cache for another model with as many layers, and for another source."""
        if self.begin is not None:
            return self.begin(model, self.plan, batch, capacity)
        if source is None:
            source = self.source(model, batch)
        cross = None if source is None else self.cross
        return init_cache(model, self.plan, batch=batch, capacity=capacity, source=source, cross=cross)

    def source(self, model: Model, batch: int = BATCH) -> Source | None:
        """What the rows attend to: ragged, padded with tokens that mean nothing; None without an encoder."""
        if model.encode is None:
            return None
        rows = batch // self.share
        return encode(model, source_ids(rows), np.resize(SOURCES, rows))

    def filled(self, seed: int = 0, valid: Any = PROMPTS) -> tuple[Array, Cache]:
        """Logits and a cache after a ragged prefill."""
        return prefill(self.model, self.empty(len(valid)), prompt_ids(seed, len(valid)), valid)

    def fed(self, lengths: Any) -> tuple[Array, Cache]:
        """Logits and a cache with rows of any lengths, fed in chunks of 16 so that no further program is compiled."""
        return _fed(self.model, self.empty(len(lengths)), np.asarray(lengths))

    def but(self, plan: Any) -> Case:
        """The same with another plan."""
        return dataclasses.replace(self, plan=plan)

    def of_reference(self) -> Case:
        """The reference as a case: the same for all cases that share it, so that what it gives is computed once."""
        cross = None if self.config.encoder is None else caches.encoder_output()
        same: dict[str, Any] = {"refuses": self.refuses, "begin": self.begin, "cross": cross, "share": self.share}
        return Case("reference", self.reference, self.config, self.reference, **same)


def prompt_ids(seed: int = 0, batch: int = BATCH, length: int = 16, vocab: int = VOCAB) -> np.ndarray:
    """`[batch, length]` int32, random."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def source_ids(rows: int, seed: int = 11) -> np.ndarray:
    """`[rows, 16]` int32, random."""
    return prompt_ids(seed, rows)


def _fed(model: Model, cache: Cache, lengths: np.ndarray) -> tuple[Array, Cache]:
    ids, at = prompt_ids(5, len(lengths), cache.capacity), 0
    logits = np.zeros((len(lengths), VOCAB), np.float32)
    while (valid := np.clip(lengths - at, 0, 16)).any():
        new, cache = prefill(model, cache, ids[:, at : at + 16], valid)
        logits, at = np.where(valid[:, None] > 0, new, logits), at + 16
    return jnp.asarray(logits), cache


def steps_over(model: Model, cache: Cache, tokens: Any) -> tuple[np.ndarray, Cache]:
    """Feeds `tokens[n, B]` step by step: logits `[n, B, V]` and the cache."""
    found = []
    for each in tokens:
        logits, cache = step(model, cache, each)
        found.append(np.asarray(logits))
    return np.array(found), cache


# ---------------------------------------------------------------- looking and comparing


def expect(good: Any, what: str) -> None:
    """Raises AssertionError with `what` unless `good`; unlike `assert` also under `python -O`."""
    if not bool(good):
        raise AssertionError(what)


def bits(tree: Any) -> list[bytes]:
    """Every leaf as bytes."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def equal(a: Any, b: Any, what: str) -> None:
    """Raises AssertionError unless two arrays, or trees of them, are equal bit by bit."""
    expect(bits(a) == bits(b), f"{what}: not equal")


def kept(cache: Cache) -> dict[str, np.ndarray]:
    """What live slots hold, in the order of the text: `"keys 0 2"` of layer 0 and row 2 is `[K, n, D]`."""
    found = {}
    for layer, node in enumerate(cache.layers):
        if node.replays:
            continue
        keys, values, places = (np.asarray(x) for x in node.contents(cache.lengths, cache.shared))
        for row, at in enumerate(places):
            order = np.argsort(at, kind="stable")[: int((at != EMPTY).sum())]
            found[f"positions {layer} {row}"] = at[order]
            found[f"keys {layer} {row}"], found[f"values {layer} {row}"] = keys[row][:, order], values[row][:, order]
    return found


def read_of_sources(cache: Cache) -> list[Any]:
    """What is kept of the source that each row reads, as lists of `[K, n, D]`; empty lists without one."""
    entry = cache.shared.get(SOURCE)
    if entry is None:
        return [[]] * cache.batch
    stores = jax.tree.leaves(entry, is_leaf=lambda x: isinstance(x, Store))
    every = [np.asarray(x.unpacked(entry.lengths)) for x in stores if isinstance(x, Store)]
    return [[x[i, :, :n] for x in every] for i, n in enumerate(entry.lengths.tolist()) for _ in range(entry.share)]


def slots(cache: Cache, row: int) -> list[bytes]:
    """What all slots of a row hold, whether live or not."""
    every = [node.contents(cache.lengths, cache.shared)[:2] for node in cache.layers if not node.replays]
    return [np.asarray(x)[row].tobytes() for pair in every for x in pair]


def same(cache: Cache, other: Cache, what: str, row: int | None = None, other_row: int | None = None) -> None:
    """Raises AssertionError unless lengths, tokens, and what live slots hold are equal bit by bit.

    Args:
        cache, other: to compare.
        what: for the message.
        row, other_row: only this row, which is `other_row` in the other cache; None compares all.
    """
    pairs = (
        [(row, row if other_row is None else other_row)] if row is not None else [(r, r) for r in range(cache.batch)]
    )
    expect(row is not None or cache.batch == other.batch, f"{what}: {cache.batch} rows for {other.batch}")
    mine, theirs = kept(cache), kept(other)
    sources = read_of_sources(cache), read_of_sources(other)
    tokens, others, sizes, wanted = (np.asarray(x) for x in (cache.tokens, other.tokens, cache.lengths, other.lengths))
    for a, b in pairs:
        size, want = int(sizes[a]), int(wanted[b])
        expect(size == want, f"{what}: row {a} has length {size}, not {want}")
        equal(tokens[a, :size], others[b, :size], f"{what}: tokens of row {a}")
        equal(sources[0][a], sources[1][b], f"{what}: the source of row {a}")
        for layer in range(len(cache.layers)):
            for name in ("positions", "keys", "values"):
                if f"{name} {layer} {a}" in mine or f"{name} {layer} {b}" in theirs:
                    ours = mine[f"{name} {layer} {a}"]
                    equal(ours, theirs[f"{name} {layer} {b}"], f"{what}: {name} of layer {layer}, row {a}")


__all__ = [
    "Case",
    "tiny",
    "prompt_ids",
    "source_ids",
    "read_of_sources",
    "steps_over",
    "expect",
    "bits",
    "equal",
    "kept",
    "slots",
    "same",
    "FULL",
    "WINDOWED",
    "MIXED",
    "RELATIVE",
    "POSTNORM",
    "WINDOW",
    "VOCAB",
    "BATCH",
    "CAPACITY",
    "STEPS",
    "PROMPTS",
    "SOURCES",
    "SAMPLER",
]
