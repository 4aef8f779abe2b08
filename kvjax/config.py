"""Frozen, hashable configuration of a decoder: everything about a model that is not an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kvjax.errors import InputError
from kvjax.ops import activations
from kvjax.ops.norms import Norm, RMSNorm
from kvjax.ops.positions import Positions, Rope
from kvjax.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """A pre-norm decoder: embedding, layers of self-attention and feed-forward, final norm, head.

    Args:
        vocab_size: V, rows of the embedding.
        num_layers: L.
        width: M, the residual stream.
        query_heads, kv_heads: H and K; H must be a multiple of K (grouped queries, Ainslie et al. 2305.13245).
        head_dim: D; need not be M / H.
        ffn_width: F.
        max_positions: positions that the model was made for; a token past them is flagged, not fed. None: no limit.
        norm: used before attention, before the feed-forward and at the end.
        activation: a module-level function.
        gated: feed-forward as down(activation(gate) · up) (Shazeer 2002.05202) instead of down(activation(up)).
        positions: `Rope` or `Learned`.
        qkv_bias, out_bias, ffn_bias: which linear maps carry a bias.
        qk_norm: a norm over each query and key head before rotation (Qwen3), or None.
        windows: per layer, how many positions a query sees including its own; None is all. Empty: all layers None.
        tied: the head reads the embedding table.
        scale: factor on the scores; None is D ** -0.5.
    """

    vocab_size: int
    num_layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_positions: int | None = None
    norm: Norm = RMSNorm()
    activation: Callable[[Array], Array] = activations.silu
    gated: bool = True
    positions: Positions = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: Norm | None = None
    windows: tuple[int | None, ...] = ()
    tied: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "query_heads", "kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise InputError(f"Config: {name} must be at least 1, not {getattr(self, name)}")
        if self.query_heads % self.kv_heads:
            raise InputError(f"Config: query_heads {self.query_heads} is no multiple of kv_heads {self.kv_heads}")
        if isinstance(self.positions, Rope) and self.head_dim % 2:
            raise InputError(f"Config: rotary positions need an even head_dim, not {self.head_dim}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise InputError(f"Config: windows has {len(self.windows)} entries for {self.num_layers} layers")
        for window in self.windows:
            if window is not None and window < 1:
                raise InputError(f"Config: a window must be at least 1, not {window}")


__all__ = ["Config"]
