"""What keeping the source costs and saves: seconds of a decoded token, one call a token against all tokens in one loop.

Three ways: keys and values projected once, the encoder's output projected again with every call, and absorbed. In one
loop the compiler can take the projection out, as nothing in it changes; the compiled loop is looked at for that.

python benchmarks/cross_attention.py
python benchmarks/cross_attention.py --layers 2 --width 128 --no-save         (half a minute)
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import numpy as np

import kvjax
from kvjax import caches
from kvjax.caches.base import Cache
from kvjax.config import Config
from kvjax.loops.decode import DONATING, seeds_of
from kvjax.ops import activations
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Sinusoidal

KINDS = {
    "projected once": caches.cross(),
    "projected again": caches.encoder_output(),
    "absorbed": caches.encoder_output(absorb=True),
}
CASES = {"1 row": (1, 1), "4 rows": (4, 4), "4 rows of 1 source": (4, 1)}
"""Rows of the batch and sources."""

VOCAB = 1000


def model_of(layers: int, width: int) -> kvjax.Model:
    """A random encoder-decoder, heads of 64 numbers."""
    stack = Config(
        VOCAB,
        layers,
        width,
        query_heads=width // 64,
        kv_heads=width // 64,
        head_dim=64,
        ffn_width=4 * width,
        norm=LayerNorm(),
        activation=activations.relu,
        gated=False,
        positions=Sinusoidal(),
    )
    config = Config(**{**vars(stack), "encoder": stack})
    return kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0)))


def in_loops(program: str, wanted: str) -> tuple[int, int]:
    """How many products of a shape a compiled program contains inside its loops, and outside.

    Args:
        program: optimised HLO.
        wanted: as in `f32[128,1024]`.
    """
    bodies: dict[str, str] = {}
    for found in re.finditer(
        r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL
    ):
        bodies[found[1]] = found[2]
    reached = set(re.findall(r"body=%?([\w.\-]+)", program))
    todo = list(reached)
    while todo:
        called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", bodies.get(todo.pop(), ""))
        todo += [name for name in called if name not in reached]
        reached |= set(called)
    product = re.compile(rf"= {re.escape(wanted)}\S* (?:dot|custom-call)\(")
    made = {name: len(product.findall(body)) for name, body in bodies.items()}
    inside = sum(n for name, n in made.items() if name in reached)
    return inside, sum(made.values()) - inside


def stepwise(model: kvjax.Model, cache: Cache, tokens: np.ndarray, steps: int) -> Any:
    """One call a token."""
    logits = None
    for _ in range(steps):
        logits, cache = kvjax.donating.step(model, cache, tokens)
    return logits


def looped(model: kvjax.Model, cache: Cache, tokens: np.ndarray, steps: int) -> Any:
    """All tokens in one call."""
    return kvjax.donating.decode(model, cache, np.zeros((len(tokens), VOCAB), np.float32), steps=steps)[0]


def seconds(run: Callable[..., Any], model: kvjax.Model, cache: Cache, tokens: np.ndarray, steps: int) -> float:
    """Of one token."""
    own = jax.block_until_ready(jax.tree.map(lambda x: x + 0, cache))  # it will be used up
    began = time.perf_counter()
    jax.block_until_ready(run(model, own, tokens, steps))
    return (time.perf_counter() - began) / steps


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("width", 512), ("source", 128), ("steps", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    model, random = model_of(a.layers, a.width), np.random.default_rng(0)
    began, cases = harness.facts(), {}
    print(f"{'milliseconds a token':34}{'a call each':>14}{'in one loop':>14}   projections inside the loop, outside")
    for case, (batch, sources) in CASES.items():
        source = kvjax.encode(model, random.integers(0, VOCAB, (sources, a.source)).astype(np.int32))
        tokens = np.zeros((batch,), np.int32)
        made: dict[str, Any] = {}
        for name, kind in KINDS.items():
            cache = kvjax.init_cache(model, batch=batch, capacity=max(a.steps, 16), source=source, cross=kind)
            zeros = np.zeros((batch, VOCAB), np.float32)
            program = DONATING.decode.lower(
                model, cache, zeros, kvjax.sampling.greedy(), seeds_of(0, batch), steps=a.steps
            ).compile()
            shape = f"f32[{sources * source.states.shape[1]},{2 * a.width}]"
            inside, outside = in_loops(program.as_text(), shape)
            made[name] = {
                "cache": cache,
                "source_bytes": sum(x.nbytes for x in jax.tree.leaves(cache.shared["source"])),
                "projections_in_the_loop": inside,
                "projections_outside": outside,
                "stepwise": [],
                "looped": [],
            }
        for turn in range(a.rounds + 1):  # the first compiles
            for row in made.values():
                for way, run in (("stepwise", stepwise), ("looped", looped)):
                    took = seconds(run, model, row["cache"], tokens, a.steps)
                    row[way] += [took] if turn else []
        for name, row in made.items():
            del row["cache"]
            middle = {way: harness.median(row[way]) for way in ("stepwise", "looped")}
            row["median"] = middle
            where = f"{row['projections_in_the_loop']}, {row['projections_outside']}"
            print(f"{case + ': ' + name:34}{1e3 * middle['stepwise']:14.2f}{1e3 * middle['looped']:14.2f}   {where}")
        cases[case] = made
    result = {"facts": began, "load_at_end": harness.facts()["load"], "arguments": vars(a), "cases": cases}
    if not a.no_save:
        print(harness.save(f"cross_attention-{began['jax']}", result))


if __name__ == "__main__":
    main()
