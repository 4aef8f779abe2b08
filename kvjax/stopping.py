"""What ends a row: ids, and sequences of ids, found on the device as tokens are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.checks import bucket, whole
from kvjax.errors import InputError
from kvjax.sampling import Text
from kvjax.sampling.contract import among, id_list
from kvjax.types import Array


@struct.node
class Stops(struct.Value):
    """Ids and sequences of ids that end a row; what completes one is emitted and fed.

    Args:
        ids: `[n]` int32, -1 for none.
        sequences: `[m, k]` int32, each at the end of its line, -1 before it; lines of -1 alone are none.
    """

    ids: Array
    sequences: Array

    def hit(self, text: Text, tokens: Array) -> Array:
        """`[B]` bool, which rows end with `tokens[B]`, the next ones; a sequence must lie in what is new."""
        last = self.sequences[:, -1]
        whole = self._begun(text) & (tokens[:, None] == last[None])
        return jnp.any(tokens[:, None] == self.ids[None], axis=1) | jnp.any(whole, axis=1)

    def ends(self, text: Text, vocab: int) -> Array:
        """`[B, V]` bool, which next tokens end each row."""
        last = jnp.where(self._begun(text), self.sequences[:, -1][None], vocab)
        marks = jnp.broadcast_to(among(self.ids, vocab)[None], (text.lengths.shape[0], vocab))
        return marks.at[jnp.arange(marks.shape[0])[:, None], last].set(True, mode="drop")

    def _begun(self, text: Text) -> Array:
        # [B, m], which sequences a row has all of but the last
        k = self.sequences.shape[1]
        at = text.lengths[:, None] - jnp.arange(k - 1, 0, -1, dtype=jnp.int32)[None, :]  # [B, k - 1]
        before = jnp.take_along_axis(text.tokens, jnp.maximum(at, 0), axis=1)
        before = jnp.where(at >= text.starts[:, None], before, -1)[:, None, :]
        wanted = self.sequences[None, :, :-1]
        return jnp.all((before == wanted) | (wanted < 0), axis=2) & (self.sequences[:, -1] >= 0)[None]


def stops_of(name: str, ids: Sequence[int] = (), sequences: Sequence[Sequence[int]] = ()) -> Stops:
    """On the host; lengths are padded to buckets, so that other stops compile nothing.

    Args:
        name: of the caller, for the error.
        ids: that end a row.
        sequences: of ids, that end a row when it has all of them, one after the other.

    Raises:
        InputError: no ids, or an empty sequence.
    """
    rows = [np.asarray(whole(f"{name}: stop sequence {i}", list(row))) for i, row in enumerate(sequences)]
    for i, row in enumerate(rows):
        if row.ndim != 1 or not row.size or (row < 0).any():
            raise InputError(f"{name}: stop sequence {i} is {row.tolist()}; give one or more ids, each 0 or more")
    longest = max((row.size for row in rows), default=0)
    table = np.full((bucket(len(rows), 8) if rows else 0, bucket(longest, 4) if rows else 1), -1, np.int32)
    for line, row in zip(table, rows, strict=False):
        line[len(line) - row.size :] = row
    return Stops(id_list(f"{name}: stop_ids", ids), table)  # type: ignore[arg-type]


def found(stops: Stops, new: list[int]) -> bool:
    """Whether new tokens end with one of `stops`; on the host."""
    wanted: list[Any] = [row[row >= 0].tolist() for row in np.asarray(stops.sequences)]
    ids = set(np.asarray(stops.ids)[np.asarray(stops.ids) >= 0].tolist())
    return bool(new) and (new[-1] in ids or any(row and new[-len(row) :] == row for row in wanted))


__all__ = ["Stops", "stops_of", "found"]
