"""For NNX: this library's decoder, and cached attention for modules of one's own."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from kvjax.bridge.calls import called, watched
from kvjax.bridge.nnx_attention import CachedAttention
from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caching import encode
from kvjax.model import Model


class Decoder(nnx.Module):
    """A model whose parameters are `nnx.Param`, under `params` with their own names; the cache comes and goes.

    Args:
        model: whose parameters it takes; any `kvjax.Model`.
        sites: what each call leaves, in place of what the last one left, as `nnx.Intermediate` `[B, S, M]` under
            `intermediates/layers/I/SITE`, for `nnx.pop`: names such as "after_ffn"; () is nothing.
    """

    def __init__(self, model: Model, sites: tuple[str, ...] = ()):
        self.params = nnx.data(jax.tree.map(nnx.Param, model.params))
        self.without = model.replace(params=None)
        self.sites = tuple(sites)
        self.intermediates: Any = nnx.data({})

    @property
    def model(self) -> Model:
        """What kvjax's functions take, with the parameters as they are now."""
        names = jax.tree.structure(self.params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return self.without.replace(params=jax.tree.unflatten(names, jax.tree.leaves(self.params)))

    def __call__(
        self, tokens: Any, cache: Cache | None = None, valid: Any = None, *, source: Source | None = None
    ) -> Any:
        """Feeds tokens, many or one a row.

        Args:
            tokens: `[B, S]` int32, padded at the end.
            cache: from `kvjax.init_cache`, stays usable; None runs the whole text without one.
            valid: `[B]` int32 or None, tokens of each row that are real.
            source: from `encode`, for a model with an encoder and without a cache.

        Returns:
            Logits `[B, V]` after the last token and the cache; without a cache logits `[B, S, V]` alone.

        Raises:
            InputError, CacheError: as `kvjax.prefill`.
        """
        if not self.sites:
            return called(self.model, tokens, cache, valid, source)
        out, streams = watched(self.model, tokens, cache, valid, source, self.sites)
        self.intermediates = nnx.data({"layers": jax.tree.map(nnx.Intermediate, streams)})
        return out

    def encode(self, tokens: Any, valid: Any = None) -> Source:
        """`kvjax.encode` with the module's parameters."""
        return encode(self.model, tokens, valid)


__all__ = ["CachedAttention", "Decoder"]
