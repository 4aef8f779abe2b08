"""Compiles a decode step and a loop of 16 for a TPU that need not be there, and says what XLA makes of the cache.

libtpu compiles for a topology by its name, on any machine. For one chip of each: the bytes that a donated cache shares
with what comes out (all of it), temporaries beside it (less than 1 % of it), and copies of a whole buffer of it (none).
Nothing runs; no figure is a time. Five minutes on two cores. Fails if a cell does.

    pip install -e . 'jax[tpu]'
    python scripts/tpu_check.py
    python scripts/tpu_check.py --chips v6e --heads 128 --batches 8 --programs loop --json tpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a TPU, even where there is one
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import kvjax
from kvjax import caches, sampling
from kvjax.config import Config
from kvjax.loops.decode import DONATING

STEPS, LAYERS, WIDTH, KV_HEADS, VOCAB = 16, 16, 2048, 8, 32_000
LIMIT = 0.01


@dataclasses.dataclass(frozen=True)
class Cell:
    """A program, for a chip, and what XLA made of its cache, in bytes."""

    chip: str
    head_dim: int
    batch: int
    program: str
    cache: int
    aliased: int
    temporaries: int
    copies: int

    @property
    def good(self) -> bool:
        """Whether the cache is updated where it lies."""
        return self.aliased >= self.cache and self.temporaries < LIMIT * self.cache and not self.copies


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(chip: str, head_dim: int, batch: int, program: str, capacity: int, plan: Any) -> tuple[Any, Any]:
    """The program, and its abstract cache."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:1x1", chips_per_host_bounds=(1, 1, 1)
    )
    here = SingleDeviceSharding(topology.devices[0])
    config = Config(VOCAB, LAYERS, WIDTH, WIDTH // head_dim, KV_HEADS, head_dim, 4 * WIDTH)
    shape = jax.ShapeDtypeStruct
    model = jax.eval_shape(lambda: kvjax.decoder(config, kvjax.init_params(config, jax.random.key(0), jnp.bfloat16)))
    cache = jax.eval_shape(lambda m: kvjax.init_cache(m, plan, batch=batch, capacity=capacity), model)
    rows, seeds, logits = (
        shape((batch, *more), t) for more, t in (((), "int32"), ((), "uint32"), ((VOCAB,), "float32"))
    )

    def placed(*args: Any) -> Any:
        return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=here), args)

    with mock.patch("jax.default_backend", lambda: "tpu"):  # what is traced asks where it will run
        if program == "loop":
            traced = DONATING.decode.trace(*placed(model, cache, logits, sampling.greedy(), seeds), steps=STEPS)
        else:
            traced = DONATING.step.trace(*placed(model, cache, rows))
    return traced.lower(lowering_platforms=("tpu",)).compile(), cache


def copies(text: str, cache: Any) -> int:
    """Instructions of their own that write a buffer of the cache anew, in another order or number format.

    `copy-start`, which brings it to the fast memory as it is while something else runs, is how it is read; and what is
    fused writes nothing by itself.
    """
    shapes = {f"[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(cache.layers)}
    fused, inside, found = set(re.findall(r" fusion\(.*calls=%([\w.-]+)", text)), "", 0
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            inside = head[1]
        wrote = re.search(r"= \w+(\[[\d,]*\])\S* (?:copy|transpose|convert|reshape|concatenate)\(", line)
        found += wrote is not None and inside not in fused and wrote[1] in shapes
    return found


def look(chip: str, head_dim: int, batch: int, program: str, capacity: int, plan: Any) -> Cell:
    made, cache = compiled(chip, head_dim, batch, program, capacity, plan)
    memory = made.memory_analysis()
    size, moved = nbytes(cache), copies(made.as_text(), cache)
    return Cell(chip, head_dim, batch, program, size, memory.alias_size_in_bytes, memory.temp_size_in_bytes, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"])
    parser.add_argument("--heads", nargs="+", type=int, default=[64, 128], help="widths of a head (64 128)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--programs", nargs="+", default=["step", "loop"], choices=["step", "loop"])
    parser.add_argument("--slots", type=int, default=131_072, help="of all rows together (131,072)")
    parser.add_argument("--cache", default="dense()", help='kind, as `kvjax generate --cache` reads it ("dense()")')
    parser.add_argument("--json", type=Path, help="write the cells here, too")
    args = parser.parse_args()
    plan, cells = caches.parse(args.cache), []
    print(f"jax {jax.__version__}, {args.cache}, bfloat16, {LAYERS} layers, {KV_HEADS} heads, {args.slots} slots")
    print("| chip | head | batch | program | cache, MB | aliased | temporaries | copies | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chip in args.chips:
        for head_dim in args.heads:
            for batch in args.batches:
                for program in args.programs:
                    cell = look(chip, head_dim, batch, program, args.slots // batch, plan)
                    cells.append(cell)
                    share = cell.temporaries / cell.cache
                    line = [
                        chip,
                        head_dim,
                        batch,
                        program,
                        f"{cell.cache / 1e6:.1f}",
                        f"{cell.aliased / cell.cache:.3f}",
                    ]
                    line += [f"{share:.2%}", cell.copies, "good" if cell.good else "BAD"]
                    print("| " + " | ".join(map(str, line)) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells], indent=2) + "\n", "utf-8")
    sys.exit(not all(cell.good for cell in cells))


if __name__ == "__main__":
    main()
