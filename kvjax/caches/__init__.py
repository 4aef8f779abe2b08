"""Kinds of cache. Another cache is another word: `caches.dense()`, `caches.ring(1024)`, `caches.recompute()`."""

from kvjax.caches.base import Cache, Kind, OpenCache
from kvjax.caches.dense import dense
from kvjax.caches.layer_input import layer_input
from kvjax.caches.plans import KINDS, default, init_layers, parse, per_layer
from kvjax.caches.recompute import recompute
from kvjax.caches.ring import ring
from kvjax.caches.trace import hybrid, output, traced

__all__ = [
    "dense",
    "ring",
    "recompute",
    "layer_input",
    "traced",
    "output",
    "hybrid",
    "default",
    "per_layer",
    "parse",
    "init_layers",
    "Cache",
    "Kind",
    "OpenCache",
    "KINDS",
]
