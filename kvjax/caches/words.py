"""Kinds and codecs as text, as they stand in Python: `ring(1024, sinks=4, store=int8())`. Parsed, never evaluated."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax.errors import InputError, KvjaxError

DTYPES = ("float32", "float16", "bfloat16", "float64")
LONGEST = 1000
"""Characters; Python's own parser gives up on deep nesting with errors of its own."""

EXAMPLE = "write for example ring(1024, sinks=4)"

Words = dict[str, Callable[..., Any]]


def known() -> Words:
    """Every kind and every codec of the library, by name."""
    from kvjax import caches  # what is named is made above
    from kvjax.caches import codecs

    return {make.__name__: make for make in (*caches.KINDS, caches.per_layer, *caches.CROSS_KINDS, *codecs.CODECS)}


def text_of(value: Any, words: Words) -> str:
    """A kind or codec as the call that makes it, with the arguments that are not the default; `read` gives it back.

    Args:
        value: what one of the words made.
        words: functions by name. One is tried on the value's own fields, by the names of its arguments.

    Raises:
        InputError: no word makes an equal value.
    """
    for name, make in words.items():
        parameters = inspect.signature(make).parameters.values()
        given = {p.name: getattr(value, p.name) for p in parameters if hasattr(value, p.name)}
        if not _makes(make, given, value):
            continue
        for p in parameters:
            rest = {k: v for k, v in given.items() if k != p.name}
            given = rest if p.default is not p.empty and _makes(make, rest, value) else given
        placed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
        written = [_literal(given[key], words) for key in placed]
        written += [f"{key}={_literal(x, words)}" for key, x in given.items() if key not in placed]
        return f"{name}({', '.join(written)})"
    raise InputError(f"{value!r} was made by none of {', '.join(words)}, and cannot be written as text")


def _makes(make: Callable[..., Any], given: dict[str, Any], value: Any) -> bool:
    try:
        return bool(make(**given) == value)
    except (KvjaxError, TypeError, ValueError, AttributeError):  # not a word for these arguments
        return False


def _literal(value: Any, words: Words) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(_literal(x, words) for x in value)}{',' if len(value) == 1 else ''})"
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    if isinstance(value, str):
        return value if value in DTYPES else repr(value)
    return text_of(value, words)


def read(text: str, words: Words) -> Any:
    """What a text says: a word with or without arguments, which are numbers, names of sites, dtypes, and other words.

    Args:
        text: as in Python.
        words: the functions that may be named.

    Raises:
        InputError: another name, an argument that is none of these, or one that the word refuses.
    """
    if not isinstance(text, str):
        raise InputError(f"cache: {text!r} is no text; {EXAMPLE}")
    if len(text) > LONGEST:
        raise InputError(f"cache {text[:40]!r}… has {len(text)} characters; {EXAMPLE}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"cache {text!r} does not read as Python; {EXAMPLE}") from error
    return _call(text, tree, words)


def _call(text: str, node: ast.expr, words: Words) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.func.id not in words:
        what = call.func.id if isinstance(call.func, ast.Name) else "what stands there"
        raise InputError(f"cache {text!r}: {what} is none of {', '.join(words)}; {EXAMPLE}")
    arguments = [_value(text, item, words) for item in call.args]
    options = {str(item.arg): _value(text, item.value, words) for item in call.keywords}
    if len(options) < len(call.keywords):
        raise InputError(f"cache {text!r} gives an argument twice")
    try:
        return words[call.func.id](*arguments, **options)
    except TypeError as error:
        raise InputError(f"cache {text!r}: {error}") from error


def _value(text: str, node: ast.expr, words: Words) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool, str, type(None)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float):
            return -number
    if isinstance(node, ast.Tuple):
        return tuple(_value(text, item, words) for item in node.elts)
    if isinstance(node, ast.Name) and node.id in DTYPES:
        return jnp.dtype(node.id)
    return _call(text, node, words)


__all__ = ["known", "text_of", "read"]
