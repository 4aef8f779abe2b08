"""Kinds of cache. Another cache is another word: `caches.dense()`, `caches.ring(1024)`, `caches.recompute()`."""

from typing import Any

from kvjax.caches import words
from kvjax.caches.base import Cache, Kind, OpenCache
from kvjax.caches.cross import CrossKind, cross, encoder_output
from kvjax.caches.dense import dense
from kvjax.caches.layer_input import layer_input
from kvjax.caches.paged import paged
from kvjax.caches.plans import default, init_layers, per_layer
from kvjax.caches.recompute import recompute
from kvjax.caches.ring import ring
from kvjax.caches.shared_prefix import shared_prefix
from kvjax.caches.trace import hybrid, output, traced

KINDS = (dense, ring, paged, shared_prefix, recompute, layer_input, traced, output, hybrid)
"""Every kind; the shared tests and the command line run over it."""

CROSS_KINDS = (cross, encoder_output)
"""What can be kept of a source."""


def parse(text: str) -> Any:
    """Reads a kind as it stands in Python, `ring(1024, sinks=4, store=int8())`; parsed, never evaluated.

    `str` of a kind is what this reads.

    Args:
        text: a kind's name, with or without arguments: numbers, names of sites, dtypes, other kinds and codecs.

    Raises:
        InputError: another name, or an argument that is none of these or that the kind refuses.
    """
    kind = words.read(text, words.known())
    return kind if isinstance(kind, CrossKind) else per_layer(local=kind, full=kind).full  # a codec is no kind


__all__ = [
    "CROSS_KINDS",
    "Cache",
    "CrossKind",
    "KINDS",
    "Kind",
    "OpenCache",
    "cross",
    "default",
    "dense",
    "encoder_output",
    "hybrid",
    "init_layers",
    "layer_input",
    "output",
    "paged",
    "parse",
    "per_layer",
    "recompute",
    "ring",
    "shared_prefix",
    "traced",
]
