"""Looks at what users hand over, on the host, before anything is cast: nothing is truncated or wrapped in silence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError

MOST = int(np.iinfo(np.int32).max)


def is_concrete(x: Any) -> bool:
    """Whether a value can be looked at on the host now."""
    return not isinstance(x, jax.core.Tracer)


def whole(name: str, x: Any, shapes: tuple[tuple[int, ...], ...] | None = None, error: type = InputError) -> Any:
    """`x` as int32: traced and on the device as it is, anything else as a NumPy array.

    Does not wait for the device where an array holds nothing that could wrap, as one of int32.

    Args:
        name: of the argument, for the error.
        x: one whole number or an array of them.
        shapes: what it may have; None allows any.
        error: the class to raise.

    Raises:
        InputError: (or `error`) not whole numbers, beyond 32 bits, or of another shape.
    """
    if not isinstance(x, jax.Array):
        x = array(name, x, error)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        given = f"{x.dtype}{list(x.shape)}" if x.ndim else f"{x}"
        raise error(f"{name} {given} must be whole numbers")
    if shapes is not None and x.shape not in shapes:
        wanted = " or ".join(str(list(shape)) if shape else "one number" for shape in shapes)
        raise error(f"{name} has shape {list(x.shape)}, it must be {wanted}")
    if isinstance(x, jax.Array):
        if x.dtype.itemsize <= 4 and x.dtype != jnp.uint32 or not is_concrete(x):
            return x.astype(jnp.int32)
        x = np.asarray(x)
    beyond = (x < -MOST - 1) | (x > MOST)
    if beyond.any():
        raise error(f"{name} holds {x[beyond].flat[0]}, beyond 32 bits")
    return x.astype(np.int32)


def array(name: str, x: Any, error: type = InputError) -> Any:
    """`x` as a NumPy array, of any dtype.

    Raises:
        InputError: (or `error`) rows of different lengths.
    """
    try:
        return np.asarray(x)
    except (TypeError, ValueError) as problem:
        raise error(f"{name} must be whole numbers in rows of equal length ({problem})") from None


def count(name: str, x: Any, least: int = 1, error: type = InputError) -> int:
    """`x`, which is an int of at least `least`.

    Raises:
        InputError: (or `error`) it is anything else, True and 2.0 among them.
    """
    if not isinstance(x, int) or isinstance(x, bool) or x < least:
        raise error(f"{name} must be a whole number of at least {least}, not {x!r}")
    return x


def either(name: str, x: Any) -> bool:
    """`x`, which is True or False.

    Raises:
        InputError: it is anything else; `'False'` would count as true.
    """
    if not isinstance(x, bool | np.bool_):
        raise InputError(f"{name} must be True or False, not {x!r}")
    return bool(x)


BUCKET = 16
"""The smallest bucket of prompts and sources, in tokens; each next one is twice as long."""


def bucket(length: int, least: int = BUCKET, most: int | None = None) -> int:
    """The smallest of least, 2 least, 4 least, … that holds `length` tokens; no more than `most`, unless they are."""
    size = least
    while size < length:
        size *= 2
    return size if most is None else max(length, min(size, most))


__all__ = ["whole", "array", "count", "either", "is_concrete", "bucket", "BUCKET", "MOST"]
