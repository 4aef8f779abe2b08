"""Weights in int8 inside the token loop, against those in float32 and bfloat16: time of a decoded token, bytes of
weights, and bytes that the compiled loop takes besides.

    python benchmarks/weights.py                    # about 4 minutes on two cores, most of it compiling
    python benchmarks/weights.py --shapes 15M --batches 1 --rounds 3

One compiled scan decodes for each way and round; rounds alternate. `int8` is `kvjax.int8_weights`, whose codes are cast
where they are multiplied with. On a CPU XLA lifts that cast out of the loop, so two other ways to multiply are tried
there, which the library does not have: *blocks* casts up to 128 outputs at a time in a loop that depends on the text,
*sums* multiplies and adds without a matrix product. Both keep codes as [out, in]. A way wins where it takes fewer bytes
than the first, weights and temporaries together, and in every round less time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import harness  # noqa: E402  (the path is set above)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

import kvjax  # noqa: E402
from kvjax import caches, sampling, struct  # noqa: E402
from kvjax.loops.decode import DONATING, seeds_of  # noqa: E402
from kvjax.weights import Int8  # noqa: E402

CAPACITY, FILL, STEPS = 256, 192, 32
BLOCK = 128


@struct.node
class Blocks(Int8):
    """Codes `[out, in]`, cast block by block."""

    def times(self, x: Any, axis: int, precise: Any) -> Any:
        outputs = self.codes.shape[0]
        size = next(size for size in range(min(BLOCK, outputs), 0, -1) if outputs % size == 0)

        def one(i: Any, y: Any) -> Any:
            block = lax.dynamic_slice_in_dim(self.codes, i * size, size, 0).astype(x.dtype)
            part = lax.dot_general(x, block, (((1,), (1,)), ((), ())), preferred_element_type=precise)
            return lax.dynamic_update_slice_in_dim(y, part, i * size, 1)

        more = jnp.minimum(jnp.max(jnp.abs(x[:1, :1])), 0).astype(jnp.int32)  # 0: what the loop cannot know beforehand
        y = lax.fori_loop(0, outputs // size + more, one, jnp.zeros((x.shape[0], outputs), precise))
        return y * self.scale.reshape(1, -1)


@struct.node
class Sums(Int8):
    """Codes `[out, in]`, multiplied and added in one fusion; of one row two are made, as XLA:CPU takes one apart."""

    def times(self, x: Any, axis: int, precise: Any) -> Any:
        count = x.shape[0]
        x, codes = lax.optimization_barrier((x, self.codes))  # else the cast is lifted out of the loop
        x = jnp.concatenate([x, x]) if count == 1 else x
        y = lax.optimization_barrier(jnp.sum(codes[:, None, :].astype(precise) * x[None].astype(precise), axis=2)).T
        return y[:count] * self.scale.reshape(1, -1)


def turned(model: kvjax.Model, kind: type[Int8]) -> kvjax.Model:
    """The int8 model with its codes as `[out, in]`, in another class; only for decoding."""

    def of(path: Any, w: Any) -> Any:
        if not isinstance(w, Int8):
            return w
        codes = w.codes.T if path[-1].key == "kernel" else w.codes
        return kind(codes, w.scale, w.dtype)

    is_codes = lambda x: isinstance(x, Int8)  # noqa: E731
    made = jax.tree_util.tree_map_with_path(of, kvjax.int8_weights(model).params, is_leaf=is_codes)
    return model.replace(params=made)


def ways(shape: str) -> dict[str, kvjax.Model]:
    """Models by name; the first is what the others are measured against."""
    here = harness.dtype_here()
    plain = harness.model_of(shape, here)
    found = {here: plain, "int8": kvjax.int8_weights(plain)}
    if jax.default_backend() == "cpu":
        found["bfloat16"] = harness.model_of(shape, "bfloat16")
        found |= {"int8, blocks": turned(plain, Blocks), "int8, sums": turned(plain, Sums)}
    return found


def prepared(model: kvjax.Model, batch: int) -> tuple[Callable[[], float], dict[str, int]]:
    """What takes the seconds of `STEPS` tokens a row, and the bytes of weights and temporaries."""
    make = lambda: harness.filled(model, caches.dense(), batch, CAPACITY, FILL)  # noqa: E731
    logits, seeds, greedy = jnp.zeros((batch, model.vocab_size)), seeds_of(0, batch), sampling.greedy()
    run = DONATING.decode.lower(model, jax.eval_shape(make), logits, greedy, seeds, steps=STEPS).compile()
    bytes_of = {
        "weights": sum(x.nbytes for x in jax.tree.leaves(model.params)),
        "temporary": run.memory_analysis().temp_size_in_bytes,
    }
    return lambda: harness.seconds(lambda cache: run(model, cache, logits, greedy, seeds), make), bytes_of


def measured(shapes: Sequence[str], batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One line a shape, batch and way."""
    lines = []
    for shape in shapes:
        models = ways(shape)
        for batch in batches:
            ready = {name: prepared(model, batch) for name, model in models.items()}
            found = harness.rounds({name: run for name, (run, _) in ready.items()}, rounds)
            first = next(iter(found))
            for name, (_, size) in ready.items():
                each = {name: harness.spread([s / STEPS * 1e3 for s in found[name]]) for name in found}
                line = {"shape": shape, "batch": batch, "way": name, "ms": each[name], "bytes": size}
                less = sum(size.values()) < sum(ready[first][1].values())
                speed = harness.over(found[first], found[name])
                lines.append(line | {"speed": speed, "wins": less and speed["least"] > 1})
    return lines


def table(result: dict[str, Any]) -> str:
    """For the terminal and for documents."""
    head = ("shape", "batch", "weights", "ms a token", "speed", "weights, MB", "temporary, MB", "both win")
    rows = []
    for x in result["lines"]:
        sizes = [f"{x['bytes'][part] / 1e6:.1f}" for part in ("weights", "temporary")]
        won = "yes" if x["wins"] else "no"
        times = [harness.cell(x["ms"]), harness.cell(x["speed"])]
        rows.append((x["shape"], str(x["batch"]), x["way"], *times, *sizes, won))
    return f"{harness.headline(result)}\n\n{harness.table(head, rows)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Speed over bytes, a point a way."""
    axes = figure.subplots()
    for way in dict.fromkeys(x["way"] for x in result["lines"]):
        own = [x for x in result["lines"] if x["way"] == way]
        axes.plot([sum(x["bytes"].values()) / 1e6 for x in own], [x["speed"]["median"] for x in own], "o", label=way)
    axes.set(xscale="log", xlabel="weights and temporaries, MB", ylabel="speed, times the first")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.legend()


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", 5)
    parser.add_argument("--shapes", nargs="+", choices=tuple(harness.SHAPES), help="default: 15M 110M; 1B 8B on others")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    arguments = parser.parse_args(argv)
    if harness.shown(arguments, table, draw):
        return
    shapes = arguments.shapes or [x for x in harness.sizes(arguments.quick) if x != "135M"]
    result = harness.begin(arguments)
    result["lines"] = measured(shapes, arguments.batches, arguments.rounds)
    harness.done("weights", result, arguments, draw, table(result))


if __name__ == "__main__":
    main()
