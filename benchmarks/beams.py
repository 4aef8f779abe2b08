"""Seconds of a step of beam search, by how the beams' texts are kept, against as many rows without beams.

forked     W copies of every prompt, all of it gathered at every step
once       a prompt kept once, only what is new gathered (`kvjax.branched`, what `kvjax.beam` does)
indirect   a prompt kept once, what is new stays where it was written: a table says which row holds each position, and
           keys and values are gathered as they are read
rows       as many rows of greedy decoding, each with its prompt: the baseline

Beams take another parent at every step. The contexts are full: C tokens, then the new ones.

python benchmarks/beams.py
python benchmarks/beams.py --layers 2 --contexts 64 --rounds 2 --no-save         (half a minute)
"""

from __future__ import annotations

import argparse
import time
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
from kvjax.config import Config
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


def model_of(layers: int, vocab: int) -> kvjax.Model:
    """A random decoder of 6 heads of 48 numbers."""
    config = Config(vocab, layers, 288, query_heads=6, kv_heads=6, head_dim=48, ffn_width=768)
    return kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0)))


def indirect(cache: Cache) -> Cache:
    """What `kvjax.branched` made, with suffixes that stay."""
    common, room = cache.shared["prefix"], cache.shared["prefix"].room
    table = jnp.broadcast_to(jnp.arange(cache.batch, dtype=jnp.int32)[:, None], (cache.batch, room))
    own = [Indirect(jnp.copy(x.suffix.k.data), jnp.copy(x.suffix.v.data), 6) for x in cache.layers]
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


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("vocab", 32000), ("width", 4), ("steps", 32), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, many in (("contexts", [256, 1024]), ("prompts", [1, 4])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=many)
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args()
    model, random, began, cases = model_of(a.layers, a.vocab), np.random.default_rng(0), harness.facts(), {}
    programs = {"moving": search(a.width, True), "still": search(1, False)}
    print(f"{'':26}{'ms a step':>11}{'(least, most)':>18}{'of rows':>9}{'MB':>8}")
    for prompts, context in ((p, c) for p in a.prompts for c in a.contexts):
        tokens = random.integers(0, a.vocab, (prompts, context)).astype(np.int32)
        _, cache = kvjax.prefill(
            model, kvjax.init_cache(model, caches.dense(), batch=prompts, capacity=context), tokens
        )
        logits = jnp.asarray(random.normal(size=(prompts * a.width, a.vocab)).astype(np.float32))
        room = a.steps
        once = kvjax.branched(cache, a.width, room=room)
        forked = cache.resize(context + room).fork(a.width)
        ways = {
            "forked": (programs["moving"], forked),
            "once": (programs["moving"], once),
            "indirect": (programs["moving"], indirect(once)),
            "rows": (programs["still"], forked),
        }
        made: dict[str, Any] = {name: {"bytes": way[1].nbytes, "ms": []} for name, way in ways.items()}
        for turn in range(a.rounds + 1):  # the first compiles
            for name, (run, given) in ways.items():
                own = jax.block_until_ready(jax.tree.map(jnp.copy, given))  # it will be used up
                start = time.perf_counter()
                jax.block_until_ready(run(model, own, logits, a.steps))
                made[name]["ms"] += [1e3 * (time.perf_counter() - start) / a.steps] if turn else []
        base = harness.median(made["rows"]["ms"])
        for name, row in made.items():
            row |= {"median": harness.median(row["ms"]), "least": min(row["ms"]), "most": max(row["ms"])}
            row["of_rows"] = row["median"] / base
            what = f"{prompts} x {a.width}, {context}: {name}"
            span = f"({row['least']:.2f}, {row['most']:.2f})"
            print(f"{what:26}{row['median']:11.2f}{span:>18}{row['of_rows']:9.2f}{row['bytes'] / 1e6:8.1f}", flush=True)
        cases[f"{prompts} prompts, context {context}"] = made
    result = {"facts": began, "load_at_end": harness.facts()["load"], "arguments": vars(a), "cases": cases}
    if not a.no_save:
        print(harness.save(f"beams-{began['jax']}", result))


if __name__ == "__main__":
    main()
