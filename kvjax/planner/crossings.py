"""Where one way begins to cost more than another, for one model on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kvjax import costs
from kvjax.config import Config

MOST = 2**31 - 1
"""Rows and positions are counted in int32."""


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One threshold.

    Args:
        what: that happens from it on (`above`), or up to it.
        at: where; None: nowhere.
        here: where the plan stands; None: that is not known.
        unit: of both.
        above: whether it happens from `at` on, or up to it.
    """

    what: str
    at: float | None
    here: float | None
    unit: str
    above: bool = True

    @property
    def holds(self) -> bool | None:
        """Whether it happens here."""
        if self.here is None:
            return None
        if self.at is None:
            return False
        return self.here >= self.at if self.above else self.here <= self.at


def crossings(
    config: Config,
    *,
    batch: int,
    context: int,
    itemsize: int,
    flops: float,
    bandwidth: float,
    host: float | None,
    rotates: bool,
    row_flops: float,
    weight_reads: int,
    cache_reads: Callable[[int], int],
) -> tuple[Crossing, ...]:
    """All of them.

    Args:
        config: the model.
        batch, context: B and T.
        itemsize: b, bytes of a stored number.
        flops, bandwidth, host: F and W of the device, and bytes/s from the host; None where both share a memory.
        rotates: whether something stands between a layer's input and its keys, so that it cannot be absorbed.
        row_flops: of the maps and the head, for one row.
        weight_reads: bytes of weights that a step reads.
        cache_reads: bytes of cache that a step reads at a context.
    """
    balance, keys = flops / bandwidth, 2 * config.kv_heads * config.head_dim
    passes = first(lambda t: cache_reads(t) >= weight_reads, MOST)
    heads = costs.absorbed_heads(config, balance, itemsize)
    absorbed = None if rotates or heads <= 0 else heads
    width = min(keys, costs.largest_reprojected_width(balance, itemsize))
    return (
        Crossing("cache reads pass weight reads", passes, context, "tokens"),
        Crossing("scores cost what a layer's maps do", costs.attention_equals_linear_at(config), context, "tokens"),
        Crossing("maps are bound by FLOPs", flops * weight_reads / (bandwidth * row_flops), batch, "rows"),
        Crossing("X has no more bytes than K/V", keys, config.width, "width", above=False),
        Crossing("X projected again is no slower than K/V", width, config.width, "width", above=False),
        Crossing("X absorbed is no slower than K/V", absorbed, config.query_heads, "heads", above=False),
        Crossing("loading K/V beats prefilling again", costs.storage_for_kv(config, itemsize, flops), host, "bytes/s"),
        Crossing(
            "loading X to project beats loading K/V",
            costs.most_storage_for_inputs(config.width, itemsize, flops) if config.width < keys else None,
            host,
            "bytes/s",
            above=False,
        ),
    )


def first(holds: Callable[[int], bool], most: int) -> int | None:
    """The least number from 1 to `most` at which something holds that goes on holding; None if it never does."""
    low, high = 0, 1
    while not holds(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


__all__ = ["Crossing", "crossings", "first", "MOST"]
