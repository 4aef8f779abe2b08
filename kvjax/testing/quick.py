"""The promises on a tiny model in seconds: what `kvjax doctor` runs to see that this machine and its JAX keep them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax import caches, costs, sampling
from kvjax.caching import init_cache
from kvjax.config import Config
from kvjax.loops.decode import DONATING
from kvjax.model import decoder
from kvjax.params import init_params
from kvjax.testing import promises
from kvjax.testing.cases import FULL, Case, expect
from kvjax.testing.contract import Check

CASE = Case("dense", caches.dense(), dataclasses.replace(FULL, num_layers=1, windows=()))
LARGE = Config(128, 2, 64, query_heads=2, kv_heads=2, head_dim=64, ffn_width=64)
ROWS, SLOTS = 8, 4096
"""A shape at which a copy of the cache shows; nothing of it is allocated."""
TEMPORARY = 0.05
"""Of the cache: scores, logits and activations are 2 % at that shape."""


def predicted_bytes(case: Case) -> None:
    """The bytes that `kvjax.costs` predicts of a dense cache are those of its arrays."""
    cache = case.empty()
    want = costs.dense_nbytes(
        case.config, batch=cache.batch, capacity=cache.capacity, store=case.model.layer_shapes()[0].dtype
    )
    found = sum(x.nbytes for x in jax.tree.leaves(cache))
    expect(found == want == cache.nbytes, f"{found} bytes of arrays, {cache.nbytes} told, {want} predicted")


def in_place(case: Case) -> None:
    """A donated cache is updated in place: all of it is aliased, and no temporary is as large."""
    shape = jax.ShapeDtypeStruct
    model = jax.eval_shape(lambda: decoder(LARGE, init_params(LARGE, jax.random.key(0))))
    cache = jax.eval_shape(lambda m: init_cache(m, case.plan, batch=ROWS, capacity=SLOTS), model)
    logits, seeds = shape((ROWS, LARGE.vocab_size), jnp.float32), shape((ROWS,), jnp.uint32)
    made = DONATING.decode.lower(model, cache, logits, sampling.greedy(), seeds, steps=4).compile()
    used, size = made.memory_analysis(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    if used is None:  # a backend that does not tell
        return
    expect(used.alias_size_in_bytes >= size, f"{used.alias_size_in_bytes:,} of {size:,} bytes are updated in place")
    share = used.temp_size_in_bytes / size
    expect(share <= TEMPORARY, f"temporaries are {share:.0%} of the cache, more than {TEMPORARY:.0%}: it is copied")


quick: list[Check] = [predicted_bytes, promises.same_logits, promises.rewind, promises.neighbours, in_place]
"""Cheapest first; each one's docstring is the promise. `run_suite(quick_case, quick)` tells."""

__all__ = ["CASE", "quick", "predicted_bytes", "in_place"]
