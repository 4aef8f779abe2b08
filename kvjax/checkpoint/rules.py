"""The rules engine: which tensors of a checkpoint make which parameter, checked as a whole, copied one by one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
NEAR = 2e-3  # bfloat16 rounds numbers up to 1 by 2**-9
PATIENCE = 2.0  # seconds before a progress bar shows


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter, or the same one of every layer.

    Args:
        target: path in the parameter tree; `{i}` stands for the layer.
        sources: names in the checkpoint, laid side by side along the last axis.
        transposed: a source is stored [outputs, inputs], as `torch.nn.Linear` does.
        skip: so many rows at the beginning of a source carry nothing.
        row: a source is stored [1, outputs], the parameter is [outputs].
        optional: without its sources the parameter is zero.
    """

    target: str
    sources: tuple[str, ...]
    transposed: bool = False
    skip: int = 0
    row: bool = False
    optional: bool = False

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of which `shape` is taken."""
        shape = shape[::-1] if self.transposed else shape
        return (1, *shape) if self.row else (shape[0] + self.skip, *shape[1:])


def linear(target: str, *sources: str) -> tuple[Rule, Rule]:
    """The two rules of `torch.nn.Linear` maps: kernel transposed, bias as it is."""
    return (
        Rule(f"{target}/kernel", tuple(f"{s}.weight" for s in sources), transposed=True),
        Rule(f"{target}/bias", tuple(f"{s}.bias" for s in sources)),
    )


def _no_tables(config: Config, stored: Collection[str]) -> tuple[tuple[str, ...], ...]:
    return ()


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
        tables: from the configuration and the names that are stored (prefix stripped), groups of names that mean one
            tensor: any of a group may be stored, and those that are must be equal.
        constants: name of a tensor that is no parameter (prefix stripped) to what it must hold, to `NEAR`, by the
            configuration and its number of rows.
        aliases: other names of config.json's keys.
    """

    model_type: str
    config: Callable[[Fields], Config]
    keys: Keys
    rules: tuple[Rule, ...]
    prefix: str
    ignored: tuple[str, ...] = ()
    ignored_if_tied: tuple[str, ...] = ("lm_head.weight",)
    tables: Callable[[Config, Collection[str]], tuple[tuple[str, ...], ...]] = _no_tables
    constants: Mapping[str, Callable[[Config, int], np.ndarray]] = dataclasses.field(default_factory=dict)
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
    rule: Rule


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
    groups = {name: group for group in family.tables(config, names.keys()) for name in group}
    leaves, used = [], {name for name in groups if name in names}
    for path, shape in _flatten(declare(config)):
        at = path.index("layers") + 1 if "layers" in path else len(path)
        layer = "".join(path[at : at + 1])
        rule = rules["/".join((*path[:at], "{i}", *path[at + 1 :]) if layer else path)]
        parts, offset = [], 0
        for source, width in zip(rule.sources, _widths(config, path, shape, len(rule.sources)), strict=True):
            alike = groups.get(short := source.format(i=layer), (short,))
            short = next((name for name in alike if name in names), short)
            used.add(short)
            expected = rule.stored((*shape[:-1], width))
            if short not in names:
                if not rule.optional:
                    wrong.append(f"missing: {' or '.join(alike)} {list(expected)}")
                continue
            info = tensors.info(names[short])
            if info.shape != expected:
                wrong.append(f"shape: {names[short]} is {list(info.shape)}, config.json makes it {list(expected)}")
            elif not jnp.issubdtype(info.dtype, jnp.floating):
                wrong.append(f"dtype: {names[short]} is {info.dtype}, expected a floating one")
            parts.append(Part(names[short], slice(offset, offset + width), rule))
            offset += width
        leaves.append(Leaf(path, shape, tuple(parts)))
    for group in dict.fromkeys(groups.values()):
        first, *others = [names[name] for name in group if name in names] or [""]
        others = [other for other in others if not _equal(tensors, first, other)]
        wrong += [f"differs: {other} from {first}, which are one table here" for other in others]
    for short, value in family.constants.items():
        if short in names and not _close(tensors, names[short], value(config, tensors.info(names[short]).shape[0])):
            wrong.append(f"differs: {names[short]} from what config.json makes it, which is all that is computed")
        used.add(short)
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
    for leaf in tqdm(list(leaves), desc="loading", unit="tensor", delay=PATIENCE, leave=False, disable=None):
        array = _aligned(leaf.shape, np.dtype(dtype))
        if not leaf.parts:
            array[...] = 0
        for part in leaf.parts:
            _fill(array, part, tensors)
        node = tree
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        node[leaf.path[-1]] = jax.device_put(array)
    return tree


def _fill(array: np.ndarray, part: Part, tensors: Source) -> None:
    rule, stored = part.rule, tensors.info(part.name).dtype
    target = array[..., part.columns]
    if rule.transposed:
        target = target.T
    if rule.row:
        target = target[None]
    narrow = array.dtype.itemsize < 4 and array.dtype.itemsize <= stored.itemsize and array.dtype != stored
    for rows, block in _blocks(tensors, part.name, rule.skip):
        with np.errstate(over="ignore"):
            target[rows] = block
        if narrow and not np.isfinite(target[rows]).all() and np.isfinite(block).all():
            raise CheckpointError(f"{part.name}: holds numbers too large for {array.dtype}; load with another dtype")


def _blocks(tensors: Source, name: str, skip: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of a tensor from `skip` on, some at a time, each given back to the system after use."""
    source = tensors.view(name)[skip:]
    rows = max(1, BLOCK // max(1, source[:1].nbytes))
    for start in range(0, source.shape[0], rows):
        block = slice(start, start + rows)
        yield block, source[block]
        tensors.release(name, slice(start + skip, start + skip + rows))


def _equal(tensors: Source, one: str, other: str) -> bool:
    if tensors.info(one).shape != tensors.info(other).shape:
        return False
    both = zip(_blocks(tensors, one), _blocks(tensors, other), strict=False)
    return all(np.array_equal(a, b) for (_, a), (_, b) in both)


def _close(tensors: Source, name: str, expected: np.ndarray) -> bool:
    if tensors.info(name).shape != expected.shape:
        return False
    both = ((block.astype(np.float32), expected[rows]) for rows, block in _blocks(tensors, name))
    return all((np.abs(stored - made) <= NEAR).all() for stored, made in both)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    # XLA:CPU takes a 64-byte aligned array over without a copy (jax 0.7.2, 0.10.2 and 0.12.0)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def _widths(config: Config, path: tuple[str, ...], shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    if count == 1:
        return (shape[-1],)
    if path[0] == "encoder" and config.encoder is not None:
        config = config.encoder
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
