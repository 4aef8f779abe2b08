"""Where a token stands: rotary embedding with its scalings, tables that are added, and biases on scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError
from kvjax.types import Array, DType, Params

Bias = Callable[[Array, Array], Array]
"""`(query positions, key positions)`, int32 that broadcast to `[...]`, to what is added to scores, `[H, ...]`."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every angle divided by `factor` (Chen et al. 2023, 2306.15595)."""

    factor: float

    def __call__(self, frequencies: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies `[D/2]` and the factor on cosines and sines."""
        return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a linear blend between (Llama 3.1 model card and code).

    Args:
        factor: division of low frequencies.
        low_freq_factor, high_freq_factor: bounds, in turns within the original length.
        original_positions: length that the model was first trained on, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __call__(self, frequencies: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies `[D/2]` and the factor on cosines and sines."""
        turns = self.original_positions * frequencies / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """NTK-by-parts interpolation with an attention temperature (YaRN, Peng et al. 2023, 2309.00071).

    Args:
        factor: extension of the length.
        original_positions: length that the model was first trained on, in tokens.
        beta_fast, beta_slow: bounds of the blend, in turns within the original length.
        attention_factor: factor on cosines and sines; None takes 0.1 · ln(factor) + 1.
        truncate: round the bounds of the blend to whole dimensions, as the reference code does.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __call__(self, frequencies: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """Scaled frequencies `[D/2]` and the factor on cosines and sines."""
        half = len(frequencies)

        def dimension(turns: float) -> float:
            return half * math.log(self.original_positions / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        ramp = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
        scaled = frequencies * (1 - ramp) + frequencies / self.factor * ramp
        attention = self.attention_factor
        if attention is None:
            attention = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return scaled, attention


Scaling = LinearScaling | Llama3Scaling | YarnScaling


class Positions:
    """How a model tells where a token stands; what a kind of positions does not do stands here."""

    rotates = False
    """Whether queries and keys are turned."""

    relative = False
    """Whether only distances between tokens matter, not where the text begins."""

    def shapes(self, width: int, heads: int) -> dict[str, tuple[int, ...]]:
        """Of its parameters, for a stream of width M and H query heads."""
        return {}

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        """Token embeddings `x[B, S, M]` at `positions[B, S]` with what is added to them."""
        return x

    def tables(self, positions: Array, head_dim: int, dtype: DType) -> Any:
        """What `rotate` needs for `positions[B, S]`, made once for all layers."""
        return None

    def rotate(self, x: Array, tables: Any) -> Array:
        """`x[B, S, heads, D]` turned by `tables`."""
        return x

    def turn(self, x: Array, by: Array) -> Array:
        """`x[B, S, heads, D]`, turned already, turned on by `by[B, S]` positions, to either side."""
        return x

    def bias(self, params: Params) -> Bias | None:
        """What is added to the scaled scores of self-attention, or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Rope(Positions):
    """Rotary position embedding, halves rotated against each other (Su et al. 2021, 2104.09864; GPT-NeoX layout).

    Args:
        theta: base of the geometric series of frequencies.
        scaling: how the frequencies are stretched for longer texts.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None

    rotates = True
    relative = True

    def tables(self, positions: Array, head_dim: int, dtype: DType) -> tuple[Array, Array]:
        """Cosines and sines `[B, S, 1, D]` at `positions[B, S]`, in at least float32: of every wave twice, the first
        sine negative."""
        cos, sin, factor = self._waves(positions, head_dim, dtype)
        return cos * factor, sin * factor

    def turn(self, x: Array, by: Array) -> Array:
        """See `Positions`. Rotations add up; the factor of a scaling is in `x` already."""
        return self.rotate(x, self._waves(by, x.shape[-1], x.dtype)[:2])

    def _waves(self, positions: Array, head_dim: int, dtype: DType) -> tuple[Array, Array, float]:
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        factor = 1.0
        if self.scaling is not None:
            frequencies, factor = self.scaling(frequencies, self.theta)
        dtype = jnp.promote_types(jnp.float32, dtype)
        angles = positions[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, None, :]
        # Joined, they stay tables on a CPU: XLA would compute a cosine anew for every head of every layer.
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1), factor

    def rotate(self, x: Array, tables: tuple[Array, Array]) -> Array:
        """`x[B, S, heads, D]` turned by `tables`."""
        cos, sin = tables
        wide = x.astype(cos.dtype)
        low, high = jnp.split(wide, 2, axis=-1)
        return (wide * cos + jnp.concatenate([high, low], axis=-1) * sin).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Learned(Positions):
    """A learned vector per position, added to the token embedding (GPT-2).

    Args:
        size: rows of the table; positions at or past it are flagged by the cache, never read.
    """

    size: int

    def shapes(self, width: int, heads: int) -> dict[str, tuple[int, ...]]:
        """One table `[size, M]`."""
        return {"table": (self.size, width)}

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        """Adds `table[positions]`; positions past the table belong to dropped tokens and read its last row."""
        return x + jnp.take(params["table"], positions, axis=0, mode="clip").astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Positions):
    """Fixed sines and cosines of the position, added to the token embedding (Vaswani et al. 2017, 1706.03762).

    Args:
        theta: base of the geometric series of wave lengths.
        interleaved: sine and cosine of a wave stand side by side, as in the paper; if not, all sines stand before all
            cosines (Marian).
    """

    theta: float = 10_000.0
    interleaved: bool = True

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        """Adds the waves at `positions[B, S]`, computed in at least float32."""
        m, dtype = x.shape[-1], jnp.promote_types(jnp.float32, x.dtype)
        frequencies = self.theta ** (-np.arange(0, m, 2, dtype=np.float64) / m)
        angles = positions[:, :, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, :]
        waves = [jnp.sin(angles), jnp.cos(angles)]  # [B, S, M/2] each
        both = jnp.stack(waves, axis=-1) if self.interleaved else jnp.concatenate(waves, axis=-1)
        return x + both.reshape(x.shape[0], x.shape[1], -1)[..., :m].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Relative(Positions):
    """A learned number per head and bucket of distances, added to scores; one table for all layers of a stack (T5,
    Raffel et al. 2020, 1910.10683).

    Half of the buckets of a direction hold one distance each, the others grow geometrically up to `max_distance`.

    Args:
        buckets: rows of the table.
        max_distance: distances from here on share the last bucket.
        bidirectional: half of the buckets are for keys behind the query and half for those ahead (encoders); if not,
            all are for keys behind it.

    Raises:
        InputError: too few buckets, or a `max_distance` that they reach singly.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    relative = True

    def __post_init__(self) -> None:
        count, half = (self.buckets // 2, self.buckets % 2) if self.bidirectional else (self.buckets, 0)
        if count < 2 or half:
            least = "an even number of at least 4" if self.bidirectional else "at least 2"
            raise InputError(f"Relative: buckets must be {least}, not {self.buckets}")
        if self.max_distance <= count // 2:
            raise InputError(
                f"Relative: max_distance {self.max_distance} must be more than the {count // 2} distances that have a "
                "bucket each"
            )

    def shapes(self, width: int, heads: int) -> dict[str, tuple[int, ...]]:
        """One table `[buckets, H]`."""
        return {"table": (self.buckets, heads)}

    def bias(self, params: Params) -> Bias:
        """See `Positions`."""
        far = self.max_distance
        numbers = jnp.take(params["table"].T, self._bucket(np.arange(-far, far + 1)), axis=1)  # [H, 2 far + 1]

        def bias(query: Array, key: Array) -> Array:
            return jnp.take(numbers, jnp.clip(key - query, -far, far) + far, axis=1)

        return bias

    def _bucket(self, ahead: np.ndarray) -> np.ndarray:
        """Buckets of `key - query`; in float32, as the models were trained."""
        count = self.buckets // 2 if self.bidirectional else self.buckets
        side = np.where(ahead > 0, count, 0) if self.bidirectional else 0
        distance = np.abs(ahead) if self.bidirectional else np.maximum(-ahead, 0)
        exact = count // 2
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        steps = ratio / np.float32(math.log(self.max_distance / exact)) * np.float32(count - exact)
        far = np.minimum(exact + steps.astype(np.int32), count - 1)
        return (side + np.where(distance < exact, distance, far)).astype(np.int32)


__all__ = [
    "Positions",
    "Bias",
    "Rope",
    "Learned",
    "Sinusoidal",
    "Relative",
    "LinearScaling",
    "Llama3Scaling",
    "YarnScaling",
    "Scaling",
]
