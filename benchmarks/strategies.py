"""What could be kept of a text and of its source, over length: seconds a token as `kvjax.costs` predicts, and measured.

    python benchmarks/strategies.py
    python benchmarks/strategies.py --plot docs/strategies.svg
    python benchmarks/strategies.py --panels decoder          (what the file has of the other panel stays)
    python benchmarks/strategies.py --table benchmarks/results/cpu/strategies.json --plot docs/strategies.svg

One row. The model is the textbook's (6 layers, width 512, 8 heads, feed-forward 2,048, vocabulary 37,000), without and
with an encoder; on an accelerator the 1B shape. Positions are learned, so that layer inputs can be absorbed.

decoder           a token in one loop, over the positions that the cache has; all but the last few are filled
encoder-decoder   the same over the source's positions, with 64 of the text. Projecting the source again is also timed
                  as a call of its own: out of a loop the compiler takes it

Predicted from FLOPs, from the bytes that a step reads, and from the limits of the device measured in the same run, part
by part: max(linear FLOPs / F, weight bytes / W) + FLOPs of making keys and values again / F + max(FLOPs of scores / F,
bytes read of what is kept / W). Writing, and what a step makes and reads again, is not in it. Four minutes on two
cores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import costs
from kvjax.caches.base import Cache
from kvjax.config import Config
from kvjax.strategies import STRATEGIES, WITH_SOURCE, Strategy, with_encoder, without_rotation

TEXT = 64
"""Positions of the text beside a source."""

STEPS = 16
"""Tokens of a loop; fewer where a step runs the whole text again."""

DECODER, ENCODER = "decoder", "encoder-decoder"
PANELS = {DECODER: STRATEGIES, ENCODER: WITH_SOURCE}

LINES: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    "projected again": ("input, projected", "output", "input, source K/V", "sub-layers, source K/V"),
    "source projected": ("K/V, source projected",),
    "absorbed": ("input, absorbed", "K/V, source absorbed"),
    "K/V": ("K/V", "hybrid", "K/V, source K/V", "everything"),
}
"""Strategies whose steps are predicted to take the same."""
COLOURS = dict(zip(LINES, ("#4d4d4d", "#c1272d", "#e08214", "#7b3294", "#0571b0"), strict=True))


def config_of(shape: str) -> Config:
    """Without an encoder."""
    return dataclasses.replace(costs.TEXTBOOK, encoder=None) if shape == "textbook" else harness.SHAPES[shape]


def model_of(panel: str, shape: str, size: int, dtype: str) -> kvjax.Model:
    """A random one that knows `size` positions."""
    like = with_encoder if panel == ENCODER else without_rotation
    return like(config_of(shape), size, harness.DTYPES[dtype])


def read_bytes(strategy: Strategy, config: Config, slots: int, source: int | None, dtype: Any) -> int:
    """What a step reads of what is kept: the container, what attention reads of the text, and of the source."""
    kept = {costs.recompute_flops: costs.recompute_nbytes, costs.kv_flops: costs.dense_nbytes}
    own = kept.get(strategy.flops)
    if own is costs.recompute_nbytes:
        text = costs.recompute_nbytes(config, batch=1, capacity=slots)
    else:
        text = (own or costs.layer_input_nbytes)(config, batch=1, capacity=slots, store=dtype)
    if strategy.source is None or source is None:
        return text
    once = strategy.source.nbytes(config, source=source, rows=1, store=dtype)
    # Every layer reads its own keys and values, or all of them the same output of the encoder.
    return text + once * (1 if strategy.source.nbytes is costs.cross_nbytes else config.num_layers)


def flops_of(strategy: Strategy, config: Config, slots: int, source: int | None) -> tuple[costs.Flops, float]:
    """Of one step; and what of its linear work is not that of K/V."""
    queries = slots if strategy.whole else 1
    flops = strategy.flops(config, batch=1, slots=slots)
    usual = costs.kv_flops(config, slots=slots, queries=queries)
    if strategy.source is not None and source is not None:
        flops += strategy.source.flops(config, source=source, rows=1, batch=1, queries=queries)
        usual += costs.cross_flops(config, source=source, queries=queries)
    return flops, (flops.contractions - flops.scores) - (usual.contractions - usual.scores)


def predicted(
    strategy: Strategy,
    config: Config,
    slots: int,
    source: int | None,
    dtype: Any,
    weights: int,
    limits: dict[str, float],
) -> float:
    """Seconds of a step, by the limits of the device."""
    flops, more = flops_of(strategy, config, slots, source)
    f, w = limits["matrix"], limits["read"]
    linear = max((flops.contractions - flops.scores - more) / f, weights / w) + more / f
    return linear + max(flops.scores / f, read_bytes(strategy, config, slots, source, dtype) / w)


def weight_bytes(model: kvjax.Model) -> int:
    """Of what a step of the decoder reads: not the encoder, nor what projects a source."""
    params = {name: x for name, x in model.params.items() if name != "encoder"}
    return sum(x.nbytes for x in jax.tree.leaves(params))


def ways_of(model: kvjax.Model, strategy: Strategy, length: int) -> tuple[Cache, dict[str, Callable[[], float]]]:
    """The cache that a strategy has at a length, and what times a token of it."""
    source, slots, cross = None, length, None
    if strategy.source is not None:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length)).astype(np.int32)
        source, slots, cross = kvjax.encode(model, ids), TEXT, strategy.source.cross
    steps = 2 if strategy.whole else STEPS
    cache = kvjax.init_cache(model, strategy.plan, batch=1, capacity=slots, source=source, cross=cross)
    fill = jnp.full((1,), slots - steps, jnp.int32)
    cache = cache.replace(lengths=fill, written=fill + 0)
    logits, make = jnp.zeros((1, model.config.vocab_size)), functools.partial(jax.tree.map, jnp.copy, cache)

    def loop(cache: Cache) -> Any:
        return kvjax.donating.decode(model, cache, logits, steps=steps)[0]

    def calls(cache: Cache) -> Any:
        for _ in range(steps):
            made, cache = kvjax.donating.step(model, cache, np.zeros((1,), np.int32))
        return made

    ways = {"loop": lambda: harness.seconds(loop, make) / steps}
    if strategy.source is not None and strategy.source.flops is costs.cross_reprojected_flops and not strategy.whole:
        ways["calls"] = lambda: harness.seconds(calls, make) / steps
    return cache, ways


def panel_of(panel: str, a: Any, limits: dict[str, float]) -> dict[str, Any]:
    """Every strategy at every length, in turn."""
    model = model_of(panel, a.shape, max(a.lengths), a.dtype)
    dtype, weights = harness.DTYPES[a.dtype], weight_bytes(model)
    caches, ways = {}, {}
    for strategy in PANELS[panel]:
        for length in a.lengths:
            caches[strategy.name, length], made = ways_of(model, strategy, length)
            ways |= {(strategy.name, length, name): way for name, way in made.items()}
    took = harness.rounds(ways, a.rounds)
    found: dict[str, Any] = {}
    for strategy in PANELS[panel]:
        rows = []
        for length in a.lengths:
            slots, source = (length, None) if panel == DECODER else (TEXT, length)
            flops, _ = flops_of(strategy, model.config, slots, source)
            row = {
                "length": length,
                "cache_bytes": caches[strategy.name, length].nbytes,
                "read_bytes": read_bytes(strategy, model.config, slots, source, dtype),
                "flops": flops.contractions,
                "predicted": predicted(strategy, model.config, slots, source, dtype, weights, limits),
            }
            row |= {
                name: harness.spread(took[strategy.name, length, name])
                for name in ("loop", "calls")
                if (strategy.name, length, name) in took
            }
            rows.append(row)
        found[strategy.name] = rows
    return {"weight_bytes": weights, "strategies": found, "ceilings": limits}


def tell(result: dict[str, Any]) -> str:
    """Measured against predicted, a table a panel."""
    parts = [harness.headline(result)]
    for panel, made in result["panels"].items():
        lengths = [row["length"] for row in next(iter(made["strategies"].values()))]
        lines = []
        for name, rows in made["strategies"].items():
            for way in ("loop", "calls"):
                if way not in rows[0]:
                    continue
                cells = [f"{ms(row[way]['median'])}; {row[way]['median'] / row['predicted']:.2f}" for row in rows]
                said = name if way == "loop" else f"{name}, a call each"
                lines.append([said, *cells, f"{rows[-1]['cache_bytes'] / 1e6:,.2f} MB"])
        over = "positions" if panel == DECODER else f"source, {TEXT} of the text"
        head = [f"{panel}: ms a token; measured ÷ predicted", *(f"{n:,} {over}" for n in lengths)]
        parts += ["", harness.table([*head, "kept at the last"], lines)]
    return "\n".join(parts)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Points are measured, lines predicted; a panel without and one with an encoder."""
    axes = figure.subplots(1, len(result["panels"]), sharey=True, squeeze=False)[0]
    for ax, (panel, made) in zip(axes, result["panels"].items(), strict=True):
        _draw_panel(ax, panel, made, result)
    axes[0].set_ylabel("milliseconds a token")


def _draw_panel(ax: Any, panel: str, made: dict[str, Any], result: dict[str, Any]) -> None:
    config = model_config(panel, result)
    lengths = [row["length"] for row in next(iter(made["strategies"].values()))]
    fine = np.unique(np.geomspace(lengths[0], lengths[-1], 60).astype(int)).tolist()
    known, ends = {strategy.name: strategy for strategy in PANELS[panel]}, []
    for line, names in LINES.items():
        there = [name for name in names if name in made["strategies"]]
        if not there:
            continue
        colour, first = COLOURS[line], known[there[0]]
        curve = [
            predicted(
                first,
                config,
                *((n, None) if panel == DECODER else (TEXT, n)),
                harness.DTYPES[result["dtype"]],
                made["weight_bytes"],
                made["ceilings"],
            )
            for n in fine
        ]
        ax.plot(fine, [1e3 * x for x in curve], color=colour, linewidth=1.2, zorder=1)
        for i, name in enumerate(there):
            for way, marker in (("loop", "o" if not i else "s"), ("calls", "^")):
                rows = made["strategies"][name]
                if way not in rows[0]:
                    continue
                middle = [1e3 * row[way]["median"] for row in rows]
                low = [m - 1e3 * row[way]["least"] for m, row in zip(middle, rows, strict=True)]
                high = [1e3 * row[way]["most"] - m for m, row in zip(middle, rows, strict=True)]
                label = name if way == "loop" else f"{name}, a call each"
                ax.errorbar(
                    lengths,
                    middle,
                    yerr=[low, high],
                    color=colour,
                    fmt=marker,
                    markersize=5,
                    markerfacecolor=colour if not i and way == "loop" else "white",
                    elinewidth=0.8,
                    label=label,
                )
                ends.append(middle[-1])
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(ends)), key=lambda i: -ends[i])
    ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=8, loc="upper left")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    bottom, top = ax.get_ylim()
    ticks = [m * 10**e for e in range(-3, 5) for m in (1, 2, 5) if bottom <= m * 10**e <= top]
    ax.set_yticks(ticks, [f"{y:g}" for y in ticks])
    ax.minorticks_off()
    over = "positions of the text" if panel == DECODER else f"positions of the source ({TEXT} of the text)"
    ax.set_xlabel(over)
    ax.set_title(f"{panel}: points measured, lines predicted", fontsize=9, loc="left")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def model_config(panel: str, result: dict[str, Any]) -> Config:
    """Of the model that was measured."""
    config = config_of(result["shape"])
    return config if panel == DECODER else dataclasses.replace(config, encoder=config)


def before(result: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Panels of the same model that the file of this device has already, if the versions are these."""
    path = harness.place("strategies", folder)
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    same = all(found.get(name) == result[name] for name in ("shape", "dtype", "processor", *harness.PACKAGES))
    return found["panels"] if same else {}


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="powers of two; 64 to 1,024 on a CPU, else to 16,384")
    parser.add_argument("--shape", choices=["textbook", *harness.SHAPES], help="textbook on a CPU, else 1B")
    parser.add_argument("--panels", nargs="+", default=list(PANELS), choices=list(PANELS))
    parser.add_argument("--dtype", choices=list(harness.DTYPES), help="float32 on a CPU, else bfloat16")
    a = parser.parse_args()
    if harness.shown(a, tell, draw):
        return
    on_cpu = jax.default_backend() == "cpu"
    a.dtype = a.dtype or harness.dtype_here()
    a.shape = a.shape or ("tiny" if a.quick else "textbook" if on_cpu else "1B")
    a.lengths = a.lengths or ([32, 64] if a.quick else [2**i for i in (range(6, 11) if on_cpu else range(8, 15))])
    a.rounds = 1 if a.quick else a.rounds
    result: dict[str, Any] = harness.begin(a) | {"shape": a.shape, "dtype": a.dtype}
    made = before(result, a.folder) | {panel: panel_of(panel, a, result["ceilings"]) for panel in a.panels}
    result["panels"] = {panel: made[panel] for panel in PANELS if panel in made}
    harness.done("strategies", result, a, draw, tell(result))


if __name__ == "__main__":
    main()
