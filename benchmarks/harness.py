"""What every benchmark here shares: machine and versions, alternating rounds, the machine's own limits, tables, plots,
and one JSON file a device and a question.

Limits are measured beside what they judge, in the same process: how fast the device reads, and how fast it multiplies.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kvjax
from kvjax.caches.base import Span
from kvjax.config import Config
from kvjax.ops.matrices import times
from kvjax.timing import processor

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
SHAPES = {
    "tiny": Config(512, 2, 64, 4, 2, 16, 128),
    "15M": Config(32_000, 6, 288, 6, 6, 48, 768),
    "110M": Config(32_000, 12, 768, 12, 12, 64, 2048),
    "135M": Config(49_152, 30, 576, 9, 3, 64, 1536),
    "1B": Config(128_256, 16, 2048, 32, 8, 64, 8192),
    "8B": Config(128_256, 32, 4096, 32, 8, 128, 14_336, tied=False),
}
"""Llama's layer: llama2.c's two sizes, SmolLM, Llama 3.2 and Llama 3."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def median(values: Sequence[float]) -> float:
    """The middle one; the mean of the two middle ones."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def facts(cores: int | None = None) -> dict[str, Any]:
    """Machine, versions and day; `cores` where a benchmark used fewer than there are."""
    return {
        "processor": processor(),
        "cores": cores or os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "kvjax": kvjax.__version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device_name() -> str:
    """A folder's name for the device that JAX chooses: `cpu`, `nvidia-h200`, `tpu-v5-lite`."""
    device = jax.devices()[0]
    return re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")


def place(name: str, folder: str | None = None) -> Path:
    """`results/<folder>/<name>.json`; without one, the folder of the device."""
    return RESULTS / (folder or device_name()) / f"{name}.json"


def save(name: str, result: dict[str, Any], folder: str | None = None) -> Path:
    """Writes `place(name, folder)`."""
    path = place(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def seconds(run: Callable[..., Any], make: Callable[[], Any] | None = None) -> float:
    """Of one call, to the end of its work on the device; `make` gives its argument, outside the time."""
    given = () if make is None else (jax.block_until_ready(make()),)
    began = time.perf_counter()
    jax.block_until_ready(run(*given))
    return time.perf_counter() - began


def rounds(ways: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """What each way returns (seconds), `count` times, in turn; a first round warms up and is dropped."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count + 1):
        for name, way in ways.items():
            spent = way()
            if turn:
                found[name].append(spent)
    return found


def over(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """`a / b` within each round."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


@functools.cache
def ceilings() -> dict[str, float]:
    """What the device can do, each the best of several: bytes a second that a product of a matrix with one row reads,
    bytes a second that a copy reads and writes, and multiplications and additions a second in a product of matrices."""
    on_cpu = jax.default_backend() == "cpu"
    dtype, wide, tall, square = (jnp.float32, 4096, 1 << 15, 2048) if on_cpu else (jnp.bfloat16, 8192, 1 << 17, 8192)
    matrix, row = jnp.ones((tall, wide), dtype), jnp.ones((1, tall), dtype)
    # The row is made anew from the result: turns of a loop can neither overlap nor be hoisted.
    turns = 3 if on_cpu else 20

    def read(matrix: jax.Array, row: jax.Array) -> jax.Array:
        def turn(_: Any, row: jax.Array) -> jax.Array:
            return row + 0 * times(row, matrix)[:, :1]

        return jax.lax.fori_loop(0, turns, turn, row)

    def copy(matrix: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: x + 1, matrix)

    reading, copying = jax.jit(read), jax.jit(copy)
    time_read = min(rounds({"": lambda: seconds(lambda: reading(matrix, row))}, 9)[""]) / turns
    time_copy = min(rounds({"": lambda: seconds(lambda: copying(matrix))}, 5)[""]) / turns
    size = matrix.nbytes
    a = jnp.ones((square, square), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a))
    time_product = min(rounds({"": lambda: seconds(lambda: product(a))}, 5)[""])
    return {"read": size / time_read, "copy": 2 * size / time_copy, "matrix": 2 * square**3 / time_product}


@functools.cache
def model_of(shape: str, dtype: str = "float32") -> kvjax.Model:
    """A random decoder of a named shape, made on the device."""
    config = SHAPES[shape]
    make = jax.jit(lambda key: kvjax.init_params(config, key, DTYPES[dtype]))
    return kvjax.decoder(config, jax.block_until_ready(make(jax.random.key(0))))


def sizes(quick: bool) -> list[str]:
    """Shapes that a benchmark takes on this device if nobody says which."""
    if quick:
        return ["tiny"]
    return ["15M", "110M", "135M"] if jax.default_backend() == "cpu" else ["1B", "8B"]


def dtype_here() -> str:
    """What decoding computes in on this device if nobody says."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def options(doc: str, count: int = 5) -> argparse.ArgumentParser:
    """The options that all scripts have; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=count, help=f"alternating, after one that warms up ({count})")
    parser.add_argument("--quick", action="store_true", help="a tiny shape: only whether it runs; saves nothing")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--folder", help="of the results, for a second machine; default: what JAX calls the device")
    parser.add_argument("--note", default="", help="kept in the file")
    parser.add_argument("--table", metavar="FILE", type=Path, help="print the table of a file, and nothing else")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw what was measured, or the file of --table")
    return parser


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """The head of a result: command, note, machine, limits."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "note": arguments.note, **facts(), "ceilings": ceilings(), "rounds": arguments.rounds}


def headline(result: Mapping[str, Any]) -> str:
    """Machine, versions, limits, in a line or two."""
    c = result["ceilings"]
    ended = f"–{result['load_at_end']:.1f}" if "load_at_end" in result else ""
    return (
        f"jax {result['jax']}, Python {result['python']}, {result['processor']}, {result['cores']} cores, "
        f"{result['day']}, load {result['load']:.1f}{ended}, median (least–most) of {result['rounds']} rounds\n"
        f"this device reads {c['read'] / 1e9:.1f} GB/s, copies {c['copy'] / 1e9:.1f} GB/s (read and written), "
        f"multiplies {c['matrix'] / 1e12:.3g} TFLOP/s"
    )


def progress(what: str) -> None:
    """One line to standard error, for those who wait."""
    print(f"# {what}", file=sys.stderr, flush=True)


def cell(values: Mapping[str, float], form: str = ".2f") -> str:
    """`median (least–most)`."""
    return f"{values['median']:{form}} ({values['least']:{form}}–{values['most']:{form}})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown whose columns line up in a terminal."""
    rows = [list(head), *(list(line) for line in lines)]
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, width, strict=True)) + " |" for row in rows]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def done(
    name: str, result: dict[str, Any], arguments: argparse.Namespace, draw: Callable[..., None], text: str
) -> None:
    """Prints the table, saves and draws as the options say."""
    result["load_at_end"] = facts()["load"]
    print(text)
    if not (arguments.no_save or arguments.quick):
        print(save(name, result, arguments.folder))
    if arguments.plot:
        plot(arguments.plot, result, draw)


def shown(arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], str], draw: Callable[..., None]) -> bool:
    """Whether `--table` asked for a file that there is already; then its table was printed and its plot drawn."""
    if arguments.table is None:
        return False
    result = json.loads(arguments.table.read_text("utf-8"))
    print(tell(result))
    if arguments.plot:
        plot(arguments.plot, result, draw)
    return True


def plot(path: Path, result: Mapping[str, Any], draw: Callable[..., None]) -> None:
    """`draw(figure, result)` with matplotlib, into a file of any kind that it writes."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'kvjax[plots]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvjax"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw(figure, result)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def filled(model: kvjax.Model, plan: Any, batch: int, capacity: int, fill: int, prefix: Any = None) -> Any:
    """A cache of `capacity` slots a row that counts `fill` tokens, of zeros: for time, not for values."""
    cache = kvjax.init_cache(model, plan, batch=batch, capacity=capacity, prefix=prefix)
    start, lengths = cache.lengths, jnp.full((batch,), fill, jnp.int32)
    shared, _ = cache.reserve(Span(start, lengths - start, jnp.zeros((batch, fill), jnp.int32)))
    return cache.replace(shared=shared, lengths=lengths, written=lengths + 0)
