"""Writes docs/estimate.md: what `kvjax estimate` prints for a few models and devices, and how far its times are from
what `benchmarks/estimate.py` measured (its JSON, one a device).

python scripts/estimate_page.py
python scripts/estimate_page.py --check     (only whether the page is what would be written)
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts"), str(ROOT)]

import pages  # noqa: E402  (the path is set above)

import kvjax  # noqa: E402
from kvjax.cli import main as kvjax_main  # noqa: E402
from kvjax.config import Config  # noqa: E402
from kvjax.train.package import config_json  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "estimate.md", ROOT / "benchmarks" / "results"
LLAMA = Config(128_256, 32, 4096, 32, 8, 128, 14_336, max_positions=8192, tied=False)
COMMANDS = (
    ("Llama 3 8B in bfloat16, eight rows", "kvjax estimate {llama} --device H100 --batch 8"),
    (
        "The same on a T4, where it fits in int8 only",
        "kvjax estimate {llama} --device T4 --batch 8 --context 2048 --weights int8 --cache 'dense(store=int8())'",
    ),
    ("A bundled model with an encoder", "kvjax estimate ar2en --device L4 --batch 8"),
)
INTRO = """# What a model costs, before it is loaded

What `kvjax estimate` says of some models and devices, and how far its times are from measured ones.

Written by `python scripts/estimate_page.py`. `kvjax estimate` and `kvjax.estimate` read a config.json, not the weights.

Bytes of weights and cache are exact: tests hold them to the arrays. Temporaries are what the compiler says for the
device at hand, and `costs.step_temporaries_nbytes` for another one. What a driver or an allocator keeps for itself is
not known, nor is what a prefill of a long prompt needs.

*At the limit* is the time that memory and arithmetic allow: max(FLOPs / F, bytes / W). No program passes it; a
datasheet says no more. *To be expected* is for a measured device: max(linear FLOPs / F, weight bytes / W(B)) + cache
bytes / W(1) + layers · overhead + rows · V · choice. `measured_device` measures F (a product of squares), W(1), W(8)
and W(64) (bytes/s of matrices read by a product with so many rows, at four sizes in all; between them powers), the
overhead of a layer (a step of a decoder of width 64) and of choosing a token (what a vocabulary of 32,768 adds to it),
in about three seconds. None of it is fitted to a model.
"""


def printed(command: str, folder: Path) -> str:
    """What a command of ours writes."""
    import contextlib
    import io

    made = io.StringIO()
    with contextlib.redirect_stdout(made):
        if code := kvjax_main(shlex.split(command.format(llama=folder))[1:]):
            raise SystemExit(code)
    shown = "\n".join(f"    {line}".rstrip() for line in made.getvalue().splitlines())
    return f"    {command.format(llama='llama-3-8b')}\n\n{shown}\n"


def errors() -> list[str]:
    """A table a device."""
    import estimate

    found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*/estimate.json"))]
    return [_errors(estimate.tell(result), result) for result in found]


def _errors(told: str, result: dict[str, Any]) -> str:
    device = result["device"]
    rates = {(rows, nbytes): bandwidth for rows, nbytes, bandwidth in device["rates"]}
    sizes = sorted({nbytes for _, nbytes in rates})
    lines = ["| GB/s | " + " | ".join(f"{n / 2**20:.0f} MiB" for n in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for rows in sorted({rows for rows, _ in rates}):
        cells = (f"{rates[rows, n] / 1e9:.1f}" for n in sizes)
        lines.append(f"| {rows} row{'s' * (rows > 1)} | {' | '.join(cells)} |")
    others = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in device["flops"])
    each = f"{1e6 * device['layer_seconds']:.0f} µs a layer, {1e9 * device['logit_seconds']:.1f} ns a logit"
    said = f"Measured beside it: {others}; {each}; matrices are read at"
    return "\n".join([f"`{result['command']}`", "", told, "", said, "", *lines, ""])


def document() -> str:
    """The page."""
    page = [INTRO]
    with tempfile.TemporaryDirectory() as folder:
        llama = Path(folder) / "llama-3-8b"
        llama.mkdir()
        (llama / "config.json").write_text(json.dumps(config_json(LLAMA) | SAID))
        for title, command in COMMANDS:
            page += [f"## {title}\n", printed(command, llama)]
    if found := errors():
        page += ["## Expected and measured\n", *found]
    page.append(f"kvjax {kvjax.__version__}")
    return "\n".join(page).rstrip() + "\n"


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the page")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would be another")
    arguments, made = parser.parse_args(), document()
    if arguments.check:
        return pages.check(arguments.out, made.splitlines(), "python scripts/estimate_page.py")
    arguments.out.write_text(made, "utf-8")
    return 0


SAID = {"torch_dtype": "bfloat16", "tie_word_embeddings": False}

if __name__ == "__main__":
    sys.exit(main())
