"""What an edit in the middle of a text costs: positions that each layer computes, and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.config import Config
from kvjax.costs.work import Flops, attended, layer_flops

Ring = tuple[int, int]
"""Window and slack of a layer that keeps no more."""


def edit_positions(
    windows: Sequence[int | None],
    *,
    length: int,
    start: int,
    stop: int,
    new: int,
    rings: Sequence[Ring | None] | None = None,
    recorded: bool = False,
    shown: bool = False,
    moved: bool = False,
) -> tuple[int, ...]:
    """Positions that each layer computes when `start:stop` of a text becomes `new` tokens.

    All from `start` on: the rest of the text. A ring that has lost what it must see is filled again: layer by layer
    from above, the window of the first position that is wanted. As many new tokens as old ones change layer l, counted
    from 0, only up to l · (w - 1) positions further; a layer runs as far as the ones above take in what it gives, or
    only on its own part where the rest is recorded; and the last token is fed again for its logits.

    Args:
        windows: of each layer, the layer's own or its ring's; None sees everything.
        length: tokens before the edit, all of them fed once.
        start, stop, new: of the edit.
        rings: for each layer what its ring keeps, or None where everything is kept; None for no rings.
        recorded: whether the input of every layer is (a trace, or layer inputs).
        shown: whether what the last layer gives is recorded, too.
        moved: whether what is kept does not depend on where it stands (keys that are not turned, or layer inputs, and
            positions that are relative): then what follows moves, whatever is put in its place.
    """
    layers, end = len(windows), length - (stop - start) + new
    if not end:
        return (0,) * layers
    if start == stop and not new:
        start = stop = end
    short = end < length - min((ring[1] for ring in rings or () if ring), default=length)
    wanted, first = end - 1, []
    for ring in reversed(rings or (None,) * layers):
        at = min(wanted, start)
        if ring is not None and (short or at < length - ring[1] - 1):
            at = max(min(wanted - (ring[0] - 1), end - sum(ring)), 0)
        wanted = at
        first.append(at)
    rest = tuple(end - at for at in reversed(first))
    if (stop - start != new and not moved) or any(rings or ()):
        return rest
    until = [start + new]
    for window in windows:
        until.append(end if window is None else min(until[-1] + window - 1, end))
    runs = [until[-1] if shown else until[-2]]
    for layer in range(layers - 2, -1, -1):
        runs.append(until[layer + 1] if recorded else max(until[layer + 1], runs[-1]))
    cone = tuple(run - start + 1 for run in reversed(runs))
    return cone if sum(cone) < sum(rest) else rest


def edit_flops(config: Config, positions: Sequence[int], *, slots: int, batch: int = 1) -> Flops:
    """FLOPs of what `edit_positions` says, each position attending over `slots` that are read whole, and one through
    the head; norms outside the layers left out."""
    one = layer_flops(config, slots)
    linear = Flops(projections=one.projections, ffn=one.ffn, norms=one.norms) * sum(positions)
    scores = one.scores * sum(attended(n, slots) for n in positions)
    return (linear + Flops(scores=scores, head=2 * config.vocab_size * config.width)) * batch


__all__ = ["edit_positions", "edit_flops"]
