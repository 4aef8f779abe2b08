"""Rows and heads on a mesh: the whole scan inside one `shard_map`, each device packing its own part of the cache.

`docs/decisions.md` says why so. A model whose heads are split adds partial results up with `lax.psum` after its output
projection; the cache, and every kind, sees a smaller batch and fewer heads, nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from kvjax import sampling
from kvjax.loops.decode import decode, prefill
from kvjax.model import Model, attend
from kvjax.testing.cases import Case, expect
from kvjax.types import Array

BATCH, STEPS, WIDTH, VOCAB, HEADS, DIM = 4, 24, 32, 64, 4, 8
PARTS = PartitionSpec
LENGTHS = np.array([16, 7, 1, 11], np.int32)


@dataclasses.dataclass(frozen=True)
class Split:
    """Configuration of the model: windows of its layers, and the mesh axis that its heads are split over, or None."""

    windows: tuple[int | None, ...]
    axis: str | None = None


def turn(x: Array, positions: Array) -> Array:
    """Rotates pairs by angles that grow with the position."""
    rates = 0.7 ** jnp.arange(x.shape[-1] // 2)
    angle = positions[:, :, None, None] * rates[None, None, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def apply(params: Any, config: Split, cache: Any, tokens: Array, valid: Array) -> tuple[Array, Any]:
    """A model written for any share of its heads: projections `[heads, M, D]`, partial results added over the mesh."""
    x = jnp.take(params["embed"], tokens, axis=0, mode="clip")  # [B, S, M]
    cache = cache.record(0, "embedding", x)
    for layer, p in enumerate(params["layers"]):

        def project(x: Array, names: str, p: Any = p) -> tuple[Array, ...]:
            h = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            return tuple(jnp.einsum("bsm,hmd->bshd", h, p[name]) for name in names)

        kv = functools.partial(project, names="kv")
        out, cache = attend(cache, layer, q=project(x, "q")[0], kv=kv, h=x, rotate=turn, window=config.windows[layer])
        y = jnp.einsum("bshd,hdm->bsm", out, p["out"])
        x = x + (y if config.axis is None else lax.psum(y, config.axis))
        cache = cache.record(layer, "after_ffn", x)
    return x @ params["embed"].T, cache


@functools.cache
def weights(layers: int) -> Any:
    """Random weights of a model with four query heads and four for keys and values."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + 4 * layers))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.5  # noqa: E731
    shapes = dict.fromkeys("qkv", (HEADS, WIDTH, DIM)) | {"out": (HEADS, DIM, WIDTH)}
    return {
        "embed": draw(VOCAB, WIDTH),
        "layers": [{name: draw(*shape) for name, shape in shapes.items()} for _ in range(layers)],
    }


def generated(params: Any, ids: Array, lengths: Array, seeds: Array, *, case: Case, config: Split) -> Array:
    """Makes a cache, prefills and scans: tokens `[B, STEPS]`. B and the heads are those of one device."""
    model = Model(params, config, apply)
    logits, cache = prefill(model, case.empty_for(model, ids.shape[0], 48), ids, lengths)
    sampler = sampling.chain(sampling.temperature(3.0))
    return decode(model, cache, logits, steps=STEPS, sampler=sampler, seed=seeds)[0]


def mesh_of(devices: int) -> Mesh:
    """Rows × heads over that many devices: 4 × 2 of 8."""
    heads = 2 if devices >= 2 else 1
    rows = 4 if devices >= 4 * heads else 2 if devices >= 2 * heads else 1
    # Newer versions make Explicit axes unless told otherwise, 0.7.2 makes Auto ones.
    return jax.make_mesh((rows, heads), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded(case: Case) -> None:
    """Sharded over rows and heads, on the devices that there are, a cache gives the tokens of one device.

    Exact kinds give those of recomputing on one device; others those of the same plan.
    """
    if case.reference != Case.reference or case.begin is not None or "absorb" in case.refuses:
        return  # this model turns its keys
    if case.config.encoder is not None:
        return  # and attends to no source
    alone = case.of_reference() if case.exact else case
    want = _alone(alone, case.config.windows)(*_arguments(case))
    got = _split(case)(*_arguments(case))
    expect(min(len(set(row)) for row in np.asarray(want).tolist()) >= 8, "the model repeats itself")
    expect((np.asarray(got) == np.asarray(want)).all(), f"{len(jax.devices())} devices give {got}, one gives {want}")


def compiled(case: Case) -> Any:
    """The program that runs on every device, compiled."""
    return _split(case).lower(*_arguments(case)).compile()


def _arguments(case: Case) -> tuple[Any, ...]:
    ids = np.random.default_rng(3).integers(0, VOCAB, (BATCH, 16)).astype(np.int32)
    seeds = jnp.arange(BATCH, dtype=jnp.uint32)
    return weights(len(case.config.windows)), jnp.asarray(ids), jnp.asarray(LENGTHS), seeds


def _split(case: Case) -> Any:
    mesh, windows = mesh_of(len(jax.devices())), case.config.windows
    heads = {name: PARTS("heads") for name in ("q", "k", "v", "out")}
    parameters = {"embed": PARTS(), "layers": [heads] * len(windows)}
    run = functools.partial(generated, case=case, config=Split(windows, "heads"))
    rows = PARTS("rows")
    # The check of replication knows no rule for the loops inside; rows of one device are all that it returns.
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(parameters, rows, rows, rows), out_specs=rows, check_vma=False)
    )


@functools.cache
def _alone(case: Case, windows: tuple[int | None, ...]) -> Any:
    return jax.jit(functools.partial(generated, case=case, config=Split(windows)))


__all__ = ["sharded", "compiled", "mesh_of", "generated", "apply", "weights", "Split"]
