"""The loss of a finished package on the end of its text, which training never reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvjax.checkpoint.source import resolve
from kvjax.errors import InputError
from kvjax.lm import load
from kvjax.model import forward
from kvjax.train import data, evaluate, package


class Measured(NamedTuple):
    """Nats per character, and what they were taken over."""

    loss: float
    chars: int
    tokens: int


def measure(source: str, text: Path, *, any_text: bool = False) -> Measured:
    """Measures the package as stored on the test part of a text.

    Args:
        source: a bundled name or the directory of a package that `kvjax.train lm` wrote.
        text: the text file; its end, as long as the record says, is measured.
        any_text: take another text than the one that the model was trained on.

    Raises:
        CheckpointError: the package is missing or damaged, or has no record.
        InputError: another text than the record's, or the record has none.
    """
    folder, _ = resolve(source, None)
    record = package.read_record(folder)
    if "text" not in record:
        raise InputError(f"{source} was not trained on a text, so there is none to measure it on")
    settings = record["settings"]
    split = data.read_split(text, heldout_chars=settings["heldout_chars"], test_chars=settings["test_chars"])
    if split.sha256 != record["text"]["sha256"] and not any_text:
        raise InputError(
            f"{text} has SHA-256 {split.sha256[:16]}…, the model was trained on {record['text']['sha256'][:16]}…: "
            "parts of this text may have been trained on; --any-text measures all the same"
        )
    lm = load(source)
    ids = np.array(lm.encode(split.test)[1:], np.int32)  # without the BOS: each window begins with its own
    total = evaluate.total_nll(forward, lm.model, ids, settings["context"])
    return Measured(total / len(split.test), len(split.test), len(ids))


def record_test_loss(source: str, found: Measured) -> None:
    """Writes what `measure` found into the record and the model card of the package."""
    folder, _ = resolve(source, None)
    record = package.read_record(folder)
    record["nats_per_char"]["test"] = found.loss
    package.write_record(folder, record)


__all__ = ["Measured", "measure", "record_test_loss"]
