"""What one stored element is. Any codec goes with any layout: `caches.ring(1024, store=codecs.plain("bfloat16"))`."""

from __future__ import annotations

from typing import Any

from kvjax.caches.codecs.grouped import ChannelGroups, ChannelStore, TokenStore, int4_channels
from kvjax.caches.codecs.plain import Plain, PlainStore, plain
from kvjax.caches.codecs.scaled import Scaled, ScaledStore, fp8, int4, int8
from kvjax.caches.codecs.store import Codec, Segment, Store

CODECS = (plain, int8, fp8, int4, int4_channels)
"""Every codec; the shared tests and the command line run over it."""


def as_codec(store: Any) -> Any:
    """A codec as it is; a dtype as `plain(dtype)`; None as `plain()`."""
    return store if hasattr(store, "empty") else plain(store)


__all__ = [
    "CODECS",
    "ChannelGroups",
    "ChannelStore",
    "Codec",
    "Plain",
    "PlainStore",
    "Scaled",
    "ScaledStore",
    "Segment",
    "Store",
    "TokenStore",
    "as_codec",
    "fp8",
    "int4",
    "int4_channels",
    "int8",
    "plain",
]
