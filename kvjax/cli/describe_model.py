"""`kvjax info`: family, shapes and sizes of a model, and what each kind of cache costs it; no weights are read."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import caches
from kvjax.caches.base import SOURCE
from kvjax.caches.cross import Source
from kvjax.caching import cache_nbytes, init_cache
from kvjax.checkpoint.folder import Tensors, read_json
from kvjax.checkpoint.rules import plan
from kvjax.checkpoint.source import resolve
from kvjax.config import Config
from kvjax.lm import default_dtype, read_config
from kvjax.model import Model, decoder
from kvjax.params import abstract_params, count_params
from kvjax.types import DType

CONTEXT = 4096
"""Tokens at which caches are compared where the model has no limit of its own, or a larger one."""

RING = 1024
"""Window of the ring that is shown, at most half the context."""


def run(args: argparse.Namespace) -> None:
    """Describes a model on stdout, as text or as one JSON object."""
    about = describe(args.model, args.dtype)
    print(json.dumps(about) if args.json else _text(about))


def describe(source: str, dtype: str | None = None) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        source: as `kvjax.load` takes it.
        dtype: of parameters and cache, None for what `load` would choose.

    Raises:
        CheckpointError: as `kvjax.load`.
    """
    folder, name = resolve(source, None)
    family, config = read_config(read_json(folder / "config.json"))
    with Tensors(folder) as tensors:
        leaves = plan(family, config, tensors)
        chosen = jnp.dtype(dtype) if dtype else default_dtype(leaves, tensors)
        infos = [tensors.info(part.name) for leaf in leaves for part in leaf.parts]
    return {
        "model": name,
        "family": family.model_type,
        "parameters": count_params(config),
        "stored_bytes": sum(info.stop - info.start for info in infos),
        "dtype": chosen.name,
        "bytes": count_params(config) * chosen.itemsize,
        **describe_config(config, chosen),
    }


def describe_config(config: Config, dtype: DType) -> dict[str, Any]:
    """Shapes, what each kind of cache costs, and the same of the encoder and what is kept of a source."""
    model, context = decoder(config, abstract_params(config, dtype)), _context(config)
    made = {"shapes": _shapes(config), "context": context, "caches": _costs(model, config, context), "encoder": None}
    if config.encoder is not None:
        own = jax.tree.leaves(model.params["encoder"])
        made["encoder"] = {
            "parameters": sum(x.size for x in own),
            "shapes": _shapes(config.encoder),
            "context": _context(config.encoder),
            "kept": _source_costs(model, config, _context(config.encoder)),
        }
    return made


def _context(config: Config) -> int:
    return min(config.max_positions or CONTEXT, CONTEXT)


def _shapes(config: Config) -> dict[str, Any]:
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    names = ("vocab_size", "num_layers", "width", "query_heads", "kv_heads", "head_dim", "ffn_width", "max_positions")
    shapes = {name: plain[name] for name in names}
    return shapes | {
        "tied": config.tied,
        "norm_order": config.norm_order.value,
        "positions": [str(positions) for positions in dict.fromkeys(config.turns)],
        "windows": list(config.windows),
        "attention_softcap": config.attention_softcap,
        "logit_softcap": config.logit_softcap,
    }


def _costs(model: Model, config: Config, context: int) -> list[dict[str, Any]]:
    window = min([w for w in config.windows if w is not None] or [RING, max(context // 2, 1)])
    plans = {"default": caches.default(config)} if set(config.windows) != {None} else {}
    for kind in caches.KINDS:
        label, made = _example(kind, window)
        plans[label] = made
    costs = []
    source = None if config.encoder is None else _source(model, config.encoder, 1)
    beside = 0 if source is None else _source_nbytes(model, source, None)
    for label, made in plans.items():
        sizes = (cache_nbytes(model, made, batch=1, capacity=n * context, source=source) for n in (1, 2))
        at, twice = (size - beside for size in sizes)
        told = made.remark(model.layer_shapes()) if isinstance(made, caches.Kind) else ""
        costs.append({"kind": label, "bytes_per_token": (twice - at) // context, "bytes": at, "remark": told})
    return costs


def _source_costs(model: Model, config: Config, context: int) -> list[dict[str, Any]]:
    assert config.encoder is not None
    costs = []
    for kind in caches.CROSS_KINDS:
        made = kind()
        at, twice = (_source_nbytes(model, _source(model, config.encoder, n * context), made) for n in (1, 2))
        told = made.remark(model.layer_shapes(), config.encoder.width)
        per_token = (twice - at) // context
        costs.append({"kind": f"{kind.__name__}()", "bytes_per_token": per_token, "bytes": at, "remark": told})
    return costs


def _source(model: Model, encoder: Config, slots: int) -> Source:
    states = jax.ShapeDtypeStruct((1, slots, encoder.width), model.layer_shapes()[0].dtype)
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    return Source(states, row, row)  # type: ignore[arg-type]


def _source_nbytes(model: Model, source: Source, kind: Any) -> int:
    made = jax.eval_shape(lambda source: init_cache(model, capacity=1, source=source, cross=kind).shared, source)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made[SOURCE]))


def _example(kind: Callable[..., Any], window: int) -> tuple[str, Any]:
    needed = [p for p in inspect.signature(kind).parameters.values() if p.default is inspect.Parameter.empty]
    return (f"{kind.__name__}({window})", kind(window)) if needed else (f"{kind.__name__}()", kind())


def _text(about: dict[str, Any]) -> str:
    s = about["shapes"]
    windows = sorted({w for w in s["windows"] if w is not None})
    local = sum(w is not None for w in s["windows"])
    rows = [
        ("model", f"{about['model']}, family {about['family']}"),
        ("parameters", f"{about['parameters']:,}; {about['bytes']:,} bytes in {about['dtype']}"),
        ("stored", f"{about['stored_bytes']:,} bytes"),
        ("layers", f"{s['num_layers']}, width {s['width']:,}, feed-forward {s['ffn_width']:,}"),
        ("heads", f"{s['query_heads']} of queries, {s['kv_heads']} of keys and values, head width {s['head_dim']}"),
        ("vocabulary", f"{s['vocab_size']:,}, head {'tied' if s['tied'] else 'of its own'}"),
        ("positions", f"{s['max_positions']:,}" if s["max_positions"] else "no limit"),
        ("windows", f"{', '.join(map(str, windows))} in {local} of {s['num_layers']} layers" if windows else "none"),
        ("norms", s["norm_order"]),
    ]
    if s["attention_softcap"] or s["logit_softcap"]:
        caps = (("scores", s["attention_softcap"]), ("logits", s["logit_softcap"]))
        rows.append(("soft caps", ", ".join(f"{cap:g} on {what}" for what, cap in caps if cap)))
    if (encoder := about["encoder"]) is not None:
        of = encoder["shapes"]
        shape = f"{of['num_layers']} layers, width {of['width']:,}, feed-forward {of['ffn_width']:,}"
        rows.insert(4, ("encoder", f"{shape}; {encoder['parameters']:,} of the parameters"))
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += _table("cache of one row", about["caches"], about["context"])
    if encoder is not None:
        lines += _table("kept of one source", encoder["kept"], encoder["context"])
    return "\n".join(lines)


def _table(title: str, costs: list[dict[str, Any]], context: int) -> list[str]:
    lines = ["", f"{title:<30}{'bytes per token':>18}{'bytes at ' + format(context, ',') + ' tokens':>28}"]
    lines += [f"{c['kind']:<30}{c['bytes_per_token']:>18,}{c['bytes']:>28,}" for c in costs]
    for cost in costs:
        lines += ["", *textwrap.wrap(f"{cost['kind']}: {cost['remark']}", 80)] if cost["remark"] else []
    return lines


__all__ = ["run", "describe", "describe_config"]
