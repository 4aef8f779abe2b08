"""`estimate`: bytes, what fits, and the time of a step, from shapes and a device; nothing of a model's size is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import caches, costs
from kvjax.caches.base import SOURCE, Cache
from kvjax.costs import Flops
from kvjax.errors import InputError, KvjaxError
from kvjax.layers import absorbs
from kvjax.loops import decode as loop
from kvjax.planner.crossings import MOST, Crossing, crossings, first
from kvjax.planner.devices import Device, named
from kvjax.planner.measured import halves_here, measured_device
from kvjax.planner.models import Planned, planned
from kvjax.planner.told import table
from kvjax.strategies import STRATEGIES, WITH_SOURCE, Strategy
from kvjax.types import DType


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of all rows: every row feeds one token.

    Args:
        flops: of all rows.
        weights, cache: bytes of each that are read.
        limit: seconds that no such step can beat.
        bound: what takes the longest at that limit: "FLOPs", "weights" or "cache".
        expected: seconds as the device was measured; None for figures of a datasheet, which give the limit alone.
    """

    flops: Flops
    weights: int
    cache: int
    limit: float
    bound: str
    expected: float | None

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops.contractions / (self.weights + self.cache)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What could be kept instead.

    Args:
        name: of the strategy.
        nbytes: of the cache; 0 where it is refused.
        fits: whether it fits beside weights and temporaries.
        step: with it; None where it is refused.
        refused: why, or None.
    """

    name: str
    nbytes: int = 0
    fits: bool = False
    step: Step | None = None
    refused: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """What a model costs on a device; as text, a table.

    Args:
        model, parameters, dtype, int8, plan: what was planned for; `int8` where matrices count as int8.
        device: on which.
        batch, context: B and T, slots of each row.
        source: S, slots of each row's source, or None.
        weights, cache: bytes, exact.
        temporaries: bytes that a donated step needs beside them. A prefill needs more.
        compiled: whether the compiler of the device at hand said so; else they are `costs.step_temporaries_nbytes`, a
            bound where keys and values are read as they are stored. What decodes or projects them needs more.
        largest_batch: rows that fit at this context; 0: not one.
        largest_context: slots that fit with this batch, at most the model's positions; 0: not one.
        step: one step.
        crossings: where one way begins to cost more than another.
        strategies: what could be kept instead.
    """

    model: str
    parameters: int
    dtype: str
    int8: bool
    plan: str
    device: Device
    batch: int
    context: int
    source: int | None
    weights: int
    cache: int
    temporaries: int
    compiled: bool
    largest_batch: int
    largest_context: int
    step: Step
    crossings: tuple[Crossing, ...]
    strategies: tuple[Kept, ...]

    @property
    def nbytes(self) -> int:
        """Of everything."""
        return self.weights + self.cache + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds everything; what a driver or an allocator keeps for itself is not known."""
        return self.nbytes <= self.device.memory

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of it, and what follows from it."""
        made = dataclasses.asdict(self)
        made |= {"nbytes": self.nbytes, "fits": self.fits, "tokens_per_second": speed(self.batch, self.step)}
        made["intensity"] = self.step.intensity
        made["balance"] = self.device.flops_of(self.dtype) / self.device.bandwidth
        for crossing, own in zip(self.crossings, made["crossings"], strict=True):
            own["holds"] = crossing.holds
        for kept, own in zip(self.strategies, made["strategies"], strict=True):
            own["tokens_per_second"] = None if kept.step is None else speed(self.batch, kept.step)
        return made

    def __repr__(self) -> str:
        return table(self)


def speed(batch: int, step: Step) -> dict[str, float | None]:
    """Tokens a second of all rows, at the limit and as expected."""
    return {"limit": batch / step.limit, "expected": None if step.expected is None else batch / step.expected}


def estimate(
    model: Any,
    *,
    batch: int = 1,
    context: int | None = None,
    plan: Any = None,
    source: int | None = None,
    cross: Any = None,
    dtype: DType | None = None,
    weights: str | None = None,
    device: str | Device | None = None,
) -> Estimate:
    """What decoding costs: bytes, what fits, the bound that rules and tokens a second; nothing is loaded or allocated.

    Bytes are exact. Times are limits: what memory and arithmetic of the device allow, which no program reaches whole.
    For a measured device there is also the time to be expected.

    Args:
        model: a `Model`, an `LM`, a `Config`, or where a config.json lies: the file, its folder, a bundled name, a hub
            id (of which nothing else is fetched).
        batch: B, rows.
        context: T, slots of each row, all of which a step reads; None: 4,096, or the model's positions.
        plan: of the cache, as `init_cache` takes it.
        source: tokens of each row's own source, for a model with an encoder; None: as many as the context, or as it has
            positions.
        cross: what is kept of it, as `init_cache` takes it.
        dtype: of parameters and cache; None: those of a model; of a config.json what it says, float32 if nothing, or if
            the device has no half precision, and on a CPU.
        weights: "int8" counts kernels and embeddings as int8 with a float32 scale for each output or token.
        device: a name of `kvjax.planner.DEVICES`, a `Device`, or None or "here" to measure the one at hand.

    Raises:
        InputError: a number out of range, an unknown device, a dtype that it has no rate for, a plan that does not fit.
        CheckpointError: no config.json, or it describes no model.
    """
    here = device is None or device == "here"
    chosen = None if here else device if isinstance(device, Device) else named(str(device))
    halves = halves_here() if chosen is None else tuple(x for x, _ in chosen.flops if x.endswith("float16"))
    what = planned(model, dtype, weights, halves)
    if chosen is None:
        chosen = measured_device(what.dtype)
    return _Desk(what, chosen, plan, source, cross).estimate(batch, context, here)


CONTEXT = 4096
"""Slots unless told otherwise, or as many as the model has positions."""


class _Desk:
    """What stays the same while batch and context are tried."""

    def __init__(self, what: Planned, device: Device, plan: Any, source: int | None, cross: Any) -> None:
        self.what, self.device, self.plan, self.cross = what, device, plan, cross
        self.config, self.dtype = what.config, what.dtype
        self.flops, self.itemsize = device.flops_of(what.dtype), what.dtype.itemsize
        self.tokens = source
        self.weights, self.more = what.nbytes(), 0

    def estimate(self, batch: int, context: int | None, here: bool) -> Estimate:
        """All figures."""
        config, longest = self.config, self.config.max_positions or MOST
        context = min(CONTEXT, longest) if context is None else context
        for name, value in (("batch", batch), ("context", context)):
            if not 1 <= value <= MOST:
                raise InputError(f"estimate: {name} must be from 1 to {MOST}, not {value}")
        if context > longest:
            raise InputError(f"estimate: context {context} passes the {longest} positions of the model")
        self.slots = self._source_slots(context)
        cache = self._cache(self.plan, batch, context)
        if here:
            self.more = self._compiled(batch, cache) - self._temporaries(batch, context)
        flops = self._counted(batch, cache)
        step = self._step(batch, flops, cache)
        maps = flops.contractions - flops.scores
        return Estimate(
            model=self.what.name,
            parameters=self.what.parameters(),
            dtype=self.dtype.name,
            int8=self.what.int8,
            plan=_words(self.plan, config),
            device=self.device,
            batch=batch,
            context=context,
            source=self.slots,
            weights=self.weights,
            cache=nbytes(cache),
            temporaries=self._temporaries(batch, context) + self.more,
            compiled=here,
            largest_batch=self._largest(lambda n: (n, context), MOST),
            largest_context=self._largest(lambda n: (batch, n), longest),
            step=step,
            crossings=crossings(
                config,
                batch=batch,
                context=context,
                itemsize=self.itemsize,
                flops=self.flops,
                bandwidth=self.device.bandwidth,
                host=self.device.host,
                rotates=not all(absorbs(config, i) for i in range(config.num_layers)),
                row_flops=maps / batch,
                weight_reads=step.weights,
                cache_reads=lambda t: read(self._cache(self.plan, batch, t)),
            ),
            strategies=tuple(
                self._kept(strategy, batch, context) for strategy in (STRATEGIES if self.slots is None else WITH_SOURCE)
            ),
        )

    def _source_slots(self, context: int) -> int | None:
        if self.config.encoder is None:
            if self.tokens is not None or self.cross is not None:
                raise InputError(f"estimate: source is {self.tokens}, cross {self.cross}, but the model has no encoder")
            return None
        most = self.config.encoder.max_positions
        tokens = min(context, most or context) if self.tokens is None else self.tokens
        if not 1 <= tokens <= (most or MOST):
            raise InputError(f"estimate: source must be from 1 to {most or MOST} tokens, not {tokens}")
        return costs.source_slots(self.config, tokens)

    def _cache(self, plan: Any, batch: int, context: int, cross: Any = None) -> Cache:
        return self.what.cache(plan, batch, context, self.slots, self.cross if cross is None else cross)

    def _temporaries(self, batch: int, context: int) -> int:
        shape = {"batch": batch, "slots": context, "source": self.slots or 0}
        return costs.step_temporaries_nbytes(self.config, **shape, itemsize=self.itemsize)

    def _compiled(self, batch: int, cache: Cache) -> int:
        """Temporaries of a step, by the compiler of the device at hand."""
        made = loop.DONATING.step.lower(self.what.model, cache, jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()
        return int(made.memory_analysis().temp_size_in_bytes)

    def _counted(self, batch: int, cache: Cache) -> Flops:
        tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return costs.count_flops(loop.VALUE.step, self.what.model, cache, tokens)

    def _largest(self, shape: Callable[[int], tuple[int, int]], most: int) -> int:
        def over(n: int) -> bool:
            made = self.weights + nbytes(self._cache(self.plan, *shape(n))) + self._temporaries(*shape(n)) + self.more
            return made > self.device.memory

        past = first(over, most)
        return most if past is None else past - 1

    def _step(self, batch: int, flops: Flops, cache: Cache) -> Step:
        weights, kept = self.what.read(batch, cache), read(cache)
        bandwidth = self.device.reading(1, weights + kept)  # that of memory, where caches were not measured
        limit = costs.least_step_seconds(flops.contractions, weights, kept, flops=self.flops, bandwidth=bandwidth)
        bound = "weights" if weights >= kept else "cache"
        if flops.contractions / self.flops > (weights + kept) / bandwidth:
            bound = "FLOPs"
        return Step(flops, weights, kept, limit, bound, self._expected(batch, flops, weights, kept))

    def _expected(self, batch: int, flops: Flops, weights: int, kept: int) -> float | None:
        """As `costs.step_seconds`, with the rates at which the device was seen to read so much with so many rows, and
        what layers and the choice of a token take besides."""
        if not self.device.rates:
            return None
        linear, bandwidth = flops.contractions - flops.scores, self.device.reading(batch, weights + kept)
        maps = costs.step_seconds(linear, weights, 0, flops=self.flops, bandwidth=bandwidth)
        attending = max(kept / self.device.reading(1, weights + kept), flops.scores / self.flops)
        beside = self.config.num_layers * self.device.layer_seconds
        return maps + attending + beside + batch * self.config.vocab_size * self.device.logit_seconds

    def _kept(self, strategy: Strategy, batch: int, context: int) -> Kept:
        cross = None if strategy.source is None else strategy.source.cross
        try:
            cache = self._cache(strategy.plan, batch, context, cross)
        except KvjaxError as error:
            return Kept(strategy.name, refused=str(error))
        flops = strategy.flops(self.config, batch=batch, slots=context)
        if strategy.source is not None:
            queries = context if strategy.whole else 1
            shape = {"source": self.slots, "rows": batch, "batch": batch, "queries": queries}
            flops += strategy.source.flops(self.config, **shape)
        size = nbytes(cache)
        fits = self.weights + size + self._temporaries(batch, context) <= self.device.memory
        return Kept(strategy.name, size, fits, self._step(batch, flops, cache))


def nbytes(tree: Any) -> int:
    """Of all arrays, or of what stands for them."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read(cache: Cache) -> int:
    """Bytes of a cache that one step reads: what attention reads of each layer, whole, and what layers share; neither
    the streams of a trace nor tokens and lengths."""
    layers = [getattr(node, "inner", node) for node in cache.layers]  # a trace keeps its streams beside a node
    shared = {name: entry for name, entry in cache.shared.items() if name != SOURCE}
    source = cache.shared.get(SOURCE)
    beside = 0 if source is None else nbytes((source.lengths, source.flags))
    return nbytes((layers, shared, source)) - beside


def _words(plan: Any, config: Any) -> str:
    chosen = caches.default(config) if plan is None else plan
    each = chosen if isinstance(chosen, tuple | list) else (chosen,)
    return ", ".join(dict.fromkeys(str(kind) for kind in each))


__all__ = ["Estimate", "Step", "Kept", "estimate", "read", "nbytes", "speed"]
