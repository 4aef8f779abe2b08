"""Seconds of a step of beam search, by how the beams' texts are kept, against as many rows without beams.

forked     W copies of every prompt, all of it gathered at every step
once       a prompt kept once, only what is new gathered (`kvjax.branched`, what `kvjax.beam` does)
indirect   a prompt kept once, what is new stays where it was written: a table says which row holds each position, and
           keys and values are gathered as they are read
rows       as many rows of greedy decoding, each with its prompt: the baseline

Beams take another parent at every step. The contexts are full: C tokens, then the new ones. The 15M shape, on an
accelerator 1B. Two minutes on two cores.

    python benchmarks/beams.py
    python benchmarks/beams.py --shape 110M --contexts 256 --prompts 1 --no-save
    python benchmarks/beams.py --table benchmarks/results/cpu/beams.json --plot beams.svg
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kvjax
from kvjax import caches, struct
from kvjax.caches import storage
from kvjax.caches.base import Cache, Node, Project, Shared, Span, filled_positions
from kvjax.loops.feed import feed, finish
from kvjax.ops.attention import View
from kvjax.types import Array


@struct.node
class Holders(Shared):
    """Which row holds each position of each row's text, `[B, T]` int32; one table for all layers."""

    table: Array

    def reserve(self, span: Span) -> tuple[Holders, Array]:
        """The new tokens are the row's own."""
        rows = jnp.arange(self.table.shape[0], dtype=jnp.int32)
        table = self.table.at[rows, span.start].set(rows, mode="drop")
        return Holders(table), jnp.zeros_like(rows)

    def take(self, rows: Array) -> tuple[Holders, Array]:
        """Only the table moves."""
        return Holders(jnp.take(self.table, rows, axis=0)), jnp.zeros_like(rows)


@struct.node
class Indirect(Node):
    """Keys and values `[B * K, T, D]` that stay in the row where they were written."""

    k: Array
    v: Array
    heads: int = struct.static()

    def extend(self, h: Any, project: Project, span: Span, shared: Any) -> tuple[tuple[View, ...], Indirect]:
        """Gathers what each row reads."""
        k, v = project.kv(h, span.positions)
        node = self.replace(k=storage.put(self.k, k, span.order), v=storage.put(self.v, v, span.order))
        table, (rows, slots) = shared["holders"].table, shared["holders"].table.shape
        at = (table[:, None, :] * self.heads + jnp.arange(self.heads)[None, :, None]).reshape(rows * self.heads, slots)
        k, v = (x[at, jnp.arange(slots)[None, :]] for x in (node.k, node.v))
        return (View(k, v, filled_positions(slots, span.end)),), node

    def take(self, rows: Array, before: Any, shared: Any) -> Indirect:
        """Nothing moves."""
        return self


def indirect(cache: Cache, heads: int) -> Cache:
    """What `kvjax.branched` made, with suffixes that stay."""
    common, room = cache.shared["prefix"], cache.shared["prefix"].room
    table = jnp.broadcast_to(jnp.arange(cache.batch, dtype=jnp.int32)[:, None], (cache.batch, room))
    own = [Indirect(jnp.copy(x.suffix.k.data), jnp.copy(x.suffix.v.data), heads) for x in cache.layers]
    layers = tuple(node.replace(suffix=suffix) for node, suffix in zip(cache.layers, own, strict=True))
    return cache.replace(layers=layers, shared={"prefix": common.replace(suffix={"holders": Holders(table)})})


def search(width: int, moves: bool) -> Callable[..., Any]:
    """A loop of steps with what a beam search does besides: sums, the best, parents, and caches that move."""

    def run(model: kvjax.Model, cache: Cache, logits: Array, steps: int) -> Any:
        rows = cache.batch
        ones = jnp.ones((rows,), jnp.int32)

        def one(carry: Any, turn: Array) -> Any:
            cache, logits, total = carry
            each = jax.nn.log_softmax(logits) + total[:, None]
            best, at = lax.top_k(each.reshape(rows // width, -1), width)
            token, total = (at % logits.shape[1]).reshape(-1), best.reshape(-1)
            # Beams cross at every step, whatever the random model says.
            parent = (jnp.arange(rows) // width) * width + (jnp.arange(rows) + turn) % width
            cache = cache.reorder(parent.astype(jnp.int32)) if moves else cache
            x, cache = feed(model, cache, token[:, None].astype(jnp.int32), ones)
            logits, cache = finish(model, cache, x, ones)
            return (cache, logits[:, 0], total), None

        return lax.scan(one, (cache, logits, jnp.zeros((rows,))), jnp.arange(steps))[0][0]

    return jax.jit(run, static_argnames="steps", donate_argnums=1)


def case(model: kvjax.Model, prompts: int, context: int, a: Any, programs: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, in turn, and bytes of what is kept."""
    random, vocab = np.random.default_rng(0), model.config.vocab_size
    tokens = random.integers(0, vocab, (prompts, context)).astype(np.int32)
    _, cache = kvjax.prefill(model, kvjax.init_cache(model, caches.dense(), batch=prompts, capacity=context), tokens)
    logits = jnp.asarray(random.normal(size=(prompts * a.width, vocab)), model.params["embed"]["table"].dtype)
    once = kvjax.branched(cache, a.width, room=a.steps)
    forked = cache.resize(context + a.steps).fork(a.width)
    given = {
        "forked": (programs["moving"], forked),
        "once": (programs["moving"], once),
        "indirect": (programs["moving"], indirect(once, model.config.kv_heads)),
        "rows": (programs["still"], forked),
    }
    copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x))  # it will be used up
    ways = {
        name: functools.partial(
            harness.seconds, lambda own, run=run: run(model, own, logits, a.steps), functools.partial(copy, kept)
        )
        for name, (run, kept) in given.items()
    }
    took = harness.rounds(ways, a.rounds)
    return {
        name: {
            "bytes": given[name][1].nbytes,
            "seconds_a_step": harness.spread([x / a.steps for x in took[name]]),
            "of_rows": harness.over(took[name], took["rows"]),
        }
        for name in ways
    }


def tell(result: dict[str, Any]) -> str:
    """A line a case and a way."""
    lines = []
    for what, rows in result["cases"].items():
        for name, row in rows.items():
            step, size = harness.cell({k: 1e3 * v for k, v in row["seconds_a_step"].items()}), row["bytes"] / 1e6
            lines.append([what, name, step, harness.cell(row["of_rows"]), f"{size:,.1f}"])
    head = ["", "kept", "ms a step", "over that of rows", "MB"]
    return f"{harness.headline(result)}\n{result['shape']}, {result['dtype']}\n\n{harness.table(head, lines)}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """A step over that of as many rows."""
    axes, cases = figure.add_subplot(), result["cases"]
    for i, name in enumerate(("forked", "once", "indirect")):
        over = [rows[name]["of_rows"] for rows in cases.values()]
        at = [n + 0.12 * (i - 1) for n in range(len(over))]
        middle = [x["median"] for x in over]
        ends = [[x["median"] - x["least"] for x in over], [x["most"] - x["median"] for x in over]]
        axes.errorbar(at, middle, yerr=ends, fmt="os^"[i], markersize=5, elinewidth=1, label=name)
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_ylabel("time of a step over that of as many rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title=f"{result['width']} beams, prompts kept", fontsize=8)


def main() -> None:
    parser = harness.options(__doc__, 7)
    for name, value in (("width", 4), ("steps", 32)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    for name, many in (("contexts", [256, 1024]), ("prompts", [1, 4])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=many, help=f"default {many}")
    parser.add_argument("--shape", choices=list(harness.SHAPES), help="15M on a CPU, else 1B")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), help="float32 on a CPU, else bfloat16")
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    if a.quick:
        a.contexts, a.prompts, a.rounds = [64], [1], 1
    a.shape, a.dtype = a.shape or harness.sizes(a.quick)[0], a.dtype or harness.dtype_here()
    model, programs = harness.model_of(a.shape, a.dtype), {"moving": search(a.width, True), "still": search(1, False)}
    result = harness.begin(a) | {"shape": a.shape, "dtype": a.dtype, "width": a.width, "steps": a.steps, "cases": {}}
    for prompts in a.prompts:
        for context in a.contexts:
            what = f"{prompts} prompt{'s' * (prompts > 1)}, context {context:,}"
            result["cases"][what] = case(model, prompts, context, a, programs)
    harness.done("beams", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
