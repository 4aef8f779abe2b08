"""Safetensors files, read over a memory map and never trusted.

The format is eight bytes of little-endian header length, a JSON header that names dtype, shape and byte range of each
tensor, and the bytes (github.com/huggingface/safetensors, "Format"). The checks are those of the reference reader: byte
ranges begin at zero, touch without gap or overlap, end with the file, and are exactly as long as dtype and shape say.
Nothing is allocated from a number in the header, so a hostile file costs no more memory than its own size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.errors import CheckpointError

MAX_HEADER = 100_000_000  # the reference reader's bound
MAX_RANK = 32  # numpy 1's bound on dimensions
MAX_EXTENT = 2**63 - 1

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Args:
        dtype: of the stored elements.
        shape: extents, outermost first.
        start, stop: bytes from the beginning of the file.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One file, its header read and checked, its tensors handed out as views of the map.

    Args:
        path: a `.safetensors` file.

    Raises:
        CheckpointError: the file is missing, or is not a well-formed safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise self._damaged(f"{size} bytes are too few for a header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
        try:
            self._infos, self.metadata = self._header(size)
        except CheckpointError:
            self._map.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """What the header says of one tensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}") from None

    def view(self, name: str) -> np.ndarray:
        """A read-only array over the map: no byte is read before it is used."""
        info = self.info(name)
        if info.start == info.stop:
            return np.empty(info.shape, info.dtype)
        raw = np.frombuffer(self._map, np.uint8, info.stop - info.start, info.start)
        return raw.view(info.dtype).reshape(info.shape)

    def release(self, name: str, rows: slice | None = None) -> None:
        """Gives the pages of a tensor, or of some of its outermost rows, back to the system."""
        # pages of a map that were touched count as resident memory until then
        if not hasattr(self._map, "madvise"):  # Windows
            return
        info = self.info(name)
        start, stop = info.start, info.stop
        if rows is not None and info.shape and info.shape[0]:
            row = (stop - start) // info.shape[0]
            start, stop = start + rows.start * row, min(stop, start + rows.stop * row)
        start -= start % mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Closes the map, or leaves that to the last view."""
        try:
            self._map.close()
        except BufferError:  # a view is still alive; the map goes with it
            pass

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid safetensors file: {why}")

    def _header(self, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        length = int.from_bytes(self._map[:8], "little")
        if length > MAX_HEADER:
            raise self._damaged(f"header of {length} bytes, more than {MAX_HEADER}")
        if length > size - 8:
            raise self._damaged(f"header of {length} bytes in a file of {size}")
        text = self._map[8 : 8 + length]
        if not text.startswith(b"{"):
            raise self._damaged("the header does not begin with '{'")
        try:
            header = parse_json(text)
        except ValueError as error:
            raise self._damaged(f"header: {error}") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("__metadata__ is no map from text to text")
        infos = {name: self._info(name, entry, 8 + length) for name, entry in header.items()}
        self._check_ranges(infos, 8 + length, size)
        return infos, metadata

    def _info(self, name: str, entry: Any, data: int) -> TensorInfo:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._damaged(f"tensor {name!r} needs dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise self._damaged(f"tensor {name!r} has dtype {show(kind)}, known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_extent(n) for n in shape):
            raise self._damaged(f"tensor {name!r} has shape {show(shape)}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_extent(n) for n in offsets):
            raise self._damaged(f"tensor {name!r} has data_offsets {show(offsets)}")
        start, stop = offsets
        if start > stop:
            raise self._damaged(f"tensor {name!r} begins at {start} and ends before, at {stop}")
        # numpy multiplies the extents around a zero too
        if math.prod(n or 1 for n in shape) * DTYPES[kind].itemsize > MAX_EXTENT:
            raise self._damaged(f"tensor {name!r} has shape {show(shape)}, more than can be addressed")
        nbytes = math.prod(shape) * DTYPES[kind].itemsize
        if nbytes != stop - start:
            raise self._damaged(
                f"tensor {name!r} is {nbytes} bytes by {kind} {show(shape)}, {stop - start} by its offsets"
            )
        return TensorInfo(DTYPES[kind], tuple(shape), data + start, data + stop)

    def _check_ranges(self, infos: dict[str, TensorInfo], data: int, size: int) -> None:
        end = data
        for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != end:
                what = "overlaps another" if info.start < end else "leaves a gap before it"
                raise self._damaged(
                    f"tensor {name!r} at byte {info.start - data} of the data, expected {end - data}: it {what}"
                )
            end = info.stop
        if end != size:
            raise self._damaged(f"tensors end at byte {end}, the file at {size}")


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object from bytes that nobody vouches for.

    Args:
        text: UTF-8.

    Returns:
        The object as a dict.

    Raises:
        ValueError: not UTF-8, not JSON, no object, a key twice, NaN or infinity, nested too deep, a lone surrogate.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    for key in values:
        key.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError, here and not where the name is printed
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT  # bool is an int to Python


def show(value: Any) -> str:
    """A value from an untrusted file, short enough for one line."""
    if type(value) is int and value.bit_length() > 200:  # Python refuses to print very long ones
        return "a huge number"
    if isinstance(value, list):
        return "[" + ", ".join(show(v) for v in value[:8]) + (", …]" if len(value) > 8 else "]")
    text = ascii(value) if isinstance(value, int | float | str | None) else type(value).__name__
    return text if len(text) <= 60 else text[:60] + "…"


__all__ = ["SafetensorsFile", "TensorInfo", "DTYPES", "parse_json", "show"]
