"""The rules engine: which tensors of a checkpoint make which parameter, checked as a whole, copied one by one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kvjax.checkpoint.fields import Fields, Keys
from kvjax.checkpoint.reader import TensorInfo
from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.params import declare
from kvjax.types import DType, Params

BLOCK = 4 << 20  # bytes of a source that are resident at once
PATIENCE = 2.0  # seconds before a progress bar shows


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter, or the same one of every layer.

    Args:
        target: path in the parameter tree; `{i}` stands for the layer.
        sources: names in the checkpoint, laid side by side along the last axis.
        transposed: a source is stored [outputs, inputs], as `torch.nn.Linear` does.
    """

    target: str
    sources: tuple[str, ...]
    transposed: bool = False


def linear(target: str, *sources: str) -> tuple[Rule, Rule]:
    """The two rules of `torch.nn.Linear` maps: kernel transposed, bias as it is."""
    return (
        Rule(f"{target}/kernel", tuple(f"{s}.weight" for s in sources), transposed=True),
        Rule(f"{target}/bias", tuple(f"{s}.bias" for s in sources)),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """All that kvjax knows of one model type.

    Args:
        model_type: as config.json names it.
        config: the config map.
        keys: the three lists of config.json's keys.
        rules: for every parameter that a configuration of this family may declare.
        prefix: what some checkpoints put before most names and others leave out.
        ignored: patterns (whole name, prefix stripped) of tensors that carry no parameter.
        ignored_if_tied: names that repeat the embedding table where the head is tied.
        aliases: other names of config.json's keys.
    """

    model_type: str
    config: Callable[[Fields], Config]
    keys: Keys
    rules: tuple[Rule, ...]
    prefix: str
    ignored: tuple[str, ...] = ()
    ignored_if_tied: tuple[str, ...] = ("lm_head.weight",)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """What the engine asks of a checkpoint: names, headers, views, and giving pages back."""

    def __iter__(self) -> Any: ...
    def info(self, name: str) -> TensorInfo: ...
    def view(self, name: str) -> np.ndarray: ...
    def release(self, name: str, rows: slice | None = None) -> None: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """One source tensor and the columns of its parameter that it fills."""

    name: str
    columns: slice
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: where it stands, its shape, what it is made of."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def plan(family: Family, config: Config, tensors: Source) -> list[Leaf]:
    """Matches every declared parameter with its sources.

    Args:
        family: the rules.
        config: the model.
        tensors: the checkpoint.

    Returns:
        One entry per parameter.

    Raises:
        CheckpointError: lists every missing, unexpected and mis-shaped tensor at once.
    """
    names: dict[str, str] = {}
    wrong: list[str] = []
    for name in tensors:
        short = name.removeprefix(family.prefix)
        if short in names:
            wrong.append(f"twice: {names[short]} and {name}")
        names[short] = name
    rules = {rule.target: rule for rule in family.rules}
    leaves, used = [], set()
    for path, shape in _flatten(declare(config)):
        layer = path[1] if path[0] == "layers" else ""
        rule = rules["/".join((path[0], "{i}", *path[2:]) if layer else path)]
        parts, offset = [], 0
        for source, width in zip(rule.sources, _widths(config, path, shape, len(rule.sources)), strict=True):
            short = source.format(i=layer)
            used.add(short)
            expected = (*shape[:-1], width)
            if rule.transposed:
                expected = expected[::-1]
            if short not in names:
                wrong.append(f"missing: {short} {list(expected)}")
                continue
            info = tensors.info(names[short])
            if info.shape != expected:
                wrong.append(f"shape: {names[short]} is {list(info.shape)}, config.json makes it {list(expected)}")
            elif not jnp.issubdtype(info.dtype, jnp.floating):
                wrong.append(f"dtype: {names[short]} is {info.dtype}, expected a floating one")
            parts.append(Part(names[short], slice(offset, offset + width), rule.transposed))
            offset += width
        leaves.append(Leaf(path, shape, tuple(parts)))
    ignored = re.compile("|".join(f"(?:{p})" for p in family.ignored) or r"(?!)")
    for short, name in names.items():
        repeated = config.tied and short in family.ignored_if_tied
        if short not in used and not repeated and not ignored.fullmatch(short):
            wrong.append(f"unexpected: {name} {list(tensors.info(name).shape)}")
    if wrong:
        raise CheckpointError(f"the tensors do not fit config.json ({len(wrong)}):\n  " + "\n  ".join(wrong))
    return leaves


def convert(leaves: Iterable[Leaf], tensors: Source, dtype: DType) -> Params:
    """Copies every parameter into an array of its own, holding one block of one source besides what is done.

    Args:
        leaves: from `plan`.
        tensors: the checkpoint.
        dtype: of every parameter.

    Returns:
        The parameter tree, on the default device.

    Raises:
        CheckpointError: a number is too large for `dtype`.
    """
    tree: Params = {}
    for leaf in tqdm(list(leaves), desc="loading", unit="tensor", delay=PATIENCE, leave=False):
        array = _aligned(leaf.shape, np.dtype(dtype))
        for part in leaf.parts:
            _fill(array, part, tensors)
        node = tree
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        node[leaf.path[-1]] = jax.device_put(array)
    return tree


def _fill(array: np.ndarray, part: Part, tensors: Source) -> None:
    source = tensors.view(part.name)
    target = array[..., part.columns]
    if part.transposed:
        target = target.T
    rows = max(1, BLOCK // max(1, source[:1].nbytes))
    narrow = array.dtype.itemsize < 4 and array.dtype.itemsize <= source.dtype.itemsize and array.dtype != source.dtype
    for start in range(0, source.shape[0], rows):
        block = slice(start, start + rows)
        with np.errstate(over="ignore"):
            target[block] = source[block]
        if narrow and not np.isfinite(target[block]).all() and np.isfinite(source[block]).all():
            raise CheckpointError(f"{part.name}: holds numbers too large for {array.dtype}; load with another dtype")
        tensors.release(part.name, block)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    # XLA:CPU takes a 64-byte aligned array over without a copy (jax 0.7.2, 0.10.2 and 0.12.0)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def _widths(config: Config, path: tuple[str, ...], shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    if count == 1:
        return (shape[-1],)
    if path[-2] == "qkv":
        return tuple(heads * config.head_dim for heads in (config.query_heads, config.kv_heads, config.kv_heads))
    return (shape[-1] // count,) * count


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], tuple[int, ...]]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, name))
        else:
            yield (*path, name), value


__all__ = ["Family", "Rule", "linear", "plan", "convert"]
