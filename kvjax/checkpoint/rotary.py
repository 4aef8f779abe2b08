"""The rotary part of config.json, in its old layout (`rope_theta`, `rope_scaling`) and its new one (`rope_parameters`).

Numbers and precedence follow Transformers 5.23 (modeling_rope_utils): `rope_scaling` before `rope_parameters`; inside
either, `rope_type` before `type`, and a `rope_theta` there before the one outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.checkpoint.fields import Fields
from kvjax.checkpoint.reader import show
from kvjax.errors import CheckpointError
from kvjax.ops.positions import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "original_max_position_embeddings"}
)
REFUSED: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, 1, None)}
"""Keys of config.json that `rotary` reads, and those that must have their default."""

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rotary(fields: Fields, max_positions: int) -> tuple[Rope, int]:
    """Rotary positions and how far they reach.

    Args:
        fields: config.json.
        max_positions: the family's default for max_position_embeddings.

    Returns:
        The rotation, and the number of positions that the model was made for.

    Raises:
        CheckpointError: a scaling that is unknown or that kvjax refuses, or a damaged one.
    """
    values = fields.raw("rope_scaling") or fields.raw("rope_parameters") or {}
    return rotation(fields, values, fields.number("rope_theta", 10_000.0), max_positions)


def rotation(fields: Fields, values: Any, theta: float, max_positions: int) -> tuple[Rope, int]:
    """As `rotary`, from one object of rotary settings.

    Args:
        fields: config.json.
        values: the settings, in either layout.
        theta: base of the frequencies where `values` has none.
        max_positions: the family's default for max_position_embeddings.
    """
    positions = fields.integer("max_position_embeddings", max_positions)
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json: rope_scaling or rope_parameters must be an object, not {show(values)}")
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"config.json: a rotation per layer type ({', '.join(map(ascii, nested))}) is not supported"
        )
    scaling = Fields(values, "config.json, rope_scaling")
    theta = scaling.number("rope_theta", None) or theta
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be more than 1, not {theta}")
    if values.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise CheckpointError(
            f"config.json: partial_rotary_factor = {show(values['partial_rotary_factor'])} (only 1.0)"
        )
    kind = values.get("rope_type", values.get("type", "default"))
    if kind in ("dynamic", "longrope", "su"):
        raise CheckpointError(
            f"config.json: RoPE scaling {kind!r} is refused: its rotation depends on the length reached, so keys "
            "that are already cached would have to change"
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"config.json: unknown RoPE scaling {show(kind)}; known are {', '.join(_KINDS)}")
    known, make = _KINDS[kind]
    fields.unknown += [f"rope_scaling.{key}" for key in sorted(values.keys() - known - _COMMON)]
    original = fields.integer("original_max_position_embeddings", None)
    original = original or scaling.integer("original_max_position_embeddings", positions)
    return make(theta, scaling, original, positions)


def _plain(theta: float, fields: Fields, original: int, positions: int) -> tuple[Rope, int]:
    return Rope(theta), positions


def _linear(theta: float, fields: Fields, original: int, positions: int) -> tuple[Rope, int]:
    factor = fields.number("factor")
    # Some files give the length before scaling here, some the one after; too far is slow, too short refuses text.
    return Rope(theta, LinearScaling(factor)), _reach(positions, factor, positions)


def _llama3(theta: float, fields: Fields, original: int, positions: int) -> tuple[Rope, int]:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise CheckpointError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
    factor = fields.number("factor")
    scaling: Scaling = Llama3Scaling(factor, low, high, original)
    return Rope(theta, scaling), _reach(positions, factor, original)


def _yarn(theta: float, fields: Fields, original: int, positions: int) -> tuple[Rope, int]:
    factor = fields.number("factor", None) or positions / original
    attention = fields.number("attention_factor", None)
    mscale, all_dim = _mscale(fields, "mscale"), _mscale(fields, "mscale_all_dim")
    if attention is None and mscale and all_dim:
        attention = _temperature(factor, mscale) / _temperature(factor, all_dim)
    scaling = YarnScaling(
        factor=factor,
        original_positions=original,
        beta_fast=fields.number("beta_fast", None) or 32.0,
        beta_slow=fields.number("beta_slow", None) or 1.0,
        attention_factor=attention,
        truncate=fields.flag("truncate", True),
    )
    return Rope(theta, scaling), _reach(positions, factor, original)


def _reach(positions: int, factor: float, original: int) -> int:
    if factor * original >= 2**31:
        raise CheckpointError(f"config.json: a RoPE factor of {factor} stretches {original} positions beyond int32")
    return max(positions, math.floor(factor * original))


def _mscale(fields: Fields, name: str) -> float | None:
    # zero means absent, as in the reference
    return fields.number(name, None) if fields.raw(name) != 0 else None


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_Make = Callable[[float, Fields, int, int], tuple[Rope, int]]
_ORIGINAL = "original_max_position_embeddings"
_KINDS: dict[str, tuple[set[str], _Make]] = {
    "default": (set(), _plain),
    "linear": ({"factor"}, _linear),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, _llama3),
    "yarn": (
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL},
        _yarn,
    ),
}

__all__ = ["rotary", "rotation", "KEYS", "REFUSED"]
