"""What is planned for: the shape of a model, from a model, a folder or a config.json alone; no weights are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.cross import Source
from kvjax.caching import init_cache
from kvjax.checkpoint.folder import read_json
from kvjax.checkpoint.source import resolve
from kvjax.config import Config
from kvjax.errors import CheckpointError, InputError
from kvjax.lm import LM, read_config
from kvjax.model import Model, decoder
from kvjax.ops.positions import Learned
from kvjax.params import abstract_params
from kvjax.types import DType
from kvjax.weights import Int8, int8_weights

HALVES = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A model without its numbers.

    Args:
        name: for people.
        model: its parameters are `jax.ShapeDtypeStruct`, or int8 codes and scales of these.
    """

    name: str
    model: Model

    @property
    def int8(self) -> bool:
        """Whether its matrices are int8 codes."""
        return any(isinstance(x, Int8) for x in self._matrices())

    @property
    def config(self) -> Config:
        """Of the model."""
        return self.model.config

    @property
    def dtype(self) -> Any:
        """What it computes in."""
        return self.model.layer_shapes()[0].dtype

    def parameters(self) -> int:
        """How many numbers there are."""
        return sum((x.codes if isinstance(x, Int8) else x).size for x in self._matrices())

    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(_nbytes(leaf) for _, leaf in self._leaves())

    def read(self, batch: int, cache: Cache) -> int:
        """Bytes of parameters that one step reads: of an embedding that is not the head as well, and of learned
        positions, one row for each of the batch; of an encoder nothing; the maps of the source's keys and values only
        where its states are kept instead.

        Args:
            batch: B.
            cache: of `jax.ShapeDtypeStruct` or arrays.
        """
        projected = bool(getattr(cache.shared.get(SOURCE), "k", ()))
        total = 0
        for path, leaf in self._leaves():
            rows = (path[:2] == ("embed", "table") and not self.config.tied) or (
                path[:2] == ("positions", "table") and isinstance(self.config.positions, Learned)
            )
            if rows:
                total += batch * _nbytes(leaf) // leaf.shape[0]
            elif path[0] != "encoder" and not (projected and path[2:4] == ("cross", "kv")):
                total += _nbytes(leaf)
        return total

    def cache(self, plan: Any, batch: int, context: int, source: int | None = None, cross: Any = None) -> Cache:
        """The cache that `init_cache` would make, of `jax.ShapeDtypeStruct`; `source` is S, a source for each row."""
        begin = lambda given: init_cache(self.model, plan, batch=batch, capacity=context, source=given, cross=cross)  # noqa: E731
        return jax.eval_shape(begin, None if source is None else self._source(batch, source))

    def _source(self, rows: int, slots: int) -> Source:
        assert self.config.encoder is not None
        states = jax.ShapeDtypeStruct((rows, slots, self.config.encoder.width), self.dtype)
        row = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return Source(states, row, row)  # type: ignore[arg-type]

    def _leaves(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.model.params):
            yield tuple(getattr(key, "key", str(key)) for key in path), leaf

    def _matrices(self) -> list[Any]:
        return jax.tree.leaves(self.model.params, is_leaf=lambda x: isinstance(x, Int8))


def _nbytes(leaf: Any) -> int:
    return int(leaf.size * leaf.dtype.itemsize)


def planned(model: Any, dtype: DType | None, weights: str | None, halves: tuple[str, ...]) -> Planned:
    """The shape of what is given.

    Args:
        model: a `Model`, an `LM`, a `Config`, or where a config.json lies: a file, a folder, a bundled name, a hub id.
        dtype: of parameters and cache; None: those of a model; of a config.json what it says, float32 if it says
            nothing; and a half precision that the device lacks becomes the one that it has.
        weights: "int8", or None for the dtype.
        halves: half precisions that the device has.

    Raises:
        InputError: a model that is not this library's own decoder, or `weights` or `dtype` of another kind.
        CheckpointError: no such file, or it describes no model.
    """
    if weights not in (None, "int8"):
        raise InputError(f"estimate: weights must be int8 or None, not {weights!r}")
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise InputError(f"estimate: dtype must be a floating one, not {jnp.dtype(dtype)}")
    if isinstance(model, LM):
        model, name = model.model, model.name
    elif isinstance(model, Model | Config):
        name = type(model).__name__.lower()
    else:
        model, name, said = _read(model)
        if dtype is None:
            dtype = _suited(said, halves)
    if isinstance(model, Model):
        if not isinstance(model.config, Config):
            raise InputError("estimate: costs are predicted from kvjax.Config; this model has none")
        if dtype is None:
            return Planned(name, jax.eval_shape(int8_weights if weights else _itself, model))
        model = model.config
    made = decoder(model, abstract_params(model, dtype or jnp.float32))
    return Planned(name, jax.eval_shape(int8_weights, made) if weights else made)


def _itself(model: Model) -> Model:
    return model


def _read(source: str | os.PathLike[str]) -> tuple[Config, str, str]:
    path = Path(os.fspath(source)).expanduser()
    if path.suffix == ".json":
        folder, name = path, path.resolve().parent.name
    else:
        folder, name = resolve(source, None, ("config.json",))
        folder = folder / "config.json"
    hf = read_json(folder)
    said = hf.get("dtype", hf.get("torch_dtype")) or "float32"
    if said not in (*HALVES, "float32"):
        raise CheckpointError(f"{folder}: dtype is {said!r}; give estimate a dtype")
    return read_config(hf)[1], name, said


def _suited(said: str, halves: tuple[str, ...]) -> DType:
    if said in HALVES and said not in halves:
        return jnp.dtype(halves[0] if halves else jnp.float32)
    return jnp.dtype(said)


__all__ = ["Planned", "planned"]
