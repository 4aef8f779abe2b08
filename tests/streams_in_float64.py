"""Run with JAX_ENABLE_X64=1 by test_trace.py: traces, kept inputs, sinks and resumed runs against `naive`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from models import FULL, LEARNED, MIXED, WINDOW, prompt_ids, tiny
from naive import gap, run

import kvjax
from kvjax import caches

PLANS = {
    "hybrid": (MIXED, caches.hybrid()),
    "ring": (MIXED, (caches.traced(caches.ring(WINDOW, slack=12)), caches.traced(caches.dense()))),
    "output": (MIXED, caches.output()),
    "absorbed": (LEARNED, caches.traced(caches.layer_input(absorb=True))),
}


def main() -> None:
    assert jax.config.jax_enable_x64
    lengths, ids, rng = np.array([16, 9]), prompt_ids(0, 2), np.random.default_rng(0)
    for name, (config, plan) in PLANS.items():
        model = tiny(config, dtype=jnp.float64)
        logits, cache = kvjax.prefill(model, kvjax.init_cache(model, plan, batch=2, capacity=32), ids, lengths)
        _, logits, cache = kvjax.decode(model, cache, logits, steps=4)
        patch, found = rng.normal(size=(2, 32)), []
        got, new = kvjax.resume(model, cache, 1, 8, patch)
        assert got.dtype == np.float64
        for row, n in enumerate(lengths + 4):
            text = np.asarray(cache.tokens)[row, :n]
            want, sites = run(model, text)
            found.append(gap(logits[row], want[-1]))
            for (layer, site), x in sites.items():
                if cache.recorded(layer, site) is not None:
                    found.append(gap(cache.trace(layer, site)[row, :n], x))
            want, sites = run(model, text, [(1, 8, patch[row])])
            found += [gap(got[row], want[-1]), gap(new.trace(1, "after_ffn")[row, :n], sites[1, "after_ffn"])]
        print(f"{name}: {max(found):.1e}")
        assert max(found) <= 1e-12, name
    see = {"window": 6, "sinks": 3}
    model = tiny(FULL, dtype=jnp.float64)
    for plan in (caches.ring(sinks_in_cache=True, **see), caches.recompute(sinks_in_cache=True, **see)):
        logits, _ = kvjax.prefill(model, kvjax.init_cache(model, plan, capacity=32), ids[:1])
        want, _ = run(model, ids[0], in_cache=True, **see)
        print(f"sinks: {gap(logits[0], want[-1]):.1e}")
        assert gap(logits[0], want[-1]) <= 1e-12


main()
