"""For Linen: this library's decoder, and cached attention for modules of one's own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kvjax.bridge.calls import called, model_of, watched
from kvjax.bridge.linen_attention import CachedAttention
from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caching import encode
from kvjax.config import Config
from kvjax.model import Model
from kvjax.params import init_params
from kvjax.types import DType


class Decoder(nn.Module):
    """A decoder on kvjax's own nested dict: `Decoder(config).apply({"params": params}, tokens, cache)`.

    Attributes:
        config: the model.
        sites: what is sown, in `intermediates/layers/I/SITE` as `[B, S, M]`, when the collection `intermediates` is
            mutable: names such as "after_ffn"; None is all that the layers have.
        param_dtype: of what `init` makes.
    """

    config: Config
    sites: tuple[str, ...] | None = None
    param_dtype: DType = jnp.float32

    def setup(self) -> None:
        """Makes parameters, in `init` only: `apply` takes those that it is given, eight-bit ones too."""
        if self.is_initializing():
            for name, made in init_params(self.config, self.make_rng("params"), self.param_dtype).items():
                self.param(name, lambda key, made=made: made)

    def _model(self) -> Model:
        return model_of(self.config, self.variables)

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
        if self.is_initializing() or not self.is_mutable_collection("intermediates"):
            return called(self._model(), tokens, cache, valid, source)
        out, streams = watched(self._model(), tokens, cache, valid, source, self.sites)
        self.sow("intermediates", "layers", streams, reduce_fn=lambda old, new: new, init_fn=dict)
        return out

    def encode(self, tokens: Any, valid: Any = None) -> Source:
        """`kvjax.encode` with the module's parameters: `apply(variables, tokens, method="encode")`."""
        return encode(self._model(), tokens, valid)


__all__ = ["CachedAttention", "Decoder"]
