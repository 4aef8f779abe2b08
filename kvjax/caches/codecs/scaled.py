"""Codes of few bits with one scale per token and head: int8, float8, int4.

A scale of that shape goes into scores and probabilities, so that attention reads the codes as they lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.caches import storage
from kvjax.caches.codecs.store import Codec, Segment, Store
from kvjax.errors import InputError
from kvjax.ops.attention import Decode
from kvjax.types import Array, DType

SCALES = ("float32", "bfloat16")
"""Dtypes of a scale. Both reach as far as float32: a float16 scale would be 0 for keys and values below 4e-6."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def without_gradient(x: Array, codec: str) -> Array:
    """`x`, on its way to becoming codes: JAX would give rounding no gradient and the scale one, a silent wrong value.

    Raises:
        InputError: it is differentiated.
    """
    return x


@without_gradient.defjvp
def _refuse(codec: str, primals: Any, tangents: Any) -> Any:
    raise InputError(f"codecs.{codec}: no gradient goes through codes; differentiate with a floating store")


def scale_of(largest: Array, limit: float, dtype: DType) -> Array:
    """A scale as it is stored, for elements of at most `largest` and codes of at most `limit`."""
    # Not below the least normal number: zeros need a scale to be divided by, and a CPU flushes what is smaller to 0.
    # Multiplied: XLA turns a division by a constant into that under jit only, and codes must not depend on it.
    return jnp.maximum(largest * (1 / limit), jnp.finfo(dtype).tiny).astype(dtype)


def whole_codes(x: Array, low: int, high: int) -> Array:
    """`x` in steps of 1, int8; what is not finite becomes 0, and the scale must say so."""
    return jnp.nan_to_num(jnp.clip(jnp.round(x), low, high)).astype(jnp.int8)


def to_int8(x: Array) -> Array:
    """Codes of `x` within -127 and 127."""
    return whole_codes(x, -127, 127)


def to_nibbles(x: Array) -> Array:
    """Codes of `x[..., D]` within -7 and 7, two in a byte: `[..., D / 2]` uint8."""
    return pack_nibbles(whole_codes(x, -7, 7))


def to_e4m3(x: Array) -> Array:
    """Bits of `x` as e4m3fn, uint8: XLA:CPU converts a float8 buffer in a loop as a whole, at every update."""
    x = jnp.nan_to_num(jnp.clip(x, -448, 448))  # beyond 464 the cast gives NaN
    return lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def pack_nibbles(codes: Array) -> Array:
    """Codes `[..., D]` from -8 to 7 as bytes `[..., D / 2]`: channel d lies low, channel `d + D / 2` high."""
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
    return low | (high << 4)


def from_nibbles(x: Array, dtype: DType) -> tuple[Array, ...]:
    """Both halves of the channels."""
    wide = x.astype(jnp.int32)  # XLA:CPU vectorises arithmetic of 32 bits
    return ((wide & 15) - 8).astype(dtype), ((wide >> 4) - 8).astype(dtype)


def from_e4m3(x: Array, dtype: DType) -> tuple[Array, ...]:
    """Numbers that the bits stand for."""
    if jax.default_backend() != "cpu":
        return (lax.bitcast_convert_type(x, jnp.float8_e4m3fn).astype(dtype),)
    # A cast takes XLA:CPU ten times as long as these.
    wide = x.astype(jnp.int32)
    bits = wide & 127
    normal = lax.bitcast_convert_type((bits << 20) + (120 << 23), jnp.float32)
    size = jnp.where(bits < 8, bits.astype(jnp.float32) * 2.0**-9, normal)
    return (jnp.where(wide > 127, -size, size).astype(dtype),)


@dataclasses.dataclass(frozen=True)
class Code:
    """Numbers of few bits.

    Args:
        name: for people.
        limit: the largest.
        dtype: of what is stored.
        per: numbers in one stored element.
        encode: numbers within the limit to what is stored.
        decode: back; None casts.
    """

    name: str
    limit: int
    dtype: str
    per: int
    encode: Callable[[Array], Array]
    decode: Decode | None = None


INT8 = Code("int8", 127, "int8", 1, to_int8)
FP8 = Code("fp8", 448, "uint8", 1, to_e4m3, from_e4m3)
INT4 = Code("int4", 7, "uint8", 2, to_nibbles, from_nibbles)


def encode(x: Array, code: Code, scale: DType) -> tuple[Array, Array]:
    """Codes of `x[..., D]` and their scales `[...]`, the codes made with the scale as it is stored.

    Whole numbers err by at most half a scale; e4m3 by at most `2 ** -4 * |x|`, and `scale * 2 ** -10` for what falls
    below its normal numbers. Zeros give zeros. Where `x` is not finite the scale is not either, so that every score
    with it is NaN.
    """
    precise = jnp.promote_types(jnp.float32, x.dtype)
    x = without_gradient(x.astype(precise), code.name)
    made = scale_of(jnp.max(jnp.abs(x), axis=-1), code.limit, scale)
    return code.encode(x / made[..., None].astype(precise)), made


@struct.node
class ScaledStore(Store):
    """Codes `[*lead, T, D]` and the scales `[*lead, T]` they were made with."""

    codes: Array
    scale: Array
    heads: int = struct.static()
    code: Code = struct.static()

    @property
    def axes(self) -> dict[str, int]:
        """See `Store`."""
        return {"codes": 1, "scale": 0}

    def write(self, x: Array, slots: Array, positions: Array, rows: Array | None = None) -> ScaledStore:
        """See `Store`."""
        codes, scale = encode(x, self.code, self.scale.dtype)
        return self.replace(
            codes=storage.put(self.codes, codes, slots, rows), scale=storage.put(self.scale, scale, slots, rows)
        )

    def read(self, positions: Array, end: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        return (Segment(self.codes, self.scale, positions, decode=self.code.decode),)

    def fresh(self, x: Array, positions: Array) -> tuple[Segment, ...]:
        """See `Store`."""
        codes, scale = encode(x, self.code, self.scale.dtype)
        return (Segment(storage.pack(codes), storage.pack(scale), positions, decode=self.code.decode),)

    def unpacked(self, end: Array | None = None) -> Array:
        """See `Store`."""
        scale = storage.unpack(self.scale, self.heads, 0).astype(jnp.float32)
        codes = storage.unpack(self.codes, self.heads, 1)
        return numbers(codes, self.code.decode) * scale[..., None]


def numbers(codes: Array, decode: Decode | None) -> Array:
    """What codes stand for, float32; a copy, for looking."""
    parts = (codes,) if decode is None else decode(codes, jnp.float32)
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=-1)


@dataclasses.dataclass(frozen=True)
class Scaled(Codec):
    """See `int8`, `fp8` and `int4`."""

    code: Code
    scale: str

    def empty(self, rows: int, heads: int, slots: int, width: int | None, dtype: DType) -> ScaledStore:
        """See `Codec`."""
        if width is None or width % self.code.per:
            raise InputError(f"codecs.{self}: a slot must have a multiple of {self.code.per} channels, not {width}")
        codes = storage.empty(rows, heads, slots, (width // self.code.per,), jnp.dtype(self.code.dtype))
        scale = storage.empty(rows, heads, slots, (), jnp.dtype(self.scale))
        return ScaledStore(codes, scale, heads, self.code)

    def __str__(self) -> str:
        return self.code.name


def _scaled(code: Code, scale: DType) -> Scaled:
    try:
        chosen = jnp.dtype(scale).name
    except TypeError:
        chosen = repr(scale)
    if chosen not in SCALES:
        raise InputError(f"codecs.{code.name}: scale must be {' or '.join(SCALES)}, not {chosen}")
    return Scaled(code, chosen)


def int8(*, scale: DType = "float32") -> Scaled:
    """Whole numbers from -127 to 127 times a scale per token and head.

    `1 + 4 / D` bytes an element, `1 + 2 / D` with a bfloat16 scale. Each element errs by at most half the scale, which
    is the largest of the token's head over 127.

    Args:
        scale: dtype of the scales, float32 or bfloat16.

    Raises:
        InputError: `scale` is another dtype.
    """
    return _scaled(INT8, scale)


def fp8(*, scale: DType = "float32") -> Scaled:
    """Eight-bit floating numbers (e4m3fn, up to 448; Micikevicius et al. 2022, 2209.05433) times a scale per token
    and head.

    As many bytes as `int8`. Each element errs by up to a sixteenth of itself, which is more than `int8` errs where the
    elements of a head are of one size.

    Args:
        scale: dtype of the scales, float32 or bfloat16.

    Raises:
        InputError: `scale` is another dtype.
    """
    return _scaled(FP8, scale)


def int4(*, scale: DType = "float32") -> Scaled:
    """Whole numbers from -7 to 7 times a scale per token and head, two in a byte.

    `1 / 2 + 4 / D` bytes an element, `1 / 2 + 2 / D` with a bfloat16 scale; D must be even. One channel that is much
    larger than the others takes their precision away, which keys of trained models often have.

    Args:
        scale: dtype of the scales, float32 or bfloat16.

    Raises:
        InputError: `scale` is another dtype.
    """
    return _scaled(INT4, scale)


__all__ = ["Code", "Scaled", "ScaledStore", "encode", "int8", "fp8", "int4"]
