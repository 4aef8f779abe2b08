"""Kinds of cache. Another cache is another word: `caches.dense()`, `caches.ring(1024)`, `caches.recompute()`."""

from kvjax.caches.base import Cache, OpenCache
from kvjax.caches.dense import dense
from kvjax.caches.paged import paged
from kvjax.caches.plans import default, init_layers, parse, per_layer
from kvjax.caches.recompute import recompute
from kvjax.caches.ring import ring
from kvjax.caches.shared_prefix import shared_prefix

KINDS = (dense, ring, paged, shared_prefix, recompute)
"""Every kind; the shared tests and the command line run over it."""

__all__ = [
    "dense",
    "ring",
    "paged",
    "shared_prefix",
    "recompute",
    "default",
    "per_layer",
    "parse",
    "init_layers",
    "Cache",
    "OpenCache",
    "KINDS",
]
