"""Every kind of cache against dense in speed, and what it takes in memory; and what a cache that grows is worth.

    python benchmarks/kinds.py
    python benchmarks/kinds.py --shapes 15M --batches 1 --kinds int8 "paged 128"      (these are put into the same file)
    python benchmarks/kinds.py --table benchmarks/results/cpu/kinds.json --plot kinds.svg

kinds      greedy decoding of 24 tokens from a fill of 1,000 of 1,024, one scan, the cache donated. `hand-written` is
           `handwritten.py`: one kind of cache, rows in step, nothing else. Speed is against `dense` within each round.
           The last two kinds are of the same model with learned positions: what a rotation forbids.
growth     one row. At 192 to 240 tokens: a step with a cache of 256 and of 8,192, and of the loop of `generate`, whose
           cache grows as it is filled, asked for 8,000 tokens. From 32 to 512 tokens: that loop, against a cache that
           has 512 from the beginning.

Each shape and batch is measured and saved by itself; what the file has of others stays. On two cores 15M takes about
five minutes, 110M eight.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import handwritten
import harness
import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import caches, codecs, sampling
from kvjax.caches.base import Cache
from kvjax.loops.decode import CHUNK, DONATING, seeds_of
from kvjax.loops.run import Run
from kvjax.ops.positions import Learned

CAPACITY, FILL, STEPS = 1024, 1000, 24
HAND, UNTURNED, ABSORBED = "hand-written", "dense, no rotation", "layer input, absorbed"
PREFIXED, PREFIX = "shared prefix 512", 512
KINDS: dict[str, Any] = {
    HAND: None,
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
    PREFIXED: caches.dense(),
    "trace": caches.traced(caches.dense()),
    "keys un-rotated": caches.dense(rotated=False),
    "layer input": caches.layer_input(),
    UNTURNED: caches.dense(),
    ABSORBED: caches.layer_input(absorb=True),
}

SMALL, LARGE, NEAR, MIDDLE, FAR = 256, 8192, 192, 32, 512
CHUNKS = 3
"""Of `generate`'s loop at a fill of NEAR: 48 tokens."""

PARTS = ("kinds", "growth")


def models(shape: str, dtype: str) -> tuple[kvjax.Model, kvjax.Model]:
    """The decoder of a shape, and the same with learned positions."""
    model = harness.model_of(shape, dtype)
    return model, _unturned(shape, dtype)


@functools.cache
def _unturned(shape: str, dtype: str) -> kvjax.Model:
    config = dataclasses.replace(harness.SHAPES[shape], positions=Learned(CAPACITY))
    make = jax.jit(lambda key: kvjax.init_params(config, key, harness.DTYPES[dtype]))
    return kvjax.decoder(config, jax.block_until_ready(make(jax.random.key(0))))


def filled(model: kvjax.Model, name: str, batch: int) -> Cache:
    """A cache of a kind that counts FILL tokens, of zeros."""
    prefix = None
    if name == PREFIXED:
        ready = jnp.full((1,), PREFIX, jnp.int32)
        prefix = kvjax.init_cache(model, KINDS[name], batch=1, capacity=PREFIX).replace(lengths=ready)
    return harness.filled(model, KINDS[name], batch, CAPACITY, FILL, prefix)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What makes a cache, what uses it up for STEPS tokens, and what the compiled program says of itself."""

    make: Callable[[], Any]
    call: Callable[[Any], Any]
    told: dict[str, float]


def prepared(name: str, shape: str, batch: int, dtype: str) -> Prepared:
    """Compiled."""
    usual, unturned = models(shape, dtype)
    model = unturned if name in (UNTURNED, ABSORBED) else usual
    began = time.perf_counter()
    if name == HAND:
        config, params = model.config, model.params
        make = functools.partial(handwritten.init, config, batch, CAPACITY, FILL, harness.DTYPES[dtype])
        tokens = jnp.ones((batch,), jnp.int32)
        run = jax.jit(
            lambda params, state, tokens: handwritten.decode(params, config, state, tokens, STEPS), donate_argnums=1
        )
        compiled = run.lower(params, jax.eval_shape(make), tokens).compile()
        call = lambda state: compiled(params, state, tokens)  # noqa: E731
    else:
        make = functools.partial(filled, model, name, batch)
        given = jnp.zeros((batch, model.config.vocab_size)), sampling.greedy(), seeds_of(0, batch)
        compiled = DONATING.decode.lower(model, jax.eval_shape(make), *given, steps=STEPS).compile()
        call = lambda cache: compiled(model, cache, *given)  # noqa: E731
    spent, memory = time.perf_counter() - began, compiled.memory_analysis()
    told = {
        "compile_s": spent,
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make))),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
    }
    return Prepared(make, call, told)


def kinds(shape: str, batch: int, dtype: str, names: list[str], rounds: int) -> dict[str, Any]:
    """Every kind once a round; ratios are taken within a round."""
    ready = {name: prepared(name, shape, batch, dtype) for name in names}
    ways = {name: functools.partial(harness.seconds, way.call, way.make) for name, way in ready.items()}
    took = harness.rounds(ways, rounds)
    return {
        name: way.told
        | {
            "seconds_a_step": harness.spread([x / STEPS for x in took[name]]),
            "speed": harness.over(took["dense"], took[name]),
            "rounds": rounds,
            "read": harness.ceilings()["read"],
        }
        for name, way in ready.items()
    }


def growth(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds a step of one row by how large its cache is."""
    model, ids = harness.model_of(shape, dtype), np.random.default_rng(0)
    prompts = {n: ids.integers(0, harness.SHAPES[shape].vocab_size, (1, n)).tolist() for n in (NEAR, MIDDLE)}
    logits, steps = jnp.zeros((1, model.config.vocab_size)), CHUNKS * CHUNK

    def fixed(capacity: int, fill: int, steps: int) -> Callable[[], float]:
        make = functools.partial(harness.filled, model, caches.dense(), 1, capacity, fill)
        run = functools.partial(kvjax.donating.decode, model, logits=logits, steps=steps)
        return lambda: harness.seconds(lambda cache: run(cache=cache)[0], make) / steps

    def grown(fill: int, budget: int, chunks: int) -> Callable[[], float]:
        def way() -> float:
            run = Run.start(model, prompts[fill], max_new_tokens=budget, plan=caches.dense(), stop_ids=())
            began = time.perf_counter()
            for _, run in zip(range(-(-budget // (chunks * CHUNK))), run.chunks(chunks), strict=False):
                if budget > FAR:  # asked for more than is waited for
                    break
            return (time.perf_counter() - began) / run.state.count()[0]

        return way

    took = harness.rounds(
        {
            "near, small": fixed(SMALL, NEAR, steps),
            "near, large": fixed(LARGE, NEAR, steps),
            "near, grown": grown(NEAR, LARGE - NEAR, CHUNKS),
            "far, whole": fixed(FAR, MIDDLE, FAR - MIDDLE),
            "far, grown": grown(MIDDLE, FAR - MIDDLE, 1 << 20),
        },
        rounds,
    )
    found: dict[str, Any] = {name: {"seconds_a_step": harness.spread(x)} for name, x in took.items()}
    for name, base in (("near, large", "near, small"), ("near, grown", "near, small"), ("far, grown", "far, whole")):
        found[name]["time"] = harness.over(took[name], took[base])
    return found | {"rounds": rounds}


def tell(result: dict[str, Any]) -> str:
    """Three tables: speed against dense, memory, growth."""
    runs, grown = result["runs"], result["growth"]
    names = [name for name in KINDS if any(name in run for run in runs.values())]

    def lines(cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        return [[name, *(cell(run[name]) if name in run else "" for run in runs.values())] for name in names]

    def share(x: dict[str, Any]) -> float:
        return (x["weight_bytes"] + x["cache_bytes"]) / x["seconds_a_step"]["median"] / x["read"]

    parts = [harness.headline(result)]
    parts += [f"{key}: {x['day']}, load {x['load']:.1f}–{x['load_at_end']:.1f}" for key, x in result["taken"].items()]
    if runs:
        speed = lines(lambda x: f"{harness.cell(x['speed'])}; {1e3 * x['seconds_a_step']['median']:.2f} ms")
        parts += ["", harness.table(["speed against dense (least–most); a step", *runs], speed)]
        memory = lines(
            lambda x: (
                f"{x['cache_bytes'] / 1e6:,.1f} MB; {x['temp_bytes'] / x['cache_bytes']:.0%}; "
                f"{min(x['alias_bytes'] / x['cache_bytes'], 1):.0%}; {share(x):.2f}"
            )
        )
        head = "cache; temporaries; updated in place; weights and cache a step, of the read limit"
        parts += ["", harness.table([head, *runs], memory)]
    if grown:
        said = {
            "near, small": f"{NEAR}–{NEAR + CHUNKS * CHUNK} tokens, capacity {SMALL}",
            "near, large": f"the same, capacity {LARGE:,}",
            "near, grown": "the same, the loop of `generate`",
            "far, whole": f"{MIDDLE}–{FAR} tokens, capacity {FAR}",
            "far, grown": "the same, the loop of `generate`",
        }
        rows = []
        for name, what in said.items():
            cells = []
            for run in grown.values():
                x = run[name]
                over = f"; {harness.cell(x['time'])}" if "time" in x else ""
                cells.append(f"{1e3 * x['seconds_a_step']['median']:.2f} ms{over}")
            rows.append([what, *cells])
        parts += ["", harness.table(["a step; time against the line with all it needs", *grown], rows)]
    return "\n".join(parts)


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Speed of each kind, and how far rounds differ."""
    axes, runs = figure.add_subplot(), result["runs"]
    names = [name for name in KINDS if any(name in run for run in runs.values())][::-1]
    for i, (key, run) in enumerate(runs.items()):
        there = [name for name in names if name in run]
        at = [names.index(name) + 0.16 * ((len(runs) - 1) / 2 - i) for name in there]
        speed = [run[name]["speed"] for name in there]
        middle = [x["median"] for x in speed]
        ends = [[x["median"] - x["least"] for x in speed], [x["most"] - x["median"] for x in speed]]
        axes.errorbar(middle, at, xerr=ends, fmt="os^Dv<"[i % 6], markersize=4, elinewidth=1, label=key)
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"speed against dense, {FILL:,} of {CAPACITY:,} positions filled (median, least and most)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def before(result: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """What the file of this device has already, if the versions are these."""
    path = harness.place("kinds", folder)
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    same = all(found.get(name) == result[name] for name in ("processor", *harness.PACKAGES))
    return {name: found[name] if same else {} for name in ("runs", "growth", "taken")}


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=list(harness.SHAPES), help="15M and 110M on a CPU, else 1B")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), help="float32 on a CPU, else bfloat16")
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    if a.quick:
        a.rounds, a.batches = 1, a.batches[:1]
    shapes = a.shapes or [x for x in harness.sizes(a.quick) if x not in ("135M", "8B")]
    dtype, names = a.dtype or harness.dtype_here(), list(dict.fromkeys(["dense", *a.kinds]))
    result = harness.begin(a)
    result |= {
        "capacity": CAPACITY,
        "fill": FILL,
        "steps": STEPS,
        **(_nothing() if a.quick else before(result, a.folder)),
    }
    for shape in shapes:
        measure(f"{shape}, {dtype}", "growth", result, a, lambda: growth(shape, dtype, a.rounds))  # noqa: B023
        for batch in a.batches:
            key = f"{shape}, batch {batch}, {dtype}"
            measure(key, "kinds", result, a, lambda: kinds(shape, batch, dtype, names, a.rounds))  # noqa: B023
    harness.done("kinds", result, a, draw, tell(result))


def _nothing() -> dict[str, Any]:
    return {"runs": {}, "growth": {}, "taken": {}}


def measure(
    key: str, part: str, result: dict[str, Any], a: argparse.Namespace, run: Callable[[], dict[str, Any]]
) -> None:
    """One part of one shape, into the result and the file."""
    if part not in a.parts:
        return
    began, facts = time.perf_counter(), harness.facts()
    into = result["growth" if part == "growth" else "runs"]
    into[key] = into.get(key, {}) | run()
    result["taken"][f"{part}, {key}"] = {
        "command": result["command"],
        "day": facts["day"],
        "load": facts["load"],
        "load_at_end": harness.facts()["load"],
        "seconds": time.perf_counter() - began,
    }
    if not (a.no_save or a.quick):
        harness.save("kinds", result | {"load_at_end": harness.facts()["load"]}, a.folder)
    print(f"# {part}, {key}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
