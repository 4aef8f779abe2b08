"""`kvjax estimate`: bytes, what fits, and how fast it can be, from a shape and a device; no weights are read."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

from kvjax.planner import estimate
from kvjax.planner.drawn import plot


def run(args: argparse.Namespace) -> None:
    """Estimates on stdout, as tables or as one JSON object; with `--plot` into a file as well."""
    about = functools.partial(
        estimate,
        args.model,
        batch=args.batch,
        plan=args.cache,
        source=args.source,
        cross=args.cross,
        dtype=args.dtype,
        weights=args.weights,
    )
    made = about(context=args.context, device=args.device)
    print(json.dumps(made.as_dict()) if args.json else made)
    if args.plot is not None:
        plot(Path(args.plot), made, lambda context: about(context=context, device=made.device))


__all__ = ["run"]
