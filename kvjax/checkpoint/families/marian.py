"""MarianMT, the opus-mt models (Junczys-Dowmunt et al. 1804.00344): BART's layers, sines and cosines for positions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kvjax.checkpoint.families import bart
from kvjax.checkpoint.fields import Fields, Keys
from kvjax.config import Config, NormOrder
from kvjax.errors import CheckpointError
from kvjax.ops.positions import Sinusoidal


def config(fields: Fields) -> Config:
    """Marian's config.json as a `Config`; one table for both languages unless it says otherwise."""
    source = fields.integer("vocab_size")
    target = fields.integer("decoder_vocab_size", None, nullable=True) or source
    shared = fields.flag("share_encoder_decoder_embeddings", True)
    if shared and source != target:
        raise CheckpointError(
            f"config.json: share_encoder_decoder_embeddings, but vocab_size {source} and decoder_vocab_size {target}"
        )
    return bart.shape(
        fields,
        source_vocab=None if shared else source,
        vocab_size=target,
        norm_order=NormOrder.POST,
        positions=Sinusoidal(interleaved=False),
    )


def _waves(config: Config, rows: int) -> np.ndarray:
    """The table `[rows, M]` that some checkpoints store."""
    places = jnp.arange(rows)[None]
    return np.asarray(config.positions.embed({}, jnp.zeros((*places.shape, config.width)), places)[0])


FAMILY = dataclasses.replace(
    bart.FAMILY,
    model_type="marian",
    config=config,
    keys=Keys(
        used=bart.SHAPE_KEYS | {"decoder_vocab_size", "share_encoder_decoder_embeddings"},
        harmless=bart.HARMLESS,
        refused={
            **bart.REFUSED,
            "add_final_layer_norm": (False, None),
            "normalize_before": (False, None),
            "normalize_embedding": (False, None),
            "static_position_embeddings": (True, None),
        },
    ),
    constants={f"{side}.embed_positions.weight": _waves for side in ("encoder", "decoder")},
)

__all__ = ["FAMILY"]
