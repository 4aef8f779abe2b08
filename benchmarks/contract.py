"""The contract of a cache on its hard cases: that it can say them (--check), and what that costs (--bench).

    python benchmarks/contract.py --check
    python benchmarks/contract.py --check --only "tree drafts"
    python benchmarks/contract.py --bench --shapes 15M --batches 1 8
    python benchmarks/contract.py --table benchmarks/results/cpu/contract-0.10.2.json

--check compares every hard case with its reference, and sees to it that a broken twin fails.
--bench times kinds in alternating rounds against dense, and the yardstick of `handwritten.py`, at a fill of 1,000 of
1,024; it writes benchmarks/results/<device>/contract-<jax version>.json and prints its table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import handwritten
import harness
import jax
import jax.numpy as jnp
from contract_cases import BROKEN, CASES, EXACT

import kvjax
from kvjax import caches, codecs, sampling
from kvjax.caches.base import Span
from kvjax.config import Config
from kvjax.loops.decode import DONATING, seeds_of
from kvjax.ops.positions import Learned
from kvjax.params import init_params

CAPACITY, FILL, STEPS = 1024, 1000, 16
SHAPES = {
    "15M": Config(32_000, 6, 288, 6, 6, 48, 768),
    "110M": Config(32_000, 12, 768, 12, 12, 64, 2048),
}
UNTURNED = "dense, no rotation"
PREFIXED, PREFIX = "shared prefix 512", 512
KINDS: dict[str, Any] = {
    "dense": caches.dense(),
    "ring 256": caches.ring(256),
    "sinks 4 + 252 in cache": caches.ring(252, sinks=4, sinks_in_cache=True),
    "bfloat16": caches.dense(store="bfloat16"),
    "float16": caches.dense(store="float16"),
    "int8": caches.dense(store=codecs.int8()),
    "fp8": caches.dense(store=codecs.fp8()),
    "int4": caches.dense(store=codecs.int4()),
    "int4 channels": caches.dense(store=codecs.int4_channels()),
    "ring 256 of int8": caches.ring(256, store=codecs.int8()),
    "paged 128": caches.paged(128),
    "paged 128, 4 rows a page": caches.paged(128, share=4),
    PREFIXED: PREFIXED,
    "keys un-rotated": caches.dense(rotated=False),
    "layer input": caches.layer_input(),
    UNTURNED: caches.dense(),
    "layer input, absorbed": caches.layer_input(absorb=True),
}
"""What is timed; the last two on the same model without rotation."""


def check(only: list[str], full: bool = True) -> int:
    """Prints every case and its negative control; how many failed."""
    failed = 0
    for name, case in CASES.items():
        if only and name not in only:
            continue
        found = case(False, full)
        worst = max(found.values())
        control = max(case(True, False).values())
        good = worst <= EXACT and control > BROKEN
        failed += not good
        print(f"{'ok' if good else 'FAILED':7}{name:45}{worst:9.1e}  broken twin {control:8.1e}", flush=True)
        for part, value in found.items():
            print(f"{'':9}{part:43}{value:9.1e}", flush=True)
    print(f"jax {jax.__version__}, {jax.default_backend()}: largest difference over largest logit, at most {EXACT:g}")
    return failed


def filled(model: Any, plan: Any, batch: int) -> Any:
    """A cache that counts FILL tokens, of zeros."""
    if plan is PREFIXED:
        ready = jnp.full((1,), PREFIX, jnp.int32)
        prefix = kvjax.init_cache(model, caches.dense(), batch=1, capacity=PREFIX).replace(lengths=ready)
        cache = kvjax.init_cache(model, caches.dense(), batch=batch, capacity=CAPACITY, prefix=prefix)
    else:
        cache = kvjax.init_cache(model, plan, batch=batch, capacity=CAPACITY)
    start, lengths = cache.lengths, jnp.full((batch,), FILL, jnp.int32)
    shared, _ = cache.reserve(Span(start, lengths - start, jnp.zeros((batch, FILL), jnp.int32)))
    return cache.replace(shared=shared, lengths=lengths, written=lengths + 0)


Prepared = tuple[Callable[[], Any], Callable[[Any], Any], dict[str, float]]


def prepared(name: str, shape: str, batch: int) -> Prepared:
    """What makes a cache, what uses it up for STEPS tokens, and what the compiled program says of itself."""
    config = SHAPES[shape]
    if name == "hand-written":
        params = parameters(config)
        make = lambda: handwritten.init(config, batch, CAPACITY, FILL)  # noqa: E731
        tokens = jnp.ones((batch,), jnp.int32)
        program = functools.partial(handwritten.decode, config=config, steps=STEPS)
        run = jax.jit(lambda params, state, tokens: program(params, state=state, tokens=tokens), donate_argnums=1)
        began = time.perf_counter()
        compiled = run.lower(params, jax.eval_shape(make), tokens).compile()
        call = lambda state: compiled(params, state, tokens)  # noqa: E731
    else:
        if name in (UNTURNED, "layer input, absorbed"):
            config = unturned(config)
        model = kvjax.decoder(config, parameters(config))
        make = lambda: filled(model, KINDS[name], batch)  # noqa: E731
        logits, seeds, greedy = jnp.zeros((batch, config.vocab_size)), seeds_of(0, batch), sampling.greedy()
        began = time.perf_counter()
        compiled = DONATING.decode.lower(model, jax.eval_shape(make), logits, greedy, seeds, steps=STEPS).compile()
        call = lambda cache: compiled(model, cache, logits, greedy, seeds)  # noqa: E731
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))
    facts = {
        "compile_s": seconds,
        "cache_bytes": size,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    return make, call, facts


@functools.cache
def parameters(config: Config) -> Any:
    """Random, made once a shape."""
    return jax.block_until_ready(init_params(config, jax.random.key(0)))


@functools.cache
def unturned(config: Config) -> Config:
    """The same with learned positions."""
    return dataclasses.replace(config, positions=Learned(CAPACITY))


def timed(make: Callable[[], Any], call: Callable[[Any], Any]) -> float:
    """Seconds for STEPS tokens a row."""
    cache = jax.block_until_ready(make())
    began = time.perf_counter()
    jax.block_until_ready(call(cache))
    return time.perf_counter() - began


def measure(shape: str, batch: int, names: list[str], rounds: int) -> dict[str, Any]:
    """Every kind once a round; ratios are taken within a round."""
    ready = {name: prepared(name, shape, batch) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, (make, call, _) in ready.items():
            spent = timed(make, call)
            if turn:  # the first warms up
                seconds[name].append(spent)
    out = {}
    for name, (_, _, facts) in ready.items():
        against = [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)]
        out[name] = facts | {
            "ms_per_step": [round(1e3 * x / STEPS, 3) for x in seconds[name]],
            "speed_to_dense": harness.median(against),
            "min": min(against),
            "max": max(against),
        }
    return out


def bench(shapes: list[str], batches: list[int], names: list[str], rounds: int, note: str) -> pathlib.Path:
    """Measures and writes the file; its path."""
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/contract.py", *sys.argv[1:]]),
        "note": note,
        **harness.facts(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None),
        "capacity": CAPACITY,
        "fill": FILL,
        "steps": STEPS,
        "rounds": {},
        "runs": {},
    }
    for shape in shapes:
        for batch in batches:
            began = time.perf_counter()
            count = rounds if shape == "15M" else max(3, rounds // (3 if batch > 1 else 2))
            result["rounds"][f"{shape}, batch {batch}"] = count
            result["runs"][f"{shape}, batch {batch}"] = measure(shape, batch, names, count)
            result["load_after"] = harness.facts()["load"]
            path = harness.save(f"contract-{jax.__version__}", result)
            print(f"# {shape}, batch {batch}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return path


def table(path: pathlib.Path) -> str:
    """The file as a table: speed against dense, median of the rounds' ratios (least–most); temporary bytes in % of the
    cache."""
    data = json.loads(path.read_text())
    runs = data["runs"]
    lines = [
        f"jax {data['jax']}, Python {data['python']}, {data['processor']}, {data['cores']} cores, {data['day']}, "
        f"load {data['load']:.1f}–{data['load_after']:.1f}",
        "",
        "| speed (least–most); temporaries | " + " | ".join(runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for name in next(iter(runs.values())):
        cells = []
        for run in runs.values():
            x = run[name]
            temp = 100 * x["temp_bytes"] / x["cache_bytes"]
            cells.append(f"{x['speed_to_dense']:.2f} ({x['min']:.2f}–{x['max']:.2f}); {temp:.0f} %")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="equality with references, and broken twins")
    parser.add_argument("--only", nargs="*", default=[], choices=list(CASES), metavar="CASE", help="of --check")
    parser.add_argument("--quick", action="store_true", help="of --check: prefill and one scan only")
    parser.add_argument("--bench", action="store_true", help="speed and memory")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="of --bench")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of --bench")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND", help="the same")
    parser.add_argument("--rounds", type=int, default=9, help="of --bench; fewer for 110M")
    parser.add_argument("--note", default="", help="kept in the file of --bench")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="prints the table of a file")
    options = parser.parse_args(arguments)
    failed = check(options.only, not options.quick) if options.check else 0
    if options.bench:
        names = ["hand-written", *dict.fromkeys(["dense", *options.kinds])]
        print(table(bench(options.shapes, options.batches, names, options.rounds, options.note)))
    if options.table:
        print(table(options.table))
    if not (options.check or options.bench or options.table):
        parser.print_help()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
