"""What `generate` gives."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from kvjax.caches.base import Cache
from kvjax.loops.algorithms import Candidate
from kvjax.loops.speculative import Speculated
from kvjax.types import Array


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one `generate`, and what they were spent on.

    Args:
        compile: tracing, lowering and compiling, in seconds.
        prefill, decode: the rest of the time, in seconds, compiling left out.
        programs: compiled in this call.
        steps: decoding steps run.
        wasted: of these, steps that no row needed.
    """

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    programs: int = 0
    steps: int = 0
    wasted: int = 0


class Logprobs(NamedTuple):
    """Log-probabilities of new tokens under the model itself, before any filter; on the host.

    Args:
        chosen: `[B, N]`, of each new token; NaN after a row's last.
        ids: `[B, N, k]` int32, of the k most probable, best first; -1 after a row's last.
        values: `[B, N, k]`, theirs.
    """

    chosen: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` gives, and what it can go on from.

    Args:
        text: of the new tokens, one a row, without a stop string and what follows it; None without a tokenizer.
        tokens: `[B, N]` int32 on the host, the new tokens; -1 after a row's last.
        lengths: `[B]` int32 on the host, new tokens of each row.
        stop: per row, "eos" (one of `stop_ids`), "stop" (one of `stop_at`) or "length".
        cache: prompts and new tokens, all fed.
        logits: `[B, V]`, for the next token.
        prompts: ids that stood before the new tokens.
        seeds: `[B]` uint32 on the host.
        sampler: used.
        stop_ids: used.
        timings: of this call.
        starts: `[B]` int32 on the host, tokens of each row before the first one that was made: where filters and stop
            sequences begin to count.
        stop_at: strings and sequences of ids that ended a row.
        samples: rows next to each other that are of one prompt.
        logprobs: of the new tokens; None where nobody asked.
        candidates: of an algorithm that ranks several answers, each row's, best first; `text` and `tokens` are the
            first. None of others.
        speculated: what drafts were worth, with `kvjax.speculate`; else None.
    """

    text: list[str] | None
    tokens: np.ndarray
    lengths: np.ndarray
    stop: list[str]
    cache: Cache
    logits: Array
    prompts: list[list[int]]
    seeds: np.ndarray
    sampler: Any
    stop_ids: tuple[int, ...]
    timings: Timings
    starts: np.ndarray
    stop_at: tuple[str | tuple[int, ...], ...] = ()
    samples: int = 1
    logprobs: Logprobs | None = None
    candidates: list[list[Candidate]] | None = None
    speculated: Speculated | None = None

    @property
    def scores(self) -> np.ndarray | None:
        """`[B]` float64 on the host, of each row's best candidate; None where nothing is ranked."""
        if self.candidates is None:
            return None
        return np.asarray([row[0].score if row else -np.inf for row in self.candidates])


__all__ = ["Timings", "Logprobs", "Generated"]
