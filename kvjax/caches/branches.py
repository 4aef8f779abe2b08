"""Rows that go on from the rows of another cache: how such caches are made, and taken apart again."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.prefixes import Prefix
from kvjax.caches.shared_prefix import SharedPrefix, SharedPrefixKind, fit
from kvjax.checks import count, is_concrete
from kvjax.errors import CacheError, InputError

ROOM = 64
"""Tokens that rows can take in after what they share, until a `resize`."""


def room_after(prefix: Cache, layers: int, batch: int, capacity: int) -> tuple[Cache, int]:
    """A prefix without slots that it does not need, and how many of `capacity` are left for a suffix.

    Raises:
        InputError: `prefix` has a number of rows that does not divide `batch`, or another one of layers than the model;
            a row is empty; it keeps nothing, or leaves no room.
        CacheError: a row is flagged.
    """
    if batch % prefix.batch or len(prefix.layers) != layers:
        rows, have = prefix.batch, len(prefix.layers)
        raise InputError(
            f"prefix: a cache of {rows} rows and {have} layers; rows must divide the batch of {batch}, and layers be "
            f"{layers}"
        )
    if prefix.replays:
        raise InputError("prefix: a cache that recomputes keeps nothing that could be shared")
    if is_concrete(prefix.lengths):
        lengths = [int(n) for n in prefix.check().lengths]
        if not min(lengths):
            row = lengths.index(0)
            raise InputError(f"prefix: row {row} of the cache is empty; feed the text that the rows share first")
        prefix = prefix.resize(prefix.needed(lengths))
    if capacity <= prefix.capacity:
        raise InputError(f"prefix: capacity {capacity} leaves no room after a prefix of {prefix.capacity} tokens")
    return prefix, capacity - prefix.capacity


def after(prefix: Cache, suffix: Cache) -> Cache:
    """The rows of an empty cache, going on from the rows of another, B / R from each; all read the sources that it
    reads. Copies of nothing: the prefix's buffers are those of the result."""
    copies = suffix.batch // prefix.batch
    share = None if prefix.batch == 1 else copies
    every = jnp.arange(suffix.batch, dtype=jnp.int32) // copies
    rows = lambda x: jnp.take(x, every, axis=0)  # noqa: E731
    entries = dict(prefix.shared)
    source = {SOURCE: entries.pop(SOURCE).fork(every, copies)[0]} if SOURCE in entries else {}
    common = Prefix(prefix.tokens, prefix.lengths, entries, suffix.shared, suffix.capacity, share)
    pairs, kinds = zip(prefix.layers, suffix.layers, strict=True), zip(suffix.plan, prefix.plan, strict=False)
    return Cache(
        tuple(SharedPrefix(one, fit(own), share is not None) for one, own in pairs),
        {"prefix": common, **source},
        jnp.concatenate([rows(prefix.tokens), suffix.tokens], axis=1),
        rows(prefix.lengths),
        rows(prefix.lengths) + suffix.written,
        rows(prefix.flags) | suffix.flags,
        tuple(SharedPrefixKind(own, one, prefix.capacity, share) for own, one in kinds),
    )


def before(cache: Cache, rows: Cache) -> Cache:
    """The prefixes that rows go on from: what `after` was given.

    Args:
        cache: as `after` made it, whatever its rows did since; rows have not been taken.
        rows: tokens, lengths, furthest positions, flags and plan of the prefixes; its layers are not read.
    """
    common = cache.shared["prefix"]
    shared = dict(common.prefix)
    if SOURCE in cache.shared:
        entry = cache.shared[SOURCE]
        shared[SOURCE] = entry.replace(share=entry.share * rows.batch // cache.batch)
    return rows.replace(layers=tuple(node.prefix for node in cache.layers), shared=shared)


def branched(cache: Cache, copies: int, *, room: int = ROOM) -> Cache:
    """Every row `copies` times, one after the other, as `fork` gives it, but the text so far is kept once: only what is
    new has a row for each, moves with `reorder`, and is copied. Samples and beams of a prompt start so.

    Rows next to each other share what stood before them; a `rewind` into it is refused. `resize` makes more room, and
    `Cache.room` says how much there is. The result and `cache` have buffers in common: donating one uses up both.

    Args:
        cache: of B rows, stays usable, and of a kind that `Cache.branches`: others have `fork`. It may itself go on
            from a prefix.
        copies: n.
        room: tokens that a row can take in, static.

    Returns:
        B · n rows of the same plan.

    Raises:
        CacheError: a layer's kind sees more than its own tokens.
        InputError: `copies` or `room` is no whole number of at least 1.
    """
    count("branched: copies", copies), count("branched: room", room)
    if not cache.branches:
        kinds = [type(node).__name__ for node in cache.layers if not node.branches]
        raise CacheError(f"branched: {kinds[0]} sees more than its own tokens, and cannot go on from what rows share")
    shared = {name: entry for name, entry in cache.shared.items() if name != SOURCE}
    found = [node.onward(kind, shared) for node, kind in zip(cache.layers, cache.plan, strict=True)]
    entries = {name: entry for _, _, each in found for name, entry in each.items()}
    lengths, written, flags = (jnp.zeros((cache.batch,), jnp.int32) for _ in range(3))
    tokens = jnp.full((cache.batch, cache.capacity - cache.fixed), -1, jnp.int32)
    nodes, plan = (tuple(each[i] for each in found) for i in range(2))
    own = Cache(nodes, entries, tokens, lengths, written, flags, plan)
    # Emptied, made small, then many: what is kept is not copied.
    own = own.release(np.arange(cache.batch, dtype=np.int32)).resize(room).fork(copies)
    return after(cache, own)


def repeated(cache: Cache, copies: int, *, room: int = ROOM) -> Cache:
    """Every row `copies` times: `branched` where the kinds can, else `Cache.fork`."""
    return branched(cache, copies, room=room) if cache.branches else cache.fork(copies)


__all__ = ["ROOM", "room_after", "after", "before", "branched", "repeated"]
