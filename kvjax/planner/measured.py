"""The device at hand, measured in a few seconds: what the predictions of steps rest on. Nothing here knows a model."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import donating
from kvjax.caching import init_cache
from kvjax.config import Config
from kvjax.layers import linear
from kvjax.model import decoder
from kvjax.params import init_params
from kvjax.planner.devices import Device, Rate
from kvjax.timing import processor
from kvjax.types import Array, DType

WIDTH = 1024
ROWS = (1, 8, 64)
COUNTS = (2, 8, 16, 64)
"""Square matrices of the width that products read in turn: 8, 32, 64 and 256 MiB in float32."""

SQUARE = 2048
TIMES = 5
LEAST = 0.004
"""Seconds that what is timed should take at least; a loop repeats it."""

SMALL = Config(256, 4, 64, query_heads=4, kv_heads=4, head_dim=16, ffn_width=128)
LARGE = dataclasses.replace(SMALL, vocab_size=1 << 15)
"""Its table has as many bytes as the fewest matrices above."""


def measured_device(dtype: DType | None = None) -> Device:
    """Measures the default device of JAX.

    Medians of several: the bytes/s at which matrices are read by a product with 1, 8 and 64 rows, of sizes that caches
    hold and that they do not; FLOP/s of a product of squares; bytes/s from the host; the seconds of a step of a decoder
    that moves next to nothing, and what a large vocabulary adds to it beside reading its table. The bandwidth is that
    of the largest matrices and one row.

    Args:
        dtype: in which it multiplies; None: float32 on a CPU, float16 on a T4, else bfloat16.

    Returns:
        Memory as the device says; on a CPU the machine's.
    """
    here = jax.devices()[0]
    dtype = jnp.dtype((*halves_here(), "float32")[0] if dtype is None else dtype)
    matrices = _matrices(dtype)
    rates = [_rate(rows, matrices[:count]) for rows in ROWS for count in COUNTS]
    small, large = (_step_seconds(config, dtype) for config in (SMALL, LARGE))
    table = LARGE.vocab_size * LARGE.width * dtype.itemsize
    square = _ones((SQUARE, SQUARE), dtype)
    product = 2 * SQUARE**3 / seconds(lambda: _product(square))
    return Device(
        name=processor() if here.platform == "cpu" else here.device_kind,
        memory=_memory(here),
        bandwidth=rates[len(COUNTS) - 1].bandwidth,
        flops=((dtype.name, product),),
        host=None if here.platform == "cpu" else _from_host(),
        source=f"measured, medians of {TIMES}",
        rates=tuple(rates),
        layer_seconds=small / SMALL.num_layers,
        logit_seconds=max(large - small - table / rates[0].bandwidth, 0) / LARGE.vocab_size,
    )


def halves_here() -> tuple[str, ...]:
    """Half precisions that the default device multiplies fast, the better one first."""
    here = jax.devices()[0]
    if here.platform == "cpu":
        return ()
    return ("float16",) if "T4" in here.device_kind else ("bfloat16", "float16")


def seconds(run: Callable[[], Any]) -> float:
    """Median time of a call, to the end of its work on the device; one that compiles comes before."""
    jax.block_until_ready(run())
    took = []
    for _ in range(TIMES):
        began = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _ones(shape: tuple[int, ...], dtype: DType) -> Array:
    return jax.block_until_ready(jnp.ones(shape, dtype))


def _matrices(dtype: DType) -> list[Array]:
    return [_ones((WIDTH, WIDTH), dtype) for _ in range(max(COUNTS))]


@jax.jit
def _read(matrices: Sequence[Array], x: Array, turns: Array) -> Array:
    # Each product takes what the last one gave: turns of a loop can neither overlap nor be hoisted.
    def turn(_: Any, x: Array) -> Array:
        return functools.reduce(lambda x, matrix: linear({"kernel": matrix}, x) * WIDTH**-1, matrices, x)

    return lax.fori_loop(0, turns, turn, x)


def _rate(rows: int, matrices: Sequence[Array]) -> Rate:
    size, x = sum(matrix.nbytes for matrix in matrices), _ones((rows, WIDTH), matrices[0].dtype)
    once = seconds(lambda: _read(matrices, x, 1))
    turns = max(round(LEAST / once), 1)
    spent = once if turns == 1 else seconds(lambda: _read(matrices, x, turns)) / turns
    return Rate(rows, size, size / spent)


@jax.jit
def _product(a: Array) -> Array:
    return a @ a


def _from_host() -> float:
    block = np.ones(1 << 26, np.uint8)
    return block.nbytes / seconds(lambda: jax.device_put(block))


def _step_seconds(config: Config, dtype: DType, steps: int = 32) -> float:
    model = decoder(config, init_params(config, jax.random.key(0), dtype))
    logits, cache = donating.step(model, init_cache(model, capacity=(TIMES + 2) * steps), jnp.zeros(1, jnp.int32))
    kept: list[Any] = [logits, cache]

    def run() -> Array:
        _, kept[0], kept[1] = donating.decode(model, kept[1], kept[0], steps=steps)
        return kept[0]

    return seconds(run) / steps


def _memory(device: Any) -> int:
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


__all__ = ["measured_device", "halves_here", "seconds"]
