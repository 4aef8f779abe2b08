"""The seven hard cases of the contract, each against its reference, and each with a broken twin that must fail.

A case feeds ragged rows in uneven chunks, decodes in a scan, goes back, changes the rows, grows, and decodes again, for
the kind under test and for its reference. What it returns is the largest difference of logits over the largest logit,
by name; tokens that differ count as 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import contract_kinds as kinds
import jax
import jax.numpy as jnp
import numpy as np
from contract_models import naive_sinks

import kvjax
from kvjax import caches
from kvjax.caches import codecs, storage
from kvjax.caches.base import Cache, Project, Span, Tree
from kvjax.caches.cross import Encoded, EncodedKind, Source
from kvjax.caches.flags import PAGES
from kvjax.caches.pages import Pages
from kvjax.caches.shared_prefix import SharedPrefix
from kvjax.config import Config
from kvjax.loops.feed import feed, finish
from kvjax.model import Model
from kvjax.ops.attention import EMPTY
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned
from kvjax.params import init_params
from kvjax.types import Array

EXACT = 1e-5
"""Largest difference over the largest logit that float32 may leave; sums are taken in another order."""

BROKEN = 1e-3
"""What a negative control must exceed."""

BACK, STEPS = 2, 5
PROMPTS = (23, 17)
CHUNKS = (13, 8, 2)
CAPACITY = 48
WINDOW = 8

LLAMA = Config(61, 2, 32, 4, 2, 8, 64)
LOCAL = dataclasses.replace(LLAMA, windows=(WINDOW, WINDOW))
GPT2 = dataclasses.replace(LLAMA, norm=LayerNorm(), positions=Learned(CAPACITY), gated=False, qkv_bias=True)
PLAIN = dataclasses.replace(LLAMA, positions=Learned(CAPACITY))


def model(config: Config, seed: int = 0) -> Model:
    """Random parameters, far enough from their initial values that gains, biases and attention matter."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return kvjax.decoder(
        config,
        jax.tree.unflatten(tree, [x + 0.25 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]),
    )


def prompts(rows: tuple[int, ...] = PROMPTS, seed: int = 0) -> list[np.ndarray]:
    """One prompt a row."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, LLAMA.vocab_size, n).astype(np.int32) for n in rows]


@dataclasses.dataclass
class Played:
    """What a cache gave: logits and tokens in the order they came, and the cache."""

    logits: list[np.ndarray]
    tokens: list[np.ndarray]
    cache: Cache


def prefill(model: Model, cache: Cache, rows: list[np.ndarray], chunks: tuple[int, ...]) -> tuple[np.ndarray, Cache]:
    """Feeds ragged rows chunk by chunk; logits after each row's last token."""
    last, at = np.zeros((len(rows), model.config.vocab_size), np.float32), 0
    for size in chunks:
        valid = np.array([np.clip(len(row) - at, 0, size) for row in rows], np.int32)
        tokens = np.stack([np.pad(row[at : at + size], (0, size - n)) for row, n in zip(rows, valid, strict=True)])
        logits, cache = kvjax.prefill(model, cache, tokens, valid)
        last, at = np.where(valid[:, None] > 0, logits, last), at + size
    return last, cache


def play(
    model: Model, cache: Cache, rows: list[np.ndarray], chunks: tuple[int, ...] = CHUNKS, *, full: bool = True
) -> Played:
    """Prefill and decode; in full also: go back two tokens and feed them again, swap the rows, grow, decode again."""
    logits, cache = prefill(model, cache, rows, chunks)
    seen = [logits]
    if full:
        logits, cache = prefill(model, go_back(cache, BACK), [row[-BACK:] for row in rows], (BACK,))
        seen.append(logits)
    tokens, after, cache = kvjax.decode(model, cache, jnp.asarray(logits), steps=STEPS)
    out = [np.asarray(tokens)]
    seen.append(np.asarray(after))
    if full:
        order = jnp.arange(cache.batch)[::-1]
        cache = swap_and_grow(cache, order, capacity=cache.capacity + 16)
        tokens, last, cache = kvjax.decode(model, cache, after[order], steps=STEPS)
        out.append(np.asarray(tokens))
        seen.append(np.asarray(last))
    return Played(seen, out, cache.check())


@jax.jit
def go_back(cache: Cache, tokens: int) -> Cache:
    """Rewound by some tokens."""
    return cache.rewind(cache.lengths - tokens)


@functools.partial(jax.jit, static_argnames="capacity")
def swap_and_grow(cache: Cache, order: Array, capacity: int) -> Cache:
    """Other rows, more room."""
    return cache.take(order).resize(capacity)


def compare(got: Played, want: Played) -> float:
    """Largest difference of logits over the largest logit; 1 when tokens differ."""
    if any((a != b).any() for a, b in zip(got.tokens, want.tokens, strict=True)):
        return 1.0
    return max(gap(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def gap(got: Any, want: Any) -> float:
    """`max|got - want| / max|want|`; 1 for NaN."""
    got, want = np.asarray(got), np.asarray(want)
    return 1.0 if np.isnan(got).any() else float(np.abs(got - want).max() / np.abs(want).max())


def fresh(model: Model, plan: Any, batch: int = len(PROMPTS), capacity: int = CAPACITY) -> Cache:
    """An empty cache."""
    return kvjax.init_cache(model, plan, batch=batch, capacity=capacity)


def one_by_one(rows: list[np.ndarray]) -> tuple[int, ...]:
    """Chunks of one token."""
    return (1,) * max(len(row) for row in rows)


# ---------------------------------------------------------------- 1. ring × int8, chunks longer than the window


class FloatChunk(codecs.ScaledStore):
    """Broken: a chunk that is read before it is kept is read in full precision."""

    def fresh(self, x: Array, positions: Array) -> Any:
        return (codecs.Segment(storage.pack(x), None, positions),)


FloatChunk = kinds.struct.node(FloatChunk)


@dataclasses.dataclass(frozen=True)
class FloatChunks(codecs.Codec):
    """Makes `FloatChunk`s of int8."""

    def empty(self, *size: Any) -> Any:
        made = codecs.int8().empty(*size)
        return FloatChunk(made.codes, made.scale, made.heads, made.code)


def ring_int8(broken: bool, full: bool = True) -> dict[str, float]:
    """A ring of int8 in chunks against a dense int8 cache with a window, fed token by token."""
    m, rows = model(LOCAL), prompts()
    store = FloatChunks() if broken else codecs.int8()
    got = play(m, fresh(m, caches.ring(WINDOW, slack=3, store=store)), rows, full=full)
    want = play(m, fresh(m, caches.dense(store=codecs.int8())), rows, one_by_one(rows), full=full)
    held = np.asarray(got.cache.positions(0))  # first layer: its input knows no cache
    b, t = np.nonzero(held != EMPTY)
    codes = [storage.unpack(c.layers[0].k.codes, 2, 1) for c in (got.cache, want.cache)]
    differ = np.asarray(codes[0])[b, :, t] != np.asarray(codes[1])[b, :, held[b, t]]
    return {"logits": compare(got, want), "codes of the first layer": float(differ.mean())}


# ---------------------------------------------------------------- 2. absorbed layer input, absorbed cross-attention


def layer_input(broken: bool, full: bool = True) -> dict[str, float]:
    """Layer inputs with the norm folded into the maps against dense, RMSNorm and LayerNorm with biases."""
    out = {}
    for name, config in (("layer norm and biases", GPT2), ("rms norm", PLAIN))[: 2 if full else 1]:
        m, rows = model(config), prompts()
        m = m.replace(config=dataclasses.replace(config, max_positions=None))
        plan = caches.layer_input(absorb=True)
        plan = kinds.Twin(plan, kinds.NoFactor) if broken else plan
        out[name] = compare(*(play(m, fresh(m, kind), rows, full=full) for kind in (plan, caches.dense())))
    return out


@kinds.struct.node
class WholeSource(Encoded):
    """Broken: padding of a shorter source is seen."""

    def _read(self, store: Any) -> Any:
        return tuple(part._replace(positions=jnp.zeros_like(part.positions)) for part in super()._read(store))


@dataclasses.dataclass(frozen=True)
class WholeSources(EncodedKind):
    """Makes `WholeSource`s."""

    def of(self, source: Source, share: int, ask: Any) -> Any:
        """See `CrossKind`."""
        made = super().of(source, share, ask)
        return WholeSource(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def cross(broken: bool, full: bool = True) -> dict[str, float]:
    """One encoder output for all layers, two beams a source, absorbed, against projecting it again in every layer."""
    encoder = Config(61, 1, 24, 3, 3, 8, 32, positions=Learned(CAPACITY), tied=False)
    m, rows = model(dataclasses.replace(LLAMA, encoder=encoder)), prompts((23, 17, 9, 20))
    source = kvjax.encode(m, np.random.default_rng(7).integers(0, 61, (2, 12)), [11, 6])
    absorbed = WholeSources(True, codecs.plain()) if broken else caches.encoder_output(absorb=True)
    out, played = {}, []
    for kept in (absorbed, caches.encoder_output()):
        cache = kvjax.init_cache(m, caches.dense(), source=source, cross=kept, batch=4, capacity=CAPACITY)
        played.append(play(m, cache, rows, full=full))
        # beams of one source change places: the source stays where it is
        logits, moved = prefill(m, cache, rows, CHUNKS)
        there = moved.shared["source"]
        moved = moved.reorder([1, 0, 3, 3])
        assert moved.shared["source"] is there
        played.append(kvjax.decode(m, moved, jnp.asarray(logits)[jnp.array([1, 0, 3, 3])], steps=5)[1])
    out["logits"] = compare(played[0], played[2])
    out["after reorder"] = gap(played[1], played[3])
    return out


# ---------------------------------------------------------------- 3. paged


class Unordered(Pages):
    """Broken: a page's place in its row is taken to be its place in the pool."""

    def held(self, end: Array) -> Array:
        turned = self.replace(index=jnp.arange(self.index.shape[0], dtype=jnp.int32) % self.table.shape[1])
        return Pages.held(turned, end)


Unordered = kinds.struct.node(Unordered)


def with_pages(cache: Cache, broken: bool) -> Cache:
    """The cache, or one whose table is broken."""
    pages = cache.shared["pages"]
    wrong = Unordered(pages.table, pages.readers, pages.index, pages.page, pages.pool)
    return cache.replace(shared={"pages": wrong}) if broken else cache


def paged(broken: bool, full: bool = True) -> dict[str, float]:
    """Pages of 4, fewer of them than rows × capacity, plain and int8, against dense; and a pool that runs out."""
    m, rows, out = model(LLAMA), prompts((23, 17, 5)), {}
    for name, store in (("plain", codecs.plain()), ("int8", codecs.int8()))[: 2 if full else 1]:
        cache = with_pages(fresh(m, caches.paged(4, 22, store=store), batch=3), broken)  # of 3 × 12
        chunks = CHUNKS if name == "plain" else one_by_one(rows)
        whole = fresh(m, caches.dense(store=store), batch=3)
        out[name] = compare(*(play(m, c, rows, chunks, full=full) for c in (cache, whole)))
    # 23, 17 and 5 tokens need 6 + 5 + 2 pages; of 13 none is left when rows 0 and 2 cross into another
    plans = caches.paged(4, 13), caches.dense()
    got, want = (prefill(m, fresh(m, plan, batch=3), rows, CHUNKS) for plan in plans)
    tokens, beside, _ = kvjax.decode(m, want[1], jnp.asarray(want[0]), steps=3)
    fed, last, pool = kvjax.decode(m, got[1], jnp.asarray(got[0]), steps=3)
    flags, lengths = np.asarray(pool.flags), np.asarray(pool.lengths)
    assert (flags == [PAGES, 0, 0]).all() and (lengths == [24, 20, 8]).all(), (flags, lengths)
    assert np.isnan(np.asarray(last)[0]).all() and (np.asarray(fed)[1:] == np.asarray(tokens)[1:]).all()
    out["rows beside an exhausted one"] = gap(last[1:], beside[1:])
    return out


# ---------------------------------------------------------------- 4. sinks with positions inside the cache


def sinks(broken: bool, full: bool = True) -> dict[str, float]:
    """Against every score computed on its own."""
    m, rows = model(LLAMA), prompts()
    plan = caches.ring(WINDOW, sinks=3, sinks_in_cache=True)
    cache = fresh(m, kinds.Twin(plan, kinds.TextPositions) if broken else plan)
    logits, cache = prefill(m, cache, rows, CHUNKS)
    tokens, last, _ = kvjax.decode(m, cache, jnp.asarray(logits), steps=9)
    out = {"prompt": 0.0, "decode": 0.0}
    for row, prompt in enumerate(rows):
        want = naive_sinks(m, np.concatenate([prompt, np.asarray(tokens)[row]]), WINDOW, 3)
        out["prompt"] = max(out["prompt"], gap(logits[row], want[len(prompt) - 1]))
        greedy = want[len(prompt) - 1 : -1].argmax(axis=1)
        out["decode"] = max(out["decode"], gap(last[row], want[-1]), float((greedy != np.asarray(tokens)[row]).any()))
    return out


# ---------------------------------------------------------------- 5. keys stored un-rotated


def unrotated(broken: bool, full: bool = True) -> dict[str, float]:
    """Against dense, whose keys are turned once."""
    m = model(LLAMA)
    plan = caches.dense(rotated=False)
    plan = kinds.Twin(plan, kinds.NotTurned) if broken else plan
    out = {}
    for name, rows in (("two rows", prompts()), ("one row", prompts((23,))))[: 2 if full else 1]:
        played = (play(m, fresh(m, kind, len(rows)), rows, full=full) for kind in (plan, caches.dense()))
        out[name] = compare(*played)
    return out


# ---------------------------------------------------------------- 6. shared prefix


class FromZero(SharedPrefix):
    """Broken: the suffix counts from 0."""

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> Any:
        _, node = SharedPrefix.extend(self, h, project, span, shared)
        views, _ = self.suffix.extend(h, project, shared["prefix"].after(span), shared["prefix"].suffix)
        return (*self._read(h, project, span, shared["prefix"]), *views), node


FromZero = kinds.struct.node(FromZero)


def shared_prefix(broken: bool, full: bool = True) -> dict[str, float]:
    """One prefix of 10 for three rows, the suffix dense or paged, against dense of the whole."""
    rows, (prefix,) = prompts((13, 7, 11)), prompts((10,), seed=1)
    out = {}
    for name, own in (("paged suffix", caches.paged(4, 25)), ("dense suffix", caches.dense()))[: 2 if full else 1]:
        m = model(LLAMA)
        _, one = prefill(m, fresh(m, caches.dense(), 1, 12), [prefix], (6, 4))
        cache = kvjax.init_cache(m, own, batch=3, capacity=CAPACITY, prefix=one)
        if broken:
            cache = cache.replace(layers=tuple(FromZero(node.prefix, node.suffix) for node in cache.layers))
        _, whole = prefill(m, fresh(m, caches.dense(), 3), [prefix] * 3, (10,))
        out[name] = compare(*(play(m, c, rows, (9, 4), full=full) for c in (cache, whole)))
    return out


# ---------------------------------------------------------------- 7. tree drafts

PARENTS = (-1, -1, 0, 1, 2, 1)
PATHS = ((0, 2, 4), (1, 5))


def tree_of(broken: bool) -> Tree:
    """The tree of `PARENTS`; broken: every token sees all that were fed before it."""
    size = len(PARENTS)
    depths, seen = np.zeros((1, size), np.int32), np.eye(size, dtype=bool)
    for i, parent in enumerate(PARENTS):
        if parent >= 0:
            depths[0, i] = depths[0, parent] + 1
            seen[i] |= seen[parent]
    return Tree(jnp.asarray(depths), jnp.asarray(np.tri(size, dtype=bool) if broken else seen)[None])


@jax.jit
def feed_tree(m: Model, cache: Cache, tokens: Array, tree: Tree) -> tuple[Array, Cache]:
    """Logits `[B, S, V]` of every token of a tree, and the cache that holds them all."""
    valid = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    x, cache = feed(m, cache, tokens, valid, tree)
    return finish(m, cache, x, valid)


def tree(broken: bool, full: bool = True) -> dict[str, float]:
    """Every token of a tree against its branch fed alone; then one path a row is kept, and decoding goes on."""
    plans = {
        "paged": (LLAMA, caches.paged(4, 22)),
        "dense": (LLAMA, caches.dense()),
        "ring": (LOCAL, caches.ring(WINDOW, slack=8)),
        "recompute": (LLAMA, caches.recompute()),
        "un-rotated keys": (LLAMA, caches.dense(rotated=False)),
        "layer input": (LLAMA, caches.layer_input()),
        "layer input, absorbed": (PLAIN, caches.layer_input(absorb=True)),
        "traced": (LLAMA, caches.hybrid()),
    }
    rows, out = prompts(), {}
    drafts = np.random.default_rng(5).integers(0, 61, (2, len(PARENTS))).astype(np.int32)
    for name, (config, plan) in list(plans.items())[: None if full else 2]:
        m = model(config)
        _, cache = prefill(m, fresh(m, plan), rows, CHUNKS)
        lengths = cache.lengths
        logits, fed = feed_tree(m, cache, jnp.asarray(drafts), tree_of(broken))
        _, plain = prefill(m, fresh(m, caches.dense()), rows, CHUNKS)
        for path in ((0,), (1,), (0, 2), (1, 3), *PATHS):
            want, branch = kvjax.prefill(m, plain, drafts[:, path])
            out[name] = max(out.get(name, 0.0), gap(logits[:, path[-1]], want))
        counts = np.array([len(path) for path in PATHS], np.int32)
        path = np.stack([np.pad(path, (0, 3 - len(path))) for path in PATHS])
        kept = fed.keep(lengths, path, counts)
        alone = np.take_along_axis(drafts, path, axis=1)
        want, branch = kvjax.prefill(m, plain, alone, counts)
        got = logits[jnp.arange(2), path[jnp.arange(2), counts - 1]]
        a, b = (kvjax.decode(m, c, x, steps=6) for c, x in ((kept, got), (branch, want)))
        out[f"{name}, path kept"] = max(gap(a[1], b[1]), float((np.asarray(a[0]) != np.asarray(b[0])).any()))
    return out


CASES: dict[str, Callable[..., dict[str, float]]] = {
    "ring of int8, chunks longer than the window": ring_int8,
    "absorbed layer input": layer_input,
    "absorbed cross-attention": cross,
    "paged, one table": paged,
    "sinks with positions in the cache": sinks,
    "keys stored un-rotated": unrotated,
    "shared prefix and suffix": shared_prefix,
    "tree drafts": tree,
}
