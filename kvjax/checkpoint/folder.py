"""A Hugging Face folder: its JSON files, and its tensors in one file or in many with an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kvjax.checkpoint.reader import SafetensorsFile, TensorInfo, parse_json
from kvjax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or damaged.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged JSON: {error}") from error


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`, an empty dict where there is no file."""
    return read_json(path) if path.exists() else {}


class Tensors:
    """All tensors of a folder under one set of names, whichever file they lie in.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files that it lists.

    Raises:
        CheckpointError: no such files, a damaged one, or an index that disagrees with them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, str] = {}
        try:
            if (folder / SINGLE).exists():
                self._open(SINGLE)
                self._home = dict.fromkeys(self._files[SINGLE], SINGLE)
            elif (folder / INDEX).exists():
                self._open_shards()
            else:
                raise CheckpointError(self._nothing())
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor."""
        return self._files[self._home[name]].info(name)

    def view(self, name: str) -> np.ndarray:
        """A read-only array over the map of its file."""
        return self._files[self._home[name]].view(name)

    def release(self, name: str, rows: slice | None = None) -> None:
        """Gives the pages of a tensor, or of some of its rows, back to the system."""
        self._files[self._home[name]].release(name, rows)

    def close(self) -> None:
        """Closes every file."""
        for file in self._files.values():
            file.close()

    def _open(self, name: str) -> None:
        self._files[name] = SafetensorsFile(self.folder / name)

    def _open_shards(self) -> None:
        path = self.folder / INDEX
        home = read_json(path).get("weight_map")
        if not isinstance(home, dict) or not home or not all(isinstance(v, str) for v in home.values()):
            raise CheckpointError(f"{path}: weight_map is no map from tensor to file")
        for shard in sorted(set(home.values())):
            if not _inside(shard):
                raise CheckpointError(f"{path}: {shard!r} is no path inside the folder")
            if not (self.folder / shard).exists():
                raise CheckpointError(f"{path}: lists {shard!r}, which is not in the folder")
            self._open(shard)
        wrong = [f"{name!r} is not in {shard!r}" for name, shard in home.items() if name not in self._files[shard]]
        for shard, file in self._files.items():
            wrong += [f"{name!r} of {shard!r} is not listed there" for name in file if home.get(name) != shard]
        if wrong:
            raise CheckpointError(f"{path}: disagrees with its files: {'; '.join(wrong)}")
        self._home = home

    def _nothing(self) -> str:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder}: holds {pickles[0]} but no {SINGLE}: pickled weights can run code and are never read; "
                "convert them to safetensors"
            )
        return f"{self.folder}: holds neither {SINGLE} nor {INDEX}"


def _inside(shard: str) -> bool:
    # by its text: the hub's cache is made of links that lead out of the folder, and those are fine
    path = PurePosixPath(shard)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and not set(shard) & set("\\:\0")


__all__ = ["Tensors", "read_json", "read_json_if_there"]
