"""FLOPs of one step and of whole texts, by component. A multiplication and an addition are two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from kvjax.config import Config, NormOrder
from kvjax.ops.attention import BLOCK, blockwise


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by component; `count_flops` finds the same in a program.

    Args:
        projections: queries, keys, values and the way back into the stream; absorbed maps; keys and values made again.
        scores: queries against keys, and weights against values.
        ffn: the feed-forward.
        head: logits.
        norms: elementwise operations and sums inside norms; all the others are contractions.
        other: contractions that belong to none of these.
    """

    projections: float = 0
    scores: float = 0
    ffn: float = 0
    head: float = 0
    norms: float = 0
    other: float = 0

    @property
    def contractions(self) -> float:
        """Everything but the norms."""
        return self.projections + self.scores + self.ffn + self.head + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(more), strict=True)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(factor * a for a in dataclasses.astuple(self)))


NORMS = {NormOrder.PRE: 2, NormOrder.POST: 2, NormOrder.SANDWICH: 4}
"""How often a layer norms its stream."""


def norm_flops(config: Config, width: int) -> int:
    """Operations on one vector of n numbers: an RMS norm squares, sums and multiplies twice, 4n + 3; a layer norm also
    takes the mean, subtracts it and adds a bias, 7n + 4."""
    return 7 * width + 4 if _centred(config) else 4 * width + 3


def _factor_flops(config: Config, width: int) -> int:
    """A norm's factor alone, which absorption keeps: 2n + 3, or 4n + 4 where the mean is taken off first."""
    return 4 * width + 4 if _centred(config) else 2 * width + 3


def _centred(config: Config) -> bool:
    return "bias" in config.norm.shapes(1)


def layer_flops(config: Config, context: int) -> Flops:
    """One decoded token through one layer: 2 · (2 · M · H · D + 2 · M · K · D + m · M · F) + 4 · t · H · D.

    m is 3 for a gated feed-forward, 2 for a plain one. With as many kv heads as query heads, H · D = M and F = 4M,
    plain, that is **24 M² + 4 t M**.

    Args:
        config: the model.
        context: t, slots that the token attends over, its own included; a preallocated cache is read whole.
    """
    m, heads, kv = config.width, config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    normed = NORMS[config.norm_order] * norm_flops(config, m)
    if config.qk_norm is not None:
        normed += (config.query_heads + config.kv_heads) * norm_flops(config, config.head_dim)
    return Flops(
        projections=2 * (2 * m * heads + 2 * m * kv),
        scores=4 * context * heads,
        ffn=2 * (3 if config.gated else 2) * m * config.ffn_width,
        norms=normed,
    )


def attended(queries: int, slots: int) -> int:
    """Queries that attention over so many slots computes: where it is blockwise, whole blocks of them."""
    return math.ceil(queries / BLOCK) * BLOCK if blockwise(queries, slots) else queries


def kv_flops(config: Config, *, slots: int, batch: int = 1, queries: int = 1) -> Flops:
    """One call over cached keys and values: `queries` tokens a row through all layers, one of them through the head.
    Of a model with an encoder all but cross-attention, which depends on what is kept of the source (`cross_flops`).

    Args:
        config: the model.
        slots: T that each layer reads whole, empty slots included: O(T), not O(t).
        batch: B.
        queries: S, tokens a row; attention may round them up (`attended`).
    """
    layer = layer_flops(config, slots)
    scores = config.num_layers * attended(queries, slots) * layer.scores
    layers = dataclasses.replace(layer, scores=0) * (config.num_layers * queries)
    outside = config.embed_norm + (config.norm_order is not NormOrder.POST)  # of the layers: first and last
    normed = queries * outside * norm_flops(config, config.width)
    last = Flops(scores=scores, head=2 * config.vocab_size * config.width, norms=normed)
    return (layers + last) * batch


def recompute_flops(config: Config, *, slots: int, batch: int = 1) -> Flops:
    """One step without a cache: the whole text of T = `slots` tokens goes through all layers, one through the head."""
    return kv_flops(config, slots=slots, batch=batch, queries=slots)


def reprojected_flops(config: Config, *, slots: int, batch: int = 1) -> Flops:
    """One step over stored layer inputs whose keys and values are made again: K/V's, and 4 · M · K · D for each of the
    T stored positions of a layer, their norms included."""
    again = Flops(projections=4 * config.width * config.kv_heads * config.head_dim)
    if config.norm_order is not NormOrder.POST:
        again += Flops(norms=norm_flops(config, config.width))
    if config.qk_norm is not None:
        again += Flops(norms=config.kv_heads * norm_flops(config, config.head_dim))
    return kv_flops(config, slots=slots, batch=batch) + again * (batch * slots * config.num_layers)


def absorbed_flops(config: Config, *, slots: int, batch: int = 1) -> Flops:
    """One step over stored layer inputs that queries meet directly: scores of width M instead of D, 4 · T · H · M, and
    the way there and back for the one new token, 4 · H · D · M. The new token's own keys and values are still made.

    Biases add 2 · H · D for a query against the key's; a layer norm's bias goes through the maps once a step.
    """
    m, heads, kv = config.width, config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    normed = config.norm_order is not NormOrder.POST
    folded = normed and _centred(config)
    through = batch * (4 * heads * m + (2 * heads if config.qkv_bias or folded else 0)) + (4 * m * kv if folded else 0)
    usual = kv_flops(config, slots=slots, batch=batch)
    wide = Flops(
        projections=config.num_layers * through,
        scores=config.num_layers * batch * 4 * slots * config.query_heads * m,
        norms=config.num_layers * batch * _factor_flops(config, m) * normed,
    )
    return dataclasses.replace(usual, scores=0) + wide


def without_cache_flops(config: Config, tokens: int) -> int:
    """n tokens from nothing without a cache, the head left out: Σ over t = 1 … n of t tokens each attending over t."""
    one = layer_flops(config, 1)
    linear, pair = one.projections + one.ffn, one.scores
    n = tokens
    return int(config.num_layers * (linear * (n * (n + 1) // 2) + pair * (n * (n + 1) * (2 * n + 1) // 6)))


def with_kv_flops(config: Config, tokens: int) -> int:
    """n tokens from nothing with K/V, the head left out: Σ over t = 1 … n of one token attending over t."""
    return _over_text(kv_flops, config, tokens)


def with_reprojected_flops(config: Config, tokens: int) -> int:
    """n tokens from nothing with layer inputs projected again, the head left out: 4 · M · K · D more than with K/V for
    each of the t positions of a layer at every step."""
    return _over_text(reprojected_flops, config, tokens)


def with_absorbed_flops(config: Config, tokens: int) -> int:
    """n tokens from nothing with absorbed layer inputs, the head left out: scores of width M, and the maps' work."""
    return _over_text(absorbed_flops, config, tokens)


def _over_text(step: Callable[..., Flops], config: Config, tokens: int) -> int:
    """Σ over t = 1 … n of a step over t slots, which grows by the same with every slot."""
    first, second = (dataclasses.replace(step(config, slots=t), head=0).contractions for t in (1, 2))
    return int(first * tokens + (second - first) * (tokens * (tokens - 1) // 2))


def attention_equals_linear_at(config: Config) -> float:
    """The context t at which scores cost what the linear maps of a layer do; 6 M with as many kv heads, F = 4M."""
    one = layer_flops(config, 1)
    return (one.projections + one.ffn) / one.scores


__all__ = [
    "Flops",
    "norm_flops",
    "layer_flops",
    "attended",
    "kv_flops",
    "recompute_flops",
    "reprojected_flops",
    "absorbed_flops",
    "without_cache_flops",
    "with_kv_flops",
    "with_reprojected_flops",
    "with_absorbed_flops",
    "attention_equals_linear_at",
]
