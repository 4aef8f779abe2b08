"""Trains the bundled model of the copying task (`kvjax.testing.induction`): random blocks of tokens, repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvjax import caches
from kvjax.lm import load as load_lm
from kvjax.model import decoder
from kvjax.testing import induction as task
from kvjax.train import lm, loop, package
from kvjax.types import Params

SETTINGS = lm.Settings(
    steps=3000,
    batch=16,
    micro=16,
    context=256,
    vocab=task.VOCAB,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    lr=5e-3,
    warmup=100,
    weight_decay=0.01,
    ema=0.99,
    dropout=0.0,
    recut=0.0,
    block=20,
    eval_every=200,
)
"""What made the bundled model. Nothing is learnt by heart here, so nothing is done against it."""

HELDOUT_SEED = 10_000
HELDOUT_ROWS, ROWS = 32, 64
LENGTHS = (192, 256)
"""Of the texts that the finished package is measured on, in tokens."""


def train(out: Path, settings: lm.Settings = SETTINGS, *, quiet: bool = False) -> loop.Progress:
    """Trains, or goes on where the checkpoint in `out` stands, and writes `out/model` at the end.

    Args:
        out: directory for the checkpoint and, once finished, the package.
        settings: of the run; those of a checkpoint in `out` must be the same.
        quiet: no progress bar.

    Returns:
        The progress at the end; its losses are nats per token that follows from those before.

    Raises:
        CheckpointError: if `out` holds a checkpoint of another run.
        KeyboardInterrupt: after an interrupt, with the checkpoint written.
    """
    config = settings.config(task.VOCAB)
    tokens, follows = task.copy_task(HELDOUT_SEED, HELDOUT_ROWS, settings.context)

    def batches(step: int, steps: int) -> np.ndarray:
        texts, _ = task.copy_task((settings.seed, 1 + step), steps * settings.batch, settings.context + 1)
        return texts.reshape(steps, settings.batch, -1)

    def heldout(params: Params) -> float:
        return task.copy_loss(decoder(config, params), tokens, follows)[0]

    mark = hashlib.sha256(json.dumps(["copying task", task.VOCAB, task.PERIODS]).encode()).hexdigest()
    progress = loop.run(out, settings, task.VOCAB, mark, batches, heldout, quiet=quiet)
    record = {
        "command": command(settings),
        "task": {"vocab": task.VOCAB, "periods": task.PERIODS, "evaluation_seed": task.EVALUATION_SEED},
        "settings": dataclasses.asdict(settings),
        **loop.circumstances(progress),
    }
    package.write_package(out / "model", progress.best, config, None, record, card)
    stored = load_lm(str(out.resolve() / "model")).model  # what is measured is the file, rounding included
    record["copy_accuracy"] = {
        str(length): task.copy_accuracy(stored, caches.dense(), rows=ROWS, length=length) for length in LENGTHS
    }
    texts = task.copy_task(task.EVALUATION_SEED, ROWS, settings.context)
    record["nats"], record["copied"] = task.copy_loss(stored, *texts)
    package.write_record(out / "model", record, card)
    return progress


def command(settings: lm.Settings) -> str:
    """What to type for a run of these settings."""
    words = ["python -m kvjax.train induction --out DIR"]
    return " ".join(words + [f"--{name} {getattr(settings, name)}" for name in OPTIONS if _changed(settings, name)])


OPTIONS = ("seed", "steps")
"""Settings that the command line takes."""


def _changed(settings: lm.Settings, name: str) -> bool:
    return getattr(settings, name) != getattr(SETTINGS, name)


def card(out: Path, record: dict[str, Any]) -> str:
    """The model card: what `training.json` holds, for people."""
    shape = json.loads((out / "config.json").read_text(encoding="utf-8"))
    task_of = record["task"]
    first, last = task_of["periods"]
    lines = [
        "# induction",
        "",
        f"A Llama-architecture model of {package.count(out):,} parameters that `python -m kvjax.train induction`",
        f"trained to copy: a text is a random block of {first} to {last} different tokens of {task_of['vocab']},",
        "repeated. It is there for tests and for measuring what an approximate cache costs",
        "(`kvjax.testing.induction`); it has no tokenizer, and no token ends a text.",
        "",
        *package.shape_table(shape),
        "",
        "## Accuracy",
        "",
        "Of this package as stored, in float32 with a dense cache: the share of tokens after the first "
        f"{task.PROMPT} for which",
        f"the right one has the largest logit, on {ROWS} texts of seed {task_of['evaluation_seed']}, which no "
        "training run draws from.",
        "",
        "| length | copy accuracy |",
        "|---|---|",
        *(f"| {length} | {value:.5f} |" for length, value in record.get("copy_accuracy", {}).items()),
        "",
        *(_without_cache(record) if "nats" in record else []),
        *package.how_it_was_made(record, "the least loss on texts of another seed"),
        *package.files(out, record),
    ]
    return "\n".join(lines)


def _without_cache(record: dict[str, Any]) -> list[str]:
    return [
        "Of all tokens that follow from those before, the first ones of the second repeat too: "
        f"{record['copied']:.5f},",
        f"at {record['nats']:.5f} nats each.",
        "",
    ]


__all__ = ["SETTINGS", "OPTIONS", "train", "command", "card"]
