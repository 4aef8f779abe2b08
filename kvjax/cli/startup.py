"""What a command sets up before it runs: a compile cache that outlives the process, quiet libraries, 64-bit numbers;
and how an interrupt is heard while it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import jax

from kvjax.errors import InputError
from kvjax.lm import LM, load
from kvjax.weights import int8_weights

OFF = ("0", "off", "no", "false")
SWITCH = "KVJAX_COMPILE_CACHE"
"""Environment variable: a folder for compiled programs, or "off"."""


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[None]:
    """Sets up, and puts back what another caller in this process would stumble over."""
    if getattr(args, "compile_cache", True):
        use_compile_cache(os.environ)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a mark, and goes on
    log = logging.getLogger("jax")
    level, wide = log.level, jax.config.read("jax_enable_x64")
    with warnings.catch_warnings():
        if not args.debug:
            log.setLevel(logging.ERROR)  # that there is a GPU but no CUDA build is no news to each command
            warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")
            warnings.showwarning = _show
        if getattr(args, "dtype", None) == "float64":
            jax.config.update("jax_enable_x64", True)
        try:
            yield
        finally:
            log.setLevel(level)
            jax.config.update("jax_enable_x64", wide)


def load_lm(args: argparse.Namespace) -> LM:
    """The model that the arguments name, in the weights that they ask for.

    Raises:
        InputError: int8 weights on a CPU.
        CheckpointError: as `kvjax.load`.
    """
    if args.weights is None:
        return load(args.model, dtype=args.dtype)
    if jax.default_backend() == "cpu":
        raise InputError(
            "--weights int8 is for a GPU or TPU: on a CPU it takes more memory than float32 and is no faster "
            "(benchmarks/weights.py measures both); leave it out, or use kvjax.int8_weights in Python"
        )
    lm = load(args.model, dtype=args.dtype)
    return dataclasses.replace(lm, model=int8_weights(lm.model))


def use_compile_cache(environ: Mapping[str, str]) -> Path | None:
    """Keeps compiled programs for the next start. JAX's own variables win; a folder that cannot be written is let be.

    Args:
        environ: the process's environment.

    Returns:
        The folder, or None where there is no cache or JAX's own variable names it.
    """
    if environ.get(SWITCH, "").lower() in OFF:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES" not in environ:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return None
    try:
        folder = writable(compile_folder(environ))
    except (OSError, RuntimeError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def compile_folder(environ: Mapping[str, str]) -> Path:
    """The folder of compiled programs, where it is not JAX's own variable that names one.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = environ.get(SWITCH, "")
    return Path(chosen).expanduser() if chosen else cache_home(environ) / "kvjax" / "compiled"


def writable(folder: Path) -> Path:
    """The folder, made if it was not there.

    Raises:
        OSError: it cannot be made, or nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def cache_home(environ: Mapping[str, str], platform: str = sys.platform) -> Path:
    """The folder where a user's programs keep what can be made again.

    Raises:
        RuntimeError: there is no home folder.
    """
    own = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(own):  # the XDG specification: others are to be ignored
        return Path(own)
    home = Path.home()
    if not home.is_absolute():  # HOME is empty: not below whatever folder this one is
        raise RuntimeError("no home folder")
    if platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home / ("Library/Caches" if platform == "darwin" else ".cache")


@contextlib.contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """The first interrupt inside calls `stop`, which ends what streams at its next look; the next one ends the program.

    Args:
        stop: called by a signal's handler.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can one listen
        yield
        return

    def heard(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(str(text).split())


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(f"kvjax: warning: {one_line(str(message))}\n")


__all__ = [
    "prepared",
    "load_lm",
    "use_compile_cache",
    "compile_folder",
    "writable",
    "cache_home",
    "interruptible",
    "one_line",
]
