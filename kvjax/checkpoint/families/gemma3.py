"""Gemma 3, the text model (2503.19786): Gemma 2 with norms on queries and keys, and local layers that turn faster."""

from __future__ import annotations

from kvjax.checkpoint import rotary
from kvjax.checkpoint.families.gemma2 import HARMLESS, RULES, SHAPE_KEYS, shape
from kvjax.checkpoint.families.llama import IGNORED
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.checkpoint.reader import show
from kvjax.checkpoint.rules import Family
from kvjax.config import Config
from kvjax.errors import CheckpointError
from kvjax.ops.positions import Rope

POSITIONS = 131_072


def rotations(fields: Fields) -> tuple[Rope, Rope]:
    """How global and local layers turn.

    New files have `rope_parameters`, an object with one entry a layer type; old ones `rope_theta` and `rope_scaling`
    for global layers and `rope_local_base_freq` for local ones. Where a file has both, `rope_scaling` counts and then
    what `rope_parameters` says, as in Transformers 5.23.

    Raises:
        CheckpointError: as `rotary.rotary`.
    """
    new = fields.raw("rope_parameters")
    new = {} if new is None else new
    if not isinstance(new, dict):
        raise CheckpointError(f"config.json: rope_parameters must be an object, not {show(new)}")
    types = ("full_attention", "sliding_attention")
    fields.unknown += [f"rope_parameters.{key}" for key in sorted(new.keys() - {*types})]
    old = fields.raw("rope_scaling")
    parts = [{} if part is None else part for part in (*(new.get(key) for key in types), old)]
    for name, part in zip((*types, "rope_scaling"), parts, strict=True):
        if not isinstance(part, dict):
            raise CheckpointError(f"config.json: {name} must be an object of rotary settings, not {show(part)}")
    full, sliding, scaling = parts
    far, near = fields.number("rope_theta", 1_000_000.0), fields.number("rope_local_base_freq", 10_000.0)
    return (
        rotary.rotation(fields, full | scaling, far, POSITIONS)[0],
        rotary.rotation(fields, sliding, near, POSITIONS)[0],
    )


def config(fields: Fields) -> Config:
    """Gemma 3's config.json as a `Config`; without `layer_types` every sixth layer is global.

    max_position_embeddings is the length after scaling: the 128K of the report are 32K scaled by 8.
    """
    shapes = shape(fields, every=fields.integer("sliding_window_pattern", 6), logit_softcap=None)
    far, near = rotations(fields)
    return Config(
        **shapes,
        positions=far,
        layer_positions=tuple(far if window is None else near for window in shapes["windows"]),
        max_positions=fields.integer("max_position_embeddings", POSITIONS),
        qk_norm=shapes["norm"],
    )


FAMILY = Family(
    model_type="gemma3_text",
    config=config,
    keys=Keys(
        used=rotary.KEYS | SHAPE_KEYS | {"rope_local_base_freq", "sliding_window_pattern"},
        harmless=HARMLESS | {"_sliding_window_pattern"},  # saved beside layer_types, which say the same
        refused={
            **rotary.REFUSED,
            "attn_logit_softcapping": (None,),  # Transformers keeps the number and computes without it
            "use_bidirectional_attention": (False, None),
        },
    ),
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
)

__all__ = ["FAMILY"]
