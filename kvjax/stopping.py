"""What ends a row: ids, and sequences of ids, found on the device as tokens are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax import struct
from kvjax.sampling import Text
from kvjax.sampling.contract import among, id_list
from kvjax.sampling.sequences import begun_by, sequence_table
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
        # [B, m], which sequences a row has all of but the last, all of it new
        return begun_by(self.sequences, text, text.starts)


def stops_of(name: str, ids: Sequence[int] = (), sequences: Sequence[Sequence[int]] = ()) -> Stops:
    """On the host; lengths are padded to buckets, so that other stops compile nothing.

    Args:
        name: of the caller, for the error.
        ids: that end a row.
        sequences: of ids, that end a row when it has all of them, one after the other.

    Raises:
        InputError: no ids, or an empty sequence.
    """
    table = sequence_table(f"{name}: stop sequence", sequences)
    return Stops(id_list(f"{name}: stop_ids", ids), table)  # type: ignore[arg-type]


def completed(sequences: Array, new: list[int]) -> bool:
    """Whether new tokens end with one of `Stops.sequences`; on the host."""
    wanted: list[Any] = [row[row >= 0].tolist() for row in np.asarray(sequences)]
    return any(row and new[-len(row) :] == row for row in wanted)


__all__ = ["Stops", "stops_of", "completed"]
