"""A cache in a file: safetensors, written at once or not at all, and never trusted when it is read.

Every buffer lies there as `[B, K, T, ...]` (pools of pages as `[P, K, page, ...]`), whatever its layout in memory, and
as its codec keeps it: float8 and int4 are bytes already, and the plan says what they are. A tensor's name is its place
in the tree, `layers/0/k/data`. The metadata say how the tree is made again: the plan as text (`caches.parse` reads it),
what is kept of a source and the shape that it had, the model's configuration and fingerprint, and a checksum over
everything. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kvjax import caches
from kvjax.caches import storage
from kvjax.caches.base import SOURCE, Cache
from kvjax.caches.codecs import Store
from kvjax.caches.cross import Source
from kvjax.caching import init_cache
from kvjax.checkpoint import reader
from kvjax.checkpoint.reader import SafetensorsFile, parse_json, show
from kvjax.checks import is_concrete
from kvjax.errors import CacheError, CheckpointError, InputError
from kvjax.model import Model

VERSION = "2"
"""Of the file's layout; a file of another version is refused."""

FIELDS = {"kvjax_cache", "kvjax", "plan", "source", "config", "model", "checksum"}
"""What the metadata hold, each as text."""

FLOATS = {"float64", "float32", "float16", "bfloat16"}
"""What a source's states may be."""

DTYPES = {dtype.name for dtype in reader.DTYPES.values() if not dtype.name.startswith("float8")}
"""What may be written; every version of safetensors that kvjax supports reads it."""


def save_cache(path: str | os.PathLike[str], cache: Cache, model: Model) -> None:
    """Writes a cache to a file; an interrupt leaves the old file, or none.

    Args:
        path: of the file, replaced where it exists. The temporary file lies beside it.
        cache: of any plan whose kinds can be written as text; `load_cache` takes others with its `plan`.
        model: that the cache was made for. Its configuration and the fingerprint of its parameters go into the file;
            for that all parameters are read once.

    Raises:
        CacheError: the cache was not made by `init_cache` for such a model, is traced, or holds a dtype that has no
            place there; the path is a folder, or lies in none.
        InputError: `model` is no `Model`.
    """
    _checked(model)
    if not cache.plan:
        raise CacheError("save_cache: the cache has no plan; make it with kvjax.init_cache")
    if not is_concrete(cache.lengths):
        raise CacheError("save_cache: the cache is traced; save it outside jit")
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        what = "is a folder" if Path(path).is_dir() else "lies in a folder that does not exist"
        raise CacheError(f"save_cache: {path} {what}")
    tensors = _named(_apart(jax.tree.map(np.asarray, cache)))
    kinds = cache.words
    source = _about_source(cache)
    cross = None if source is None else cache.shared[SOURCE].kind
    expected = _named(_abstract(model, kinds, cache.batch, cache.capacity, source, cross))
    _compare(f"save_cache: a cache of {_plan_text(kinds)}", _shapes(tensors), _shapes(expected), CacheError)
    for name, x in tensors.items():
        if x.dtype.name not in DTYPES:
            raise CacheError(f"save_cache: {name} has dtype {x.dtype.name}; a codec keeps it as uint8, to be saved")
    about = {
        "kvjax_cache": VERSION,
        "kvjax": _version(),
        "plan": json.dumps([str(kind) for kind in kinds]),
        "source": json.dumps(source),
        "config": json.dumps(_described(model.config)),
        "model": fingerprint(model.params),
    }
    about["checksum"] = _checksum(about, tensors)
    with _replacing(Path(path)) as fresh:
        save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, fresh, metadata=about)


def load_cache(path: str | os.PathLike[str], model: Model, *, plan: Any = None, cross: Any = None) -> Cache:
    """Reads what `save_cache` wrote; decoding goes on from it as from the cache that was saved.

    Args:
        path: of the file.
        model: the one that it was saved with: of the same configuration and the same parameters, bit for bit.
        plan: for kinds of one's own, which the file's text cannot name; None reads the plan from the file.
        cross: the same for what is kept of a source.

    Raises:
        CheckpointError: the file is missing, cut off, damaged, of another version or of another model, or its tensors
            are not those of its plan. Names the thing and the two values that disagree.
    """
    _checked(model)
    with SafetensorsFile(path) as file:
        about, tensors = file.metadata, {name: file.view(name) for name in file}
        version = about.get("kvjax_cache", "none")
        if version != VERSION:
            raise CheckpointError(f"{path}: cache of version {show(version)}; this reads version {VERSION}")
        if about.keys() != FIELDS:
            raise CheckpointError(f"{path}: metadata are {show(sorted(about))}, they must be {sorted(FIELDS)}")
        if (found := _checksum(about, tensors)) != about["checksum"]:
            said = show(about["checksum"][:16])
            raise CheckpointError(f"{path}: damaged: the contents have the checksum {found[:16]}…, it says {said}")
        fields = {key: _json(path, key, about[key]) for key in ("plan", "source", "config")}
        _same_model(path, model, fields["config"], about["model"])
        kinds = _kinds(path, fields["plan"], plan)
        shape = tensors["tokens"].shape if "tokens" in tensors else ()
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(f"{path}: tokens are {list(shape)}, they must be [B, T]")
        source = fields["source"]
        cross = _cross(path, source, cross)
        apart = _outlined(path, model, kinds, *shape, source, cross)
        expected = _named(apart)
        _compare(f"{path}: a cache of {_plan_text(kinds)}", _shapes(tensors), _shapes(expected), CheckpointError)
        made = jax.tree.unflatten(jax.tree.structure(apart), [tensors[name] for name in expected])
        # Copies: a buffer that lies in the map would change with the file.
        return jax.tree.map(jnp.array, _together(made))


def _checked(model: Any) -> None:
    if not isinstance(model, Model):
        raise InputError(f"model must be a kvjax.Model, such as lm.model, not {type(model).__name__}")


def fingerprint(params: Any) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter.

    It covers nothing else: a model of one's own with another `apply` and the same parameters has the same.
    """
    return _digest(_named(params))


def _digest(named: dict[str, Any]) -> str:
    """SHA-256 over name, dtype, shape and SHA-256 of the bytes of every array."""

    def of(name: str) -> str:
        x = np.asarray(named[name], order="C")
        return f"{name} {_shape_text(x)} {hashlib.sha256(x.reshape(-1).view(np.uint8).data).hexdigest()}\n"

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return hashlib.sha256("".join(pool.map(of, sorted(named))).encode()).hexdigest()


def _version() -> str:
    try:
        return metadata.version("kvjax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


# Every buffer [B, K, T, ...], and back


def _each_store(f: Callable[..., Any], cache: Any) -> Any:
    is_store = lambda x: isinstance(x, Store)  # noqa: E731
    return jax.tree.map(lambda x: x.each(f) if is_store(x) else x, cache, is_leaf=is_store)


def _apart(cache: Any) -> Any:
    return _each_store(storage.unpack, cache)


def _together(cache: Any) -> Any:
    return _each_store(lambda x, heads, rest: storage.repack(x), cache)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(model: Model, plan: Any, batch: int, capacity: int, source: Any, cross: Any) -> Any:
    """What `_apart` makes of an empty cache, nothing allocated; `source` is as `_about_source` says."""
    how: dict[str, Any] = {"batch": batch, "capacity": capacity}
    if source is None:
        return jax.eval_shape(lambda: _apart(init_cache(model, plan, **how)))
    rows, row = tuple(source["states"]), jax.ShapeDtypeStruct((source["states"][0],), jnp.int32)
    given = Source(jax.ShapeDtypeStruct(rows, jnp.dtype(source["dtype"])), row, row)  # type: ignore[arg-type]
    return jax.eval_shape(lambda given: _apart(init_cache(model, plan, source=given, cross=cross, **how)), given)


def _about_source(cache: Cache) -> dict[str, Any] | None:
    """What is kept of the source, as JSON: the word, and shape `[R, S, E]` and dtype of the states; None without."""
    entry = cache.shared.get(SOURCE)
    if entry is None:
        return None
    shape = [entry.lengths.shape[0], entry.slots, entry.width]
    return {"kind": str(entry.kind), "states": shape, "dtype": jnp.dtype(entry.dtype).name}


def _cross(path: Any, source: Any, cross: Any) -> Any:
    """What is kept of the source, if the metadata say of it what `_about_source` writes; None without one."""
    if source is None:
        return None
    good = isinstance(source, dict) and source.keys() == {"kind", "states", "dtype"}
    if good:
        shape = source["states"]
        good = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not good or source["dtype"] not in FLOATS or not isinstance(source["kind"], str):
        raise CheckpointError(f"{path}: source is {show(source)}, it must be null, or kind, states [R, S, E] and dtype")
    if cross is not None:
        if str(cross) != source["kind"]:
            raise CheckpointError(f"{path}: of the source {show(source['kind'])} is kept there, {cross} is given")
        return cross
    try:
        return caches.parse(source["kind"])
    except InputError as error:
        raise CheckpointError(f"{path}: source: {error}; for a kind of your own give load_cache cross") from error


def _compare(what: str, found: dict[str, str], expected: dict[str, str], error: type[Exception]) -> None:
    """Raises on the first tensor that is missing, not expected, or of another dtype or shape."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise error(f"{what} has {name} {expected.get(name, 'nowhere')}, but there is {found.get(name, 'none')}")


def _shapes(named: dict[str, Any]) -> dict[str, str]:
    return {name: _shape_text(x) for name, x in named.items()}


def _shape_text(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


# The metadata


def _checksum(about: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the metadata but itself, and over the tensors."""
    rest = {key: text for key, text in about.items() if key != "checksum"}
    return hashlib.sha256((json.dumps(rest, sort_keys=True) + _digest(tensors)).encode()).hexdigest()


def _described(value: Any) -> Any:
    """A configuration as JSON: fields of dataclasses by name, functions by module and name."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # JSON has no infinity
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"": type(value).__qualname__} | fields
    if isinstance(value, tuple | list):
        return [_described(x) for x in value]
    if isinstance(value, dict):
        return {str(key): _described(x) for key, x in value.items()}
    if isinstance(value, functools.partial):
        return {"": "partial", "of": _described(value.func), "args": _described((value.args, value.keywords))}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.dtype):
        return value.name
    raise CacheError(f"the model's configuration holds {value!r}, which cannot be written as text")


def _same_model(path: Any, model: Model, config: Any, model_hash: str) -> None:
    ours = _described(model.config)
    theirs, mine = (x if isinstance(x, dict) else {"": x} for x in (config, ours))
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key):
            values = (json.dumps(x.get(key))[:80] for x in (theirs, mine))
            name = f"config.{key}" if key else "config"
            raise CheckpointError(f"{path}: {name} is {' there, '.join(values)} in this model: it is another model's")
    if (own := fingerprint(model.params)) != model_hash:
        raise CheckpointError(
            f"{path}: the model's parameters have the fingerprint {show(model_hash[:16])}… there, {own[:16]}… here: "
            "keys and values were made with other parameters"
        )


def _json(path: Any, key: str, text: str) -> Any:
    try:
        return parse_json(f'{{"": {text}}}'.encode())[""]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {key} in the metadata: {error}") from error


def _kinds(path: Any, texts: Any, plan: Any) -> tuple[Any, ...]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: plan is {show(texts)}, it must be one text a layer")
    if plan is not None:
        kinds = tuple(plan) if isinstance(plan, tuple | list) else (plan,) * len(texts)
        given = [str(kind) for kind in kinds]
        if given != texts:
            raise CheckpointError(f"{path}: plan is {show(texts)} there, {show(given)} is given")
        return kinds
    try:
        made = {text: caches.parse(text) for text in texts}
    except InputError as error:
        raise CheckpointError(f"{path}: plan: {error}; for a kind of your own give load_cache its plan") from error
    return tuple(made[text] for text in texts)


def _outlined(
    path: Any, model: Model, kinds: tuple[Any, ...], batch: int, capacity: int, source: Any, cross: Any
) -> Any:
    try:
        return _abstract(model, kinds, batch, capacity, source, cross)
    except (InputError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: no cache of {_plan_text(kinds)} for this model: {error}") from error


def _plan_text(kinds: tuple[Any, ...]) -> str:
    texts = [str(kind) for kind in kinds]
    return texts[0] if len(set(texts)) == 1 else "(" + ", ".join(texts) + ")"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, in the same folder; what lies there takes the place of `path` once it is on the disk."""
    handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        fresh.chmod(0o644)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


__all__ = ["save_cache", "load_cache", "fingerprint"]
