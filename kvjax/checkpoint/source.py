"""Where a checkpoint comes from: a bundled name, a path, or a hub id. In every case a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvjax.errors import CheckpointError

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
# What is read, and nothing else: many repositories keep the same weights two or three times.
PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "spiece.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "target_vocab.json",
]


def bundled() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.name for p in BUNDLED.iterdir() if (p / "config.json").is_file()) if BUNDLED.is_dir() else []


def resolve(
    source: str | os.PathLike[str], revision: str | None, patterns: Sequence[str] = tuple(PATTERNS)
) -> tuple[Path, str]:
    """A local folder and the model's name.

    Args:
        source: a bundled name; a path, if it is path-like, begins with "." or "~", or has a separator; else a hub id.
            `owner/name` reads both ways: it is a path if that folder exists.
        revision: branch, tag or commit on the hub.
        patterns: which of its files are fetched from there.

    Raises:
        CheckpointError: no such folder, no hub client, or what the hub said.
    """
    text = os.fspath(source)
    if not text:
        raise CheckpointError("load: source is empty; give a bundled name, a folder, or a hub id")
    if not isinstance(source, os.PathLike) and text in bundled():
        return BUNDLED / text, text
    path = Path(text).expanduser()
    if isinstance(source, os.PathLike) or _is_path(text):
        if not path.is_dir():
            what = "is a file; give the folder it lies in" if path.exists() else "is no folder"
            raise CheckpointError(f"load: {text} {what}")
        return path, path.resolve().name
    return _download(text, revision, patterns), text


def _is_path(text: str) -> bool:
    separators = [s for s in (os.sep, os.altsep) if s]
    if text.startswith((".", "~")) or Path(text).is_absolute():
        return True
    return any(s in text for s in separators) and (Path(text).exists() or text.count("/") != 1 or text.endswith("/"))


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        known = ", ".join(bundled()) or "none"
        raise CheckpointError(
            f"load: {repository!r} is neither a bundled model ({known}) nor a folder; to fetch it from the hub, "
            "install the client: pip install 'kvjax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the client's errors, and those of the several clients below it, share no other base
        known = ", ".join(bundled()) or "none"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"load: {repository!r} is neither a bundled model ({known}) nor a folder, and the hub gave: "
            f"{type(error).__name__}: {reason}"
        ) from error


__all__ = ["resolve", "bundled"]
