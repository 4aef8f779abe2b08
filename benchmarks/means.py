"""Ways to multiply by a decoder's matrices, against the way that ships: what each is worth on this device.

A loop of steps that has a decoder's matrices, its residuals and its head, and nothing else: no attention, no norms.
Every column of every product is used; a loop that used half of them would have the other half removed, and win.

shipped            `kvjax.ops.matrices`: queries, keys and values in one matrix, gate and up in one, as [in, out]; on a
                   CPU a single row by parts of the matrix, and the tied head with the table on the left
one product each   the same without parts, the table on the right
parts of N         N parts for a single row, in place of the number that ships
apart              queries, keys, values, gate and up as matrices of their own
[out, in]          the layers' matrices transposed
scanned            matrices of all layers stacked, a scan over the layers in place of an unrolled loop

    python benchmarks/means.py                        (on two cores two minutes)
    python benchmarks/means.py --shapes 110M --batches 1 --rounds 9
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
from jax import lax

import kvjax
from kvjax.config import Config
from kvjax.ops import matrices

STEPS = 16
Array = jax.Array


def plainly(x: Array, w: Array) -> Array:
    """One product."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def in_parts(count: int) -> Callable[[Array, Array], Array]:
    """`matrices.times` of a single row with another number of parts."""

    def times(x: Array, w: Array) -> Array:
        if x.shape[0] != 1 or w.shape[0] % count:
            return plainly(x, w)
        x, w = x.reshape(count, 1, -1), w.reshape(count, -1, w.shape[1])
        return jnp.sum(lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,)))), axis=0)

    return times


def apart(times: Callable[[Array, Array], Array]) -> Callable[[Array, Any], Array]:
    """Of a tuple of matrices, side by side."""
    return lambda x, ws: jnp.concatenate([times(x, w) for w in ws], axis=1)


def turned(x: Array, w: Array) -> Array:
    """By a matrix `[out, in]`."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def layer(config: Config, times: Callable[[Array, Any], Array], x: Array, ws: tuple[Any, ...]) -> Array:
    """The stream `[B, M]` through a layer's four matrices."""
    own, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    q, k, v = jnp.split(times(x, ws[0]), [own, own + kv], axis=1)
    x = x + times(q + jnp.tile(k * v, (1, own // kv)), ws[1])
    gate, up = jnp.split(times(x, ws[2]), 2, axis=1)
    return x + times(gate * up, ws[3])


def layers(model: kvjax.Model) -> list[tuple[Array, ...]]:
    """The four matrices of every layer."""
    parts = (("attn", "qkv"), ("attn", "out"), ("ffn", "gate_up"), ("ffn", "down"))
    each = (model.params["layers"][str(i)] for i in range(model.config.num_layers))
    return [tuple(params[a][b]["kernel"] for a, b in parts) for params in each]


def loop(config: Config, times: Callable[..., Array], head: Callable[..., Array], scanned: bool) -> Callable[..., Any]:
    """Compiled: STEPS steps from the stream `[B, M]`."""

    def run(x: Array, layers: Any, table: Array) -> Array:
        def step(x: Array, _: None) -> tuple[Array, None]:
            if scanned:
                x, _ = lax.scan(lambda x, ws: (layer(config, times, x, ws), None), x, layers)
            else:
                for ws in layers:
                    x = layer(config, times, x, ws)
            return x * 1e-3 + jnp.max(head(x, table), axis=1, keepdims=True) * 1e-9, None

        return lax.scan(step, x, None, length=STEPS)[0]

    return jax.jit(run)


def measure(shape: str, dtype: str, batch: int, count: int) -> dict[str, Any]:
    """Seconds of a step by every way, and its speed against the way that ships."""
    model, c = harness.model_of(shape, dtype), harness.SHAPES[shape]
    table, own, kv = model.params["embed"]["table"], c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    each = layers(model)
    split = [
        (tuple(jnp.split(q, [own, own + kv], axis=1)), (o,), tuple(jnp.split(g, 2, axis=1)), (d,))
        for q, o, g, d in each
    ]
    other = jax.block_until_ready([tuple(jnp.copy(w.T) for w in ws) for ws in each])
    stacked = tuple(jnp.stack(ws) for ws in zip(*each, strict=True))
    one, ships = matrices.times, matrices.times_rows
    ways = {
        "shipped": (loop(c, one, ships, False), each),
        "one product each": (loop(c, plainly, turned, False), each),
        **{f"parts of {n}": (loop(c, in_parts(n), ships, False), each) for n in (2, 8)},
        "apart": (loop(c, apart(one), ships, False), split),
        "[out, in]": (loop(c, turned, ships, False), other),
        "scanned": (loop(c, one, ships, True), stacked),
    }
    if batch > 1:
        ways = {name: way for name, way in ways.items() if not name.startswith("parts")}
    x = jnp.ones((batch, c.width), table.dtype)
    spent = harness.rounds(
        {name: lambda run=run, ws=ws: harness.seconds(lambda: run(x, ws, table)) for name, (run, ws) in ways.items()},
        count,
    )
    return {
        name: {"seconds_a_step": harness.spread([t / STEPS for t in x]), "speed": harness.over(spent["shipped"], x)}
        for name, x in spent.items()
    }


def tell(result: dict[str, Any]) -> str:
    """The table."""
    names = dict.fromkeys(name for ways in result["cases"].values() for name in ways)
    cases = result["cases"]
    lines = [
        [name, *(harness.cell(ways[name]["speed"]) if name in ways else "" for ways in cases.values())]
        for name in names
    ]
    return f"{harness.headline(result)}\n\n{harness.table(['speed against shipped', *cases], lines)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Bars of speed, a panel a case."""
    panels = figure.subplots(1, len(result["cases"]), squeeze=False)[0]
    for axes, (case, ways) in zip(panels, result["cases"].items(), strict=True):
        names = list(ways)[::-1]
        axes.barh(names, [ways[name]["speed"]["median"] for name in names])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=case, xlabel="speed against shipped")


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = harness.options(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", choices=list(harness.SHAPES), help="default: what suits the device")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default=harness.dtype_here())
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    result = harness.begin(a) | {"steps": STEPS, "dtype": a.dtype, "cases": {}}
    for shape in a.shapes or harness.sizes(a.quick)[:2]:
        for batch in a.batches:
            result["cases"][f"{shape}, batch {batch}"] = measure(shape, a.dtype, batch, a.rounds)
            harness.progress(f"{shape}, batch {batch}")
    harness.done("means", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
