"""More slack: what will be fed can be taken back."""

from __future__ import annotations

from kvjax.caches.base import Cache
from kvjax.errors import CacheError


def loosened(cache: Cache, tokens: int) -> Cache:
    """The same, but what is fed from here on can be taken back: `rewind` reaches `tokens` behind the furthest token
    written, and no further behind what is there now than before. Rings grow to a slack of `tokens`; kinds that can go
    back any number stay as they are. Speculation asks for it.

    Raises:
        CacheError: a layer's store cannot be made to keep so many.
    """
    have = cache.max_rewind
    if have is None or have >= tokens:
        return cache
    layers = tuple(node.loosen(tokens, cache.lengths, cache.shared) for node in cache.layers)
    # What lay behind the old slack is gone: as if that many more had been written.
    loose = cache.replace(layers=layers, written=cache.written + (tokens - have))
    if loose.max_rewind is not None and loose.max_rewind < tokens:
        raise CacheError(
            f"a row must be rewound by {tokens} tokens, and a layer of this plan keeps {loose.max_rewind}: give its "
            "codec more slack"
        )
    return loose


__all__ = ["loosened"]
