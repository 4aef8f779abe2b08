"""Writes docs/costs.md: the textbook integers, and what `kvjax compare` prints on this machine."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from kvjax import cli, costs
from kvjax.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "costs.md"
COMMANDS = (
    "kvjax compare --rounds 9 --markdown",
    "kvjax compare --no-rotation --batch 8 --rounds 9 --markdown",
)
INTRO = """# What a cache costs

Written by `python scripts/costs_page.py`. The formulas are in the docstrings of `kvjax.costs`;
`tests/test_sentences.py` holds them, and what is often said instead, to their numbers.

## The textbook example

An encoder-decoder of width {width}, {layers} layers, a batch of {batch}, {positions} source and {positions} target
positions, float32:

| | bytes |
|---|---:|
| keys and values of self- and cross-attention | {kv:,} |
| the outputs of the {layers} decoder layers | {outputs:,} |
| keys and values where {positions} positions are padded to 128 | {padded:,} |
| the encoder's output instead of cross-attention's keys and values | {encoder:,} |

## Side by side
"""


def intro() -> str:
    """The textbook example in numbers."""
    width, layers, batch, positions = 512, 6, 4, 100
    config = Config(10_000, layers, width, query_heads=8, kv_heads=8, head_dim=64, ffn_width=2048)

    def kv(positions: int) -> int:
        own = costs.dense_nbytes(config, batch=batch, capacity=positions) - costs.container_nbytes(batch, positions)
        return own + costs.cross_nbytes(layers, 8, 64, positions, batch)

    outputs = costs.trace_nbytes(config, batch=batch, capacity=positions, sites=1, embedding=0)
    return INTRO.format(
        width=width,
        layers=layers,
        batch=batch,
        positions=positions,
        kv=kv(positions),
        padded=kv(128),
        outputs=outputs,
        encoder=costs.encoder_output_nbytes(width, positions, batch),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the page")
    path = parser.parse_args().out
    page = [intro()]
    for command in COMMANDS:
        made = io.StringIO()
        with contextlib.redirect_stdout(made):
            if code := cli.main(command.split()[1:]):
                raise SystemExit(code)
        page.append(f"    {command}\n\n{made.getvalue()}")
    path.write_text("\n".join(page), "utf-8")


if __name__ == "__main__":
    main()
