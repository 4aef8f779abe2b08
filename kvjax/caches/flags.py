"""Bits of `Cache.flags`: what went wrong in a row under `jit`, where no error can be raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvjax.types import Array

CAPACITY, POSITIONS, PAGES, NAN, TOKEN, REWIND, ROWS, PREFIX, COUNT, NO_SOURCE, NO_TOKEN = (1 << i for i in range(11))

MEANING = {
    CAPACITY: "tokens past the capacity were dropped",
    POSITIONS: "tokens past the model's last position were dropped",
    PAGES: "the page pool was exhausted",
    NAN: "the model gave NaN logits",
    TOKEN: "a token id was outside the vocabulary",
    REWIND: "it was rewound further than its kind keeps",
    ROWS: "it was taken from a row outside the batch",
    PREFIX: "it was joined with rows that go on from another prefix",
    COUNT: "it was given a number of tokens below 0 or above the columns",
    NO_SOURCE: "its source is empty, was refused, or holds what the cache cannot keep",
    NO_TOKEN: "no token may be chosen: all of them are banned, or a filter made one NaN",
}


def meaning(flags: Any) -> str:
    """The bits in words."""
    return "; ".join(text for bit, text in MEANING.items() if flags & bit)


def ask(
    shared: dict[str, Any], what: Callable[..., tuple[Any, Array]], flags: Array, *others: dict[str, Any]
) -> tuple[dict[str, Any], Array]:
    """Every entry asked in turn, with those of the same name, and the flags that come of it."""
    asked = {name: what(entry, *(other[name] for other in others)) for name, entry in shared.items()}
    for _, bits in asked.values():
        flags = flags | bits
    return {name: entry for name, (entry, _) in asked.items()}, flags


__all__ = [
    "CAPACITY",
    "POSITIONS",
    "PAGES",
    "NAN",
    "TOKEN",
    "REWIND",
    "ROWS",
    "PREFIX",
    "COUNT",
    "NO_SOURCE",
    "NO_TOKEN",
    "MEANING",
    "meaning",
    "ask",
]
