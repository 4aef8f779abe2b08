"""Prefill of one fresh prompt into a dense cache: tokens a second, and the share of the device's matrix rate.

Logits of the last token only. FLOPs are those that are needed: every token against what stands before it; what a block
of queries computes behind a mask is not counted. Beside it, in the same rounds, the model's matrices alone, each
multiplied with as many rows (`means.py`): what attention, norms, rotations and the cache cannot get below.

    python benchmarks/prefill.py                                        (on two cores two minutes)
    python benchmarks/prefill.py --shapes 110M --tokens 512 --rounds 9
    python benchmarks/prefill.py --shapes 8B --dtypes bfloat16 --tokens 2048 8192      (on a GPU)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp
import means
import numpy as np

import kvjax
from kvjax import caches, costs
from kvjax.loops.decode import DONATING
from kvjax.ops import matrices


@partial(jax.jit, static_argnames="config")
def products(config: Any, x: jax.Array, layers: Any, table: jax.Array) -> jax.Array:
    """The stream `x[S, M]` through every matrix of the layers, and its last row through the head."""
    for ws in layers:
        x = means.layer(config, matrices.times, x, ws)
    return matrices.times_rows(x[-1:], table)


def measure(shape: str, dtype: str, batch: int, tokens: int, count: int) -> dict[str, Any]:
    """Seconds, and the share of what the device multiplies."""
    model, config = harness.model_of(shape, dtype), harness.SHAPES[shape]
    make = partial(kvjax.init_cache, model, caches.dense(), batch=batch, capacity=tokens)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens)).astype(np.int32)
    valid = np.full((batch,), tokens, np.int32)
    table, stream = model.params["embed"]["table"], jnp.ones((batch * tokens, config.width), harness.DTYPES[dtype])
    layers = means.layers(model)
    ways = {
        "prefill": lambda: harness.seconds(lambda cache: DONATING.prefill(model, cache, ids, valid), make),
        "products": lambda: harness.seconds(lambda: products(config, stream, layers, table)),
    }
    times = harness.rounds(ways, count)
    spent = times["prefill"]
    one, ends = costs.kv_flops(config, slots=1), costs.kv_flops(config, slots=tokens)
    linear = tokens * (one.projections + one.ffn) + one.head
    scores = (tokens + 1) / 2 * ends.scores  # the sum over 1, 2, … tokens seen
    found = harness.spread(spent)
    return {
        "seconds": found,
        "tokens_a_second": harness.spread([batch * tokens / x for x in spent]),
        "flops": batch * (linear + scores),
        "of_multiplying": batch * (linear + scores) / found["median"] / harness.ceilings()["matrix"],
        "products_of_multiplying": batch * linear / harness.median(times["products"]) / harness.ceilings()["matrix"],
        "products_of_it": harness.over(times["products"], spent),
    }


def tell(result: dict[str, Any]) -> str:
    """The table."""
    head = ("case", "tokens/s", "ms", "of multiplying", "products alone", "of its time")
    lines = [
        (
            name,
            harness.cell(x["tokens_a_second"], ".4g"),
            f"{1e3 * x['seconds']['median']:.3g}",
            f"{x['of_multiplying']:.2f}",
            f"{x['products_of_multiplying']:.2f}" if "products_of_it" in x else "",
            harness.cell(x["products_of_it"]) if "products_of_it" in x else "",
        )
        for name, x in result["cases"].items()
    ]
    return f"{harness.headline(result)}\n\n{harness.table(head, lines)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """The share of the matrix rate over the length of the prompt."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for name, x in result["cases"].items():
        *rest, tokens = name.split(", ")
        groups.setdefault(", ".join(rest), []).append((int(tokens.split()[0]), x["of_multiplying"]))
    axes = figure.subplots()
    for name, points in groups.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="share of the device's matrix rate", ylim=(0, None))
    axes.set_xticks(sorted({x for points in groups.values() for x, _ in points}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser, on_cpu = harness.options(__doc__ or ""), jax.default_backend() == "cpu"
    parser.add_argument("--shapes", nargs="+", choices=list(harness.SHAPES), help="default: what suits the device")
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=[harness.dtype_here()])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 1024] if on_cpu else [512, 2048, 8192])
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    result = harness.begin(a) | {"cases": {}}
    for shape in a.shapes or harness.sizes(a.quick):
        for dtype, batch, tokens in ((d, b, t) for d in a.dtypes for b in a.batches for t in a.tokens):
            case = f"{shape}, {dtype}, batch {batch}, {tokens} tokens"
            result["cases"][case] = measure(shape, dtype, batch, tokens, a.rounds)
            harness.progress(case)
    harness.done("prefill", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
