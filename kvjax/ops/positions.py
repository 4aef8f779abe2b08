"""Where a token stands: rotary embedding with its scalings, and learned tables."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from kvjax.types import Array, DType, Params


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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, halves rotated against each other (Su et al. 2021, 2104.09864; GPT-NeoX layout).

    Args:
        theta: base of the geometric series of frequencies.
        scaling: how the frequencies are stretched for longer texts.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None

    rotates = True
    """Queries and keys are turned."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """No parameters."""
        return {}

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        """Token embeddings pass unchanged."""
        return x

    def tables(self, positions: Array, head_dim: int, dtype: DType) -> tuple[Array, Array]:
        """Cosines and sines `[B, S, 1, D/2]` at `positions[B, S]`, in at least float32."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        factor = 1.0
        if self.scaling is not None:
            frequencies, factor = self.scaling(frequencies, self.theta)
        dtype = jnp.promote_types(jnp.float32, dtype)
        angles = positions[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, None, :]
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    def rotate(self, x: Array, tables: tuple[Array, Array]) -> Array:
        """`x[B, S, heads, D]` turned by `tables`."""
        cos, sin = tables
        low, high = jnp.split(x.astype(cos.dtype), 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned vector per position, added to the token embedding (GPT-2).

    Args:
        size: rows of the table; positions at or past it are flagged by the cache, never read.
    """

    size: int

    rotates = False
    """Queries and keys stay as they are projected."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """One table `[size, M]`."""
        return {"table": (self.size, width)}

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        """Adds `table[positions]`; positions past the table belong to dropped tokens and read its last row."""
        return x + jnp.take(params["table"], positions, axis=0, mode="clip").astype(x.dtype)

    def tables(self, positions: Array, head_dim: int, dtype: DType) -> None:
        """Nothing rotates."""
        return None

    def rotate(self, x: Array, tables: None) -> Array:
        """`x` unchanged."""
        return x


Positions = Rope | Learned

__all__ = ["Rope", "Learned", "LinearScaling", "Llama3Scaling", "YarnScaling", "Scaling", "Positions"]
