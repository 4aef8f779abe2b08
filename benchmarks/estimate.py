"""How far `kvjax.estimate` is from what decoding takes, on the device at hand.

In each round the device is measured (`kvjax.planner.measured_device`), then every case decodes once: steps of
`kvjax.donating.decode`, greedy, the cache full at the end. The prediction comes from the medians of what was measured;
nothing in it knows a decode of these models. About two minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp

import kvjax
from kvjax import caches, donating
from kvjax.planner import Device, Rate, measured_device

BATCHES, CONTEXTS = (1, 8), (256, 1024)
SHAPES = {True: ("15M", "110M"), False: ("1B",)}
STEPS = {"15M": 64}
FEWER = 16
"""Steps of a call: enough that what a call takes besides is small."""


def case(shape: str, dtype: str, batch: int, context: int) -> float:
    """Seconds of a step, from a cache that lacks as many tokens as are decoded."""
    model = harness.model_of(shape, dtype)
    logits = jnp.zeros((batch, model.vocab_size), dtype)
    steps = STEPS.get(shape, FEWER)
    make = functools.partial(harness.filled, model, caches.dense(), batch, context, context - steps)
    return harness.seconds(lambda cache: donating.decode(model, cache, logits, steps=steps), make) / steps


def middle(devices: list[Device]) -> Device:
    """The median of each figure."""
    first, median = devices[0], harness.median
    rates = [Rate(r.rows, r.nbytes, median([x.rates[i].bandwidth for x in devices])) for i, r in enumerate(first.rates)]
    return dataclasses.replace(
        first,
        bandwidth=median([x.bandwidth for x in devices]),
        flops=tuple((name, median([dict(x.flops)[name] for x in devices])) for name, _ in first.flops),
        rates=tuple(rates),
        layer_seconds=median([x.layer_seconds for x in devices]),
        logit_seconds=median([x.logit_seconds for x in devices]),
        source=f"medians of {len(devices)} times what was measured",
    )


def measured(arguments: Any) -> dict[str, Any]:
    result = harness.begin(arguments)
    dtype = harness.dtype_here()
    shapes = ("tiny",) if arguments.quick else SHAPES[jax.default_backend() == "cpu"]
    cases = {f"{s} {b} {t}": (s, dtype, b, t) for s in shapes for b in BATCHES for t in CONTEXTS}
    devices: list[Device] = []

    def measure() -> float:
        devices.append(measured_device(dtype))
        return 0.0

    ways = {"device": measure} | {name: functools.partial(case, *each) for name, each in cases.items()}
    took = harness.rounds(ways, arguments.rounds)
    device = middle(devices[1:])
    result |= {"dtype": dtype, "device": dataclasses.asdict(device), "cases": []}
    for name, (shape, _, batch, context) in cases.items():
        model = harness.model_of(shape, dtype)
        made = kvjax.estimate(model, batch=batch, context=context, plan=caches.dense(), device=device)
        assert made.step.expected is not None
        found = {"shape": shape, "batch": batch, "context": context, "seconds": harness.spread(took[name])}
        found |= {"limit": made.step.limit, "expected": made.step.expected, "bound": made.step.bound}
        result["cases"].append(found | {"error": made.step.expected / harness.median(took[name]) - 1})
    return result


def tell(result: dict[str, Any]) -> str:
    head = ("shape", "rows", "slots", "ms a step, measured", "expected", "error", "at the limit", "bound")
    rows = []
    for x in result["cases"]:
        ms = harness.cell({name: 1e3 * value for name, value in x["seconds"].items()})
        limit, expected = (f"{1e3 * x[name]:.2f}" for name in ("limit", "expected"))
        rows.append((x["shape"], str(x["batch"]), f"{x['context']:,}", ms, expected, f"{x['error']:+.0%}", limit))
        rows[-1] += (x["bound"],)
    worst = max(abs(x["error"]) for x in result["cases"])
    return f"{harness.headline(result)}\n\n{harness.table(head, rows)}\n\nLargest error: {worst:.0%}."


def draw(figure: Any, result: dict[str, Any]) -> None:
    axes, cases = figure.subplots(), result["cases"]
    places = range(len(cases))
    for name, mark in (("expected", "o"), ("limit", "_")):
        axes.plot(places, [1e3 * x[name] for x in cases], mark, label=name)
    axes.plot(places, [1e3 * x["seconds"]["median"] for x in cases], "x", label="measured")
    axes.set_xticks(places, [f"{x['shape']}\n{x['batch']} x {x['context']}" for x in cases])
    axes.set(yscale="log", ylabel="ms a step")
    axes.legend()


def main() -> None:
    arguments = harness.options(__doc__).parse_args()
    if not harness.shown(arguments, tell, draw):
        result = measured(arguments)
        harness.done("estimate", result, arguments, draw, tell(result))


if __name__ == "__main__":
    main()
