"""What starting costs: tracing and compiling a prefill and a decode loop, the programs of a first `generate` and of
those after it, all of it again with JAX's persistent cache, and the command line from its start to its first character.

Every run is a process of its own, without settings of this shell. A shape's runs come in pairs, without a compile
cache and with one that another process has filled (minimum compile time 0). The command line runs in an empty home
with no compile cache, then once more in the home that this left behind; Python's start and imports are in its figure.
About three minutes on two cores.

    python benchmarks/compile.py
    python benchmarks/compile.py --shapes 15M --rounds 1 --no-save
    python benchmarks/compile.py --table benchmarks/results/cpu/compile.json --plot compile.svg
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp

import kvjax
from kvjax import sampling
from kvjax.loops.decode import CHUNK, DONATING, Progress
from kvjax.stopping import stops_of

HIDDEN = ("JAX_", "KVJAX_", "XLA_", "XDG_", "PYTHON", "TF_")
COMMAND = ("generate", "ROMEO:", "--model", "shakespeare")
PROMPT, CAPACITY = 16, 256
STAGES = ("trace", "lower", "compile")
SHAPE = "KVJAX_BENCHMARK_COMPILE"
"""Environment variable of the processes that this script starts: the shape to measure."""


def environment(home: str, cache: str | None = None, **more: str) -> dict[str, str]:
    """That of a new user, with a folder for compiled programs or none."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)}
    kept |= {"HOME": home, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), **more}
    if cache is not None:
        kept |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return kept


def staged(jitted: Any, *args: Any, **static: Any) -> dict[str, float]:
    """Seconds of tracing, of lowering and of compiling a program for abstract arguments."""
    times = [time.perf_counter()]
    traced = jitted.trace(*args, **static)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return {stage: b - a for stage, a, b in zip(STAGES, times, times[1:], strict=False)}


def first_calls(shape: str) -> dict[str, Any]:
    """In a process that has compiled nothing: the two programs in stages, then what three calls of `generate` make."""
    abstract, config = jax.ShapeDtypeStruct, harness.SHAPES[shape]
    model = jax.eval_shape(lambda: kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0))))
    cache = jax.eval_shape(lambda m: kvjax.init_cache(m, batch=1, capacity=CAPACITY), model)
    rows, seeds = abstract((1,), jnp.int32), abstract((1,), jnp.uint32)
    logits, stopped = abstract((1, config.vocab_size), jnp.float32), abstract((1,), bool)
    state = Progress(cache, logits, stopped, abstract((), jnp.int32), rows)
    result: dict[str, Any] = {
        "prefill": staged(DONATING.prefill, model, cache, abstract((1, PROMPT), jnp.int32), rows),
        "loop": staged(
            DONATING.until,
            model,
            state,
            sampling.greedy(),
            seeds,
            stops_of("compile"),
            rows,
            rows,
            abstract((), jnp.int32),
            chunk=CHUNK,
        ),
    }
    real = harness.model_of(shape)
    jax.clear_caches()  # what `generate` needs must not have been traced above

    def call(tokens: int, new: int) -> dict[str, float]:
        made = kvjax.generate(real, [list(range(1, tokens + 1))], max_new_tokens=new).timings
        return {"programs": made.programs, "seconds": made.compile}

    result["generate"] = {"first": call(9, 32), "same bucket": call(14, 48), "next bucket": call(20, 32)}
    return result


def measured(shape: str, home: str, cache: str | None) -> dict[str, Any]:
    """`first_calls` of a process of its own."""
    argv = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.run(argv, env=environment(home, cache, **{SHAPE: shape}), capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{shape}: {process.stderr}")
    return json.loads(process.stdout)


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread of every number in dictionaries of one form."""
    first = runs[0]
    return {
        name: together([run[name] for run in runs])
        if isinstance(first[name], Mapping)
        else harness.spread([run[name] for run in runs])
        for name in first
    }


def start(argv: list[str], home: str) -> float:
    """Seconds from a command's start to its first byte on stdout."""
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home))
    assert process.stdout is not None
    byte = process.stdout.read(1)
    spent = time.perf_counter() - began
    _, err = process.communicate()
    if process.returncode or not byte:
        raise SystemExit(f"{' '.join(argv)} failed: {err.decode()}")
    return spent


def cold(count: int) -> dict[str, Any]:
    """The command line for a user who has never run it, and at the second start."""
    command = Path(sys.executable).with_name("kvjax")
    argv = [str(command)] if command.exists() else [sys.executable, "-m", "kvjax"]
    first, second = [], []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as home:
            first.append(start([*argv, *COMMAND], home))
            second.append(start([*argv, *COMMAND], home))
    return {
        "command": " ".join(["kvjax", *COMMAND]),
        "first": harness.spread(first),
        "second": harness.spread(second),
    }


def tell(result: dict[str, Any]) -> str:
    """The tables."""
    lines, calls = [], []
    for shape, ways in result["shapes"].items():
        none, kept = ways["none"], ways["kept"]
        for program in ("prefill", "loop"):
            each = [harness.cell(none[program][stage]) for stage in STAGES]
            lines.append([shape, program, *each, harness.cell(kept[program]["compile"])])
        for name, call in none["generate"].items():
            cells = (harness.cell(call["seconds"]), harness.cell(kept["generate"][name]["seconds"]))
            calls.append([shape, name, f"{call['programs']['median']:.0f}", *cells])
    start = result["command_line"]
    return "\n\n".join(
        [
            harness.headline(result),
            "Seconds; prefill of "
            f"{PROMPT} tokens, loop of chunks of {CHUNK}, capacity {CAPACITY}, batch 1, {result['dtype']}:",
            harness.table(("shape", "program", *STAGES, "compile, cache kept"), lines),
            "Calls of `generate`, one after the other: programs made, and seconds in making them:",
            harness.table(("shape", "prompt", "programs", "seconds", "seconds, cache kept"), calls),
            f"`{start['command']}`: first character after {harness.cell(start['first'])} s, at the second start after "
            f"{harness.cell(start['second'])} s",
        ]
    )


def draw(figure: Any, result: Mapping[str, Any]) -> None:
    """Stages of both programs, without and with a compile cache that is kept."""
    axes, names = figure.subplots(), []
    for shape, ways in result["shapes"].items():
        for program in ("prefill", "loop"):
            for way, name in (("none", ""), ("kept", ", cache kept")):
                base = 0.0
                for stage, colour in zip(STAGES, ("#4477aa", "#ccbb44", "#ee6677"), strict=True):
                    high = ways[way][program][stage]["median"]
                    label = None if names else stage
                    axes.bar(len(names), high, bottom=base, color=colour, label=label)
                    base += high
                names.append(f"{shape}\n{program}{name}")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("seconds")
    axes.legend()


def main() -> None:
    """Measures, prints, writes the JSON."""
    if SHAPE in os.environ:
        print(json.dumps(first_calls(os.environ[SHAPE])))
        return
    parser = harness.options(__doc__, 3)
    parser.add_argument("--shapes", nargs="+", choices=list(harness.SHAPES), help="15M, 110M and 135M if none is named")
    arguments = parser.parse_args()
    if harness.shown(arguments, tell, draw):
        return
    count = 1 if arguments.quick else arguments.rounds
    shapes = arguments.shapes or (["tiny"] if arguments.quick else ["15M", "110M", "135M"])
    found: dict[str, Any] = {}
    # The limits come last: a process that holds a GPU leaves others no room on it.
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as cache:
        for shape in shapes:
            measured(shape, home, cache)  # fills the cache
            pairs = [(measured(shape, home, None), measured(shape, home, cache)) for _ in range(count)]
            none, kept = zip(*pairs, strict=True)
            found[shape] = {"none": together(list(none)), "kept": together(list(kept))}
    command_line = cold(count)
    result = {**harness.begin(arguments), "dtype": "float32", "shapes": found, "command_line": command_line}
    harness.done("compile", result | {"rounds": count}, arguments, draw, tell(result | {"rounds": count}))


if __name__ == "__main__":
    main()
