"""Seconds from the start of `kvjax generate` to its first character, for a user who has never run it.

Every run is a process of its own with an empty home, no compile cache and no setting of this shell; Python's start and
all imports are in the figure. Then the same once more in the home that the run left behind.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --model ./stories260K --prompt Once --runs 5 --no-save
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

HIDDEN = ("JAX_", "KVJAX_", "XLA_", "XDG_", "PYTHON", "TF_")


def environment(home: str) -> dict[str, str]:
    """That of a new user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)}
    root = str(Path(__file__).resolve().parent.parent)
    return kept | {"HOME": home, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def start(argv: list[str], home: str, cores: int) -> dict[str, Any]:
    """One run: seconds to the first byte on stdout, seconds in all, and the line of figures."""

    def narrow() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    limited = narrow if hasattr(os, "sched_setaffinity") else None
    began = time.perf_counter()
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home), preexec_fn=limited
    )
    assert process.stdout is not None
    byte = process.stdout.read(1)
    first = time.perf_counter() - began
    _, err = process.communicate()
    if process.returncode or not byte:
        raise SystemExit(f"{' '.join(argv)} failed: {err.decode()}")
    return {"first": round(first, 3), "all": round(time.perf_counter() - began, 3), "figures": err.decode().strip()}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="ROMEO:")
    parser.add_argument("--model", default="shakespeare", help="as kvjax.load takes it (default shakespeare)")
    parser.add_argument("--runs", type=int, default=3, help="the median is of these (default 3)")
    parser.add_argument("--cores", type=int, default=2, help="that the process may use (default 2)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    command = Path(sys.executable).with_name("kvjax")
    argv = [str(command)] if command.exists() else [sys.executable, "-m", "kvjax"]
    argv += ["generate", args.prompt, "--model", args.model]
    fresh, again = [], []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as home:
            fresh.append(start(argv, home, args.cores))
            again.append(start(argv, home, args.cores))
    result = {
        "question": "seconds to the first character of `kvjax generate`, empty home, imports included",
        "command": ["kvjax", *argv[argv.index("generate") :]],
        "median_seconds": harness.median([run["first"] for run in fresh]),
        "median_seconds_second_start": harness.median([run["first"] for run in again]),
        "fresh": fresh,
        "second_start": again,
        **harness.facts(args.cores),
    }
    print(f"first character after {result['median_seconds']:.1f} s (median of {args.runs}), ", end="")
    print(f"{result['median_seconds_second_start']:.1f} s at the second start; load {result['load']:.1f}")
    if not args.no_save:
        print(harness.save("cold_start", result, "cpu").relative_to(harness.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
