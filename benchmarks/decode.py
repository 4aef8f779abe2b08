"""Greedy decoding with a dense cache: tokens a second, and how much of the device's own limit that is.

One scan of 32 tokens that ends where the cache is full, the cache donated. A step reads the weights and the whole
cache: the share of the limit is those bytes a second over what the device reads, measured in the same run. Batches
are where it stops to be reading that rules: there the share of what the device multiplies grows.

    python benchmarks/decode.py                                     (on two cores five minutes)
    python benchmarks/decode.py --shapes 15M --batches 1 2 4 8 16 --contexts 256
    python benchmarks/decode.py --table benchmarks/results/cpu/decode.json --plot decode.svg
    python benchmarks/decode.py --shapes 8B --dtypes bfloat16 --contexts 256 8192 32768       (on a GPU)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp

from kvjax import caches, costs, sampling
from kvjax.loops.decode import DONATING, seeds_of

STEPS = 32


def measure(shape: str, dtype: str, batch: int, context: int, count: int) -> dict[str, Any]:
    """Seconds of a step, and shares of what the device can do."""
    model = harness.model_of(shape, dtype)
    make = partial(harness.filled, model, caches.dense(), batch, context, context - STEPS)
    logits, seeds = jnp.zeros((batch, model.vocab_size or 0)), seeds_of(0, batch)
    greedy, limits = sampling.greedy(), harness.ceilings()

    def run(cache: Any) -> Any:
        return DONATING.decode(model, cache, logits, greedy, seeds, steps=STEPS)

    spent = harness.rounds({"": lambda: harness.seconds(run, make)}, count)[""]
    a_step = harness.spread([x / STEPS for x in spent])
    weights, cache = sum(x.nbytes for x in jax.tree.leaves(model.params)), jax.eval_shape(make)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    flops = costs.kv_flops(harness.SHAPES[shape], slots=context, batch=batch).contractions
    return {
        "seconds_a_step": a_step,
        "tokens_a_second": harness.spread([batch * STEPS / x for x in spent]),
        "weight_bytes": weights,
        "cache_bytes": kept,
        "flops": flops,
        "of_reading": (weights + kept) / a_step["median"] / limits["read"],
        "of_multiplying": flops / a_step["median"] / limits["matrix"],
    }


def tell(result: dict[str, Any]) -> str:
    """The table."""
    head = ("case", "tokens/s", "ms a step", "of reading", "of multiplying")
    lines = [
        (
            name,
            harness.cell(x["tokens_a_second"], ".4g"),
            f"{1e3 * x['seconds_a_step']['median']:.3g}",
            f"{x['of_reading']:.2f}",
            f"{x['of_multiplying']:.2f}",
        )
        for name, x in result["cases"].items()
    ]
    return f"{harness.headline(result)}\n\n{harness.table(head, lines)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Tokens a second over the batch and the context; the share of the reading limit beside it."""
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, x in result["cases"].items():
        shape, dtype, batch, context = name.split(", ")
        groups.setdefault(f"{shape}, {dtype}, {context}", []).append((int(batch.split()[1]), x))
    left, right = figure.subplots(1, 2)
    for name, points in groups.items():
        points.sort(key=lambda p: p[0])
        rows = [p[0] for p in points]
        left.plot(rows, [p[1]["tokens_a_second"]["median"] for p in points], "o-", label=name)
        right.plot(rows, [max(p[1]["of_reading"], p[1]["of_multiplying"]) for p in points], "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens a second, all rows")
    right.set(xscale="log", xlabel="rows", ylabel="share of the limit that is nearer", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(sorted({p[0] for points in groups.values() for p in points}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser, on_cpu = harness.options(__doc__ or ""), jax.default_backend() == "cpu"
    parser.add_argument("--shapes", nargs="+", choices=list(harness.SHAPES), help="default: what suits the device")
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=[harness.dtype_here()])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8] if on_cpu else [1, 8, 32, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024] if on_cpu else [256, 8192])
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    result = harness.begin(a) | {"steps": STEPS, "cases": {}}
    for shape in a.shapes or harness.sizes(a.quick):
        for dtype, context, batch in ((d, c, b) for d in a.dtypes for c in a.contexts for b in a.batches):
            case = f"{shape}, {dtype}, batch {batch}, context {context}"
            result["cases"][case] = measure(shape, dtype, batch, context, a.rounds)
            harness.progress(case)
    harness.done("decode", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
