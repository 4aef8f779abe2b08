"""An estimate as a plot: tokens a second over the context, for what could be kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.errors import InputError

if TYPE_CHECKING:
    from kvjax.planner.estimates import Estimate


def points(made: Estimate, again: Any, steps: int = 12) -> list[tuple[int, dict[str, tuple[float, bool]]]]:
    """`(context, {name: (tokens/s, fits)})` at powers of two up to the estimate's context, at most `steps` of them.

    Args:
        made: the estimate.
        again: `(context) -> Estimate` of everything else alike.
        steps: how many.
    """
    contexts = [made.context >> i for i in range(steps) if made.context >> i >= 16] or [made.context]
    found = []
    for context in reversed(contexts):
        one = made if context == made.context else again(context)
        speeds = {
            kept.name: (one.batch / (kept.step.expected or kept.step.limit), kept.fits)
            for kept in one.strategies
            if kept.step is not None
        }
        found.append((context, speeds))
    return found


def draw(path: Path, made: Estimate, found: Sequence[tuple[int, dict[str, tuple[float, bool]]]]) -> None:
    """Writes a plot; the ending of the name says which kind of file. A dotted line is what does not fit.

    Raises:
        InputError: there is no matplotlib, or it cannot write such a file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plot needs matplotlib: pip install 'kvjax[plots]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvjax"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    markers = itertools.cycle("osv^Dx")
    for name in dict.fromkeys(name for _, speeds in found for name in speeds):
        line = [(context, *speeds[name]) for context, speeds in found if name in speeds]
        inside = [(x, y) for x, y, fits in line if fits]
        (drawn,) = axes.plot(*zip(*((x, y) for x, y, _ in line), strict=True), ":", marker=next(markers))
        axes.plot(*(zip(*inside, strict=True) if inside else ([], [])), "-", color=drawn.get_color(), label=name)
    what = "at the limit" if made.step.expected is None else "to be expected"
    axes.set(xscale="log", yscale="log", xlabel="slots of each row", ylabel=f"tokens/s {what}")
    axes.set_title(f"{made.model}, {made.dtype}, {made.batch} rows, {made.device.name}; dotted: does not fit")
    axes.legend()
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except ValueError as error:
        raise InputError(f"plot: {path.name}: {error}") from error


def plot(path: Path, made: Estimate, again: Any) -> None:
    """Estimates at other contexts, and draws all."""
    draw(path, made, points(made, again))


__all__ = ["points", "draw", "plot"]
