"""`kvjax info`: family, shapes and sizes of a model, and what each kind of cache costs it; no weights are read."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax import caches
from kvjax.caching import cache_nbytes
from kvjax.checkpoint.folder import Tensors, read_json
from kvjax.checkpoint.rules import plan
from kvjax.checkpoint.source import resolve
from kvjax.config import Config
from kvjax.lm import default_dtype, read_config
from kvjax.model import Model, decoder
from kvjax.params import abstract_params, count_params

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
    context = min(config.max_positions or CONTEXT, CONTEXT)
    return {
        "model": name,
        "family": family.model_type,
        "parameters": count_params(config),
        "stored_bytes": sum(info.stop - info.start for info in infos),
        "dtype": chosen.name,
        "bytes": count_params(config) * chosen.itemsize,
        "shapes": _shapes(config),
        "context": context,
        "caches": _costs(decoder(config, abstract_params(config, chosen)), config, context),
    }


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
    for label, made in plans.items():
        at, twice = (cache_nbytes(model, made, batch=1, capacity=n * context) for n in (1, 2))
        told = made.remark(model.layer_shapes()) if isinstance(made, caches.Kind) else ""
        costs.append({"kind": label, "bytes_per_token": (twice - at) // context, "bytes": at, "remark": told})
    return costs


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
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += [
        "",
        f"{'cache of one row':<30}{'bytes per token':>18}{'bytes at ' + format(about['context'], ',') + ' tokens':>28}",
    ]
    lines += [f"{c['kind']:<30}{c['bytes_per_token']:>18,}{c['bytes']:>28,}" for c in about["caches"]]
    for cost in about["caches"]:
        lines += ["", *textwrap.wrap(f"{cost['kind']}: {cost['remark']}", 80)] if cost["remark"] else []
    return "\n".join(lines)


__all__ = ["run", "describe"]
