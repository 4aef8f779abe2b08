"""mBART (Liu et al. 2001.08210; mBART-50, Tang et al. 2008.00401): BART with norms before each sub-layer."""

from __future__ import annotations

import dataclasses

from kvjax.checkpoint.families import bart
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.config import Config, NormOrder
from kvjax.ops.positions import Learned


def config(fields: Fields) -> Config:
    """mBART's config.json as a `Config`; the norm after the last layer is what `NormOrder.PRE` has."""
    return bart.shape(
        fields,
        vocab_size=fields.integer("vocab_size"),
        norm_order=NormOrder.PRE,
        positions=Learned(fields.integer("max_position_embeddings", 1024)),
        embed_norm=True,
    )


FAMILY = dataclasses.replace(
    bart.FAMILY,
    model_type="mbart",
    config=config,
    keys=Keys(
        used=bart.SHAPE_KEYS,
        harmless=bart.HARMLESS,
        refused={
            **bart.REFUSED,
            "add_final_layer_norm": (True, None),
            "normalize_before": (True, None),
            "normalize_embedding": (True, None),
            "static_position_embeddings": (False, None),
        },
    ),
)

__all__ = ["FAMILY"]
