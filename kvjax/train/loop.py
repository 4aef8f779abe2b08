"""Runs a training from text to package, with checkpoints that make an interrupted run the same as an unbroken one."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from kvjax.errors import CheckpointError
from kvjax.lm import load as load_lm
from kvjax.model import decoder, forward
from kvjax.train import data, evaluate, lm, package
from kvjax.train.optimise import Rates, State
from kvjax.types import Array, Params

CHECKPOINT = "checkpoint.safetensors"


class Settings(Rates, Protocol):
    """What a run is a function of, besides what it learns; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def block(self) -> int:
        """Steps between two looks at whether there was an interrupt."""

    @property
    def eval_every(self) -> int:
        """Steps between two looks at the held-out loss; a multiple of `block`."""

    def initial_state(self, vocab_size: int) -> State:
        """The state at step 0."""

    def train_block(self, vocab_size: int) -> Callable[[State, Any], tuple[State, Array]]:
        """The compiled `(state, batches) -> (state, losses [steps])`; donates the state."""


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds: the state, the best average so far, and the run's record."""

    state: State
    best: Any  # parameters with the lowest held-out loss, or the first ones
    best_loss: float = float("inf")  # nats per character
    best_step: int = 0
    seconds: float = 0.0  # of training, over all sittings
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def save(path: Path, progress: Progress, settings: Settings, sha256: str) -> None:
    """Writes a checkpoint beside `path` and moves it there, so that an interrupt leaves the old one or the new one."""
    leaves = jax.tree.leaves((progress.state, progress.best))
    about = {"settings": dataclasses.asdict(settings), "sha256": sha256, "best_loss": progress.best_loss}
    about |= {"best_step": progress.best_step, "seconds": progress.seconds, "history": progress.history}
    fresh = path.with_name(path.name + ".tmp")
    save_file({str(i): np.asarray(x) for i, x in enumerate(leaves)}, fresh, metadata={"about": json.dumps(about)})
    os.replace(fresh, path)


def load(path: Path, settings: Settings, vocab_size: int, sha256: str) -> Progress:
    """Reads what `save` wrote.

    Raises:
        CheckpointError: if the file is damaged, or of other settings or another text.
    """
    fresh = start(settings, vocab_size)
    leaves, tree = jax.tree.flatten((fresh.state, fresh.best))
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            stored = [file.get_tensor(str(i)) for i in range(len(leaves))] if len(file.keys()) == len(leaves) else None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to start again") from None
    theirs, ours = about["settings"] | {"text": about["sha256"]}, dataclasses.asdict(settings) | {"text": sha256}
    differing = [f"{k} {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != v]
    if differing or stored is None:
        raise CheckpointError(f"{path} is of another run ({'; '.join(differing)}); remove it or choose another --out")
    state, best = jax.tree.unflatten(tree, [jnp.asarray(x) for x in stored])
    return Progress(state, best, about["best_loss"], about["best_step"], about["seconds"], about["history"])


def start(settings: Settings, vocab_size: int) -> Progress:
    """The beginning of a run."""
    state = settings.initial_state(vocab_size)
    return Progress(state, jax.tree.map(np.asarray, state.ema))


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list it yields; a second one interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(
    out: Path,
    settings: Settings,
    vocab_size: int,
    sha256: str,
    batches: Callable[[int, int], Any],
    heldout: Callable[[Params], float],
    *,
    quiet: bool = False,
) -> Progress:
    """Runs the steps, or those that the checkpoint in `out` has left, keeping the average with the least held-out loss.

    Args:
        out: directory for the checkpoint.
        settings: of the run; those of the checkpoint must be the same.
        vocab_size: V.
        sha256: of what is learnt; that of the checkpoint must be the same.
        batches: `(step, steps)` to what `settings.train_block` takes, a function of its arguments alone.
        heldout: the loss of parameters, the less the better.
        quiet: no progress bar.

    Returns:
        The progress at the end.

    Raises:
        CheckpointError: if `out` holds a checkpoint of another run.
        KeyboardInterrupt: after an interrupt, with the checkpoint written.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        progress = load(checkpoint, settings, vocab_size, sha256)
    else:
        progress = start(settings, vocab_size)
    block_of_steps = settings.train_block(vocab_size)
    step = int(progress.state.step)
    hidden = True if quiet else None  # None: where nobody is looking
    bar = tqdm(total=settings.steps, initial=step, unit="step", disable=hidden, file=sys.stderr, dynamic_ncols=True)
    with _interruptible() as interrupts, bar:
        while step < settings.steps and not interrupts:
            begun = time.perf_counter()
            block = batches(step, min(settings.block, settings.steps - step))
            progress.state, each = block_of_steps(progress.state, jax.tree.map(jnp.asarray, block))
            losses = np.asarray(each, np.float64)
            before, step = step, step + len(losses)
            if step // settings.eval_every > before // settings.eval_every or step == settings.steps:
                found = heldout(progress.state.ema)
                if found < progress.best_loss:
                    progress.best = jax.tree.map(np.array, progress.state.ema)
                    progress.best_loss, progress.best_step = found, step
                progress.history.append({"step": step, "loss": float(losses.mean()), "heldout": found})
                save(checkpoint, progress, settings, sha256)
            progress.seconds += time.perf_counter() - begun
            bar.update(len(losses))
            bar.set_postfix(loss=f"{losses.mean():.3f}", heldout=f"{progress.best_loss:.4f}", refresh=False)
        if interrupts:
            save(checkpoint, progress, settings, sha256)
            raise KeyboardInterrupt
    return progress


def train(text: Path, out: Path, settings: lm.Settings, *, quiet: bool = False) -> Progress:
    """Trains, or goes on where the checkpoint in `out` stands, and writes `out/model` at the end.

    Args:
        text: a UTF-8 text file.
        out: directory for the checkpoint and, once finished, the package.
        settings: of the run; those of a checkpoint in `out` must be the same.
        quiet: no progress bar.

    Returns:
        The progress at the end.

    Raises:
        InputError: if the text is too short.
        CheckpointError: if `out` holds a checkpoint of another run.
        KeyboardInterrupt: after an interrupt, with the checkpoint written.
    """
    split = data.read_split(text, heldout_chars=settings.heldout_chars, test_chars=settings.test_chars)
    tokenizer = data.train_tokenizer(split.train, settings.vocab)
    segmenter = data.Segmenter(tokenizer, split.train, drop=settings.recut_drop, seed=settings.seed)
    vocab_size = tokenizer.get_vocab_size()
    config = settings.config(vocab_size)

    def batches(step: int, steps: int) -> np.ndarray:
        return data.block_of_batches(
            segmenter,
            seed=settings.seed,
            block=step // settings.block,
            steps=steps,
            batch=settings.batch,
            context=settings.context,
            share=settings.recut_share(step),
        )

    def heldout(params: Params) -> float:
        return evaluate.nats_per_char(forward, decoder(config, params), tokenizer, split.heldout, settings.context)

    progress = run(out, settings, vocab_size, split.sha256, batches, heldout, quiet=quiet)
    temperature = choose(progress, split.heldout, tokenizer, settings)
    record = _record(text, settings, split, progress) | {"temperature": temperature}
    package.write_package(out / "model", progress.best, config, tokenizer, record)
    stored = load_lm(str(out.resolve() / "model"))  # the losses are those of the file, rounding included
    record["nats_per_char"] = {
        name: evaluate.nats_per_char(forward, stored.model, tokenizer, part, settings.context)
        for name, part in (("train", split.train), ("heldout", split.heldout))
    }
    package.write_record(out / "model", record)
    return progress


def choose(progress: Progress, heldout: str, tokenizer: Tokenizer, settings: lm.Settings) -> float:
    """Makes `progress.best` the better of the best average and the last one, each at its best temperature on held-out.

    Returns:
        The temperature, which is folded into the scale of the final norm.
    """
    config = settings.config(tokenizer.get_vocab_size())

    def cooled(params: Any, temperature: float) -> Any:
        return dict(params, final_norm={"scale": params["final_norm"]["scale"] / temperature})

    def loss(params: Any, temperature: float) -> float:
        model = decoder(config, cooled(params, temperature))
        return evaluate.nats_per_char(forward, model, tokenizer, heldout, settings.context)

    found = []
    for params, step in ((progress.best, progress.best_step), (progress.state.ema, int(progress.state.step))):
        temperature = evaluate.best_temperature(lambda t, params=params: loss(params, t))  # type: ignore[misc]
        found.append((loss(params, temperature), step, temperature, cooled(params, temperature)))
    progress.best_loss, progress.best_step, temperature, best = min(found, key=lambda x: x[:2])
    progress.best = jax.tree.map(np.array, best)
    return temperature


def _record(text: Path, settings: lm.Settings, split: data.Split, progress: Progress) -> dict[str, Any]:
    changed = [
        f"--{f.name.replace('_', '-')} {getattr(settings, f.name)}"
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != f.default
    ]
    command = " ".join(["python -m kvjax.train lm", f"--text {text.name}", "--out DIR", *changed])
    return {
        "command": command,
        "text": {
            "name": text.name,
            "sha256": split.sha256,
            "train_chars": len(split.train),
            "heldout_chars": len(split.heldout),
            "test_chars": len(split.test),
        },
        "settings": dataclasses.asdict(settings),
        **circumstances(progress),
    }


def circumstances(progress: Progress) -> dict[str, Any]:
    """The part of a record that says how a run went, and on what."""
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")
    return {
        "best_step": progress.best_step,
        "history": progress.history,
        "train_seconds": round(progress.seconds, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {jax.default_backend()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "unknown processor"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core(s) used"


__all__ = ["Progress", "save", "load", "start", "run", "train", "circumstances"]
