"""Frozen, hashable configuration of a decoder or encoder: everything about a model that is not an array."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from kvjax.errors import InputError
from kvjax.ops import activations
from kvjax.ops.norms import Norm, RMSNorm
from kvjax.ops.positions import Positions, Rope
from kvjax.types import Array


class NormOrder(enum.Enum):
    """Where the norms of a layer stand around its sub-layers f, attention and feed-forward."""

    PRE = "x + f(norm(x))"
    """GPT-2, Llama; a final norm after the last layer."""
    POST = "norm(x + f(x))"
    """The Transformer of Vaswani et al. (1706.03762); no final norm."""
    SANDWICH = "x + norm(f(norm(x)))"
    """Gemma 2 and 3 (2408.00118), two norms a sub-layer; a final norm after the last layer."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder: embedding, layers of self-attention and feed-forward, final norm, head. With an `encoder`, every layer
    attends to the encoder's output between the two. An encoder has no head, and its tokens see each other both ways.

    Args:
        vocab_size: V, rows of the embedding.
        num_layers: L.
        width: M, the residual stream.
        query_heads, kv_heads: H and K; H must be a multiple of K (grouped queries, Ainslie et al. 2305.13245).
        head_dim: D; need not be M / H.
        ffn_width: F.
        max_positions: positions that the model was made for; a token past them is flagged, not fed. None: no limit.
        norm: of the layers and at the end.
        norm_order: where it stands.
        activation: a module-level function.
        gated: feed-forward as down(activation(gate) · up) (Shazeer 2002.05202) instead of down(activation(up)).
        positions: `Rope`, `Learned`, `Sinusoidal` or `Relative`.
        layer_positions: per layer, its own rotation in place of `positions` (Gemma 3). Empty: all layers `positions`.
        qkv_bias, out_bias, ffn_bias: which linear maps carry a bias.
        qk_norm: a norm over each query and key head before rotation (Qwen3), or None.
        windows: per layer, how many positions a query sees including its own; None is all. Empty: all layers None.
        tied: the head reads the embedding table; an encoder reads the decoder's.
        scale: factor on the scores; None is D ** -0.5.
        embed_scale: factor on the token embedding, rounded to the parameters' dtype.
        attention_softcap, logit_softcap: bounds c on scaled scores and on logits, as tanh(s / c) · c (Gemma 2,
            2408.00118); None is none.
        embed_norm: a norm after the embedding (BART).
        head_bias: a number per vocabulary entry is added to the logits (Marian).
        logit_scale: factor on what the head reads (T5 with tied tables: M ** -0.5).
        encoder: of the source, or None. Cross-attention has the decoder's heads, biases, scale and norms; nothing
            rotates in it.
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
    norm_order: NormOrder = NormOrder.PRE
    activation: Callable[[Array], Array] = activations.silu
    gated: bool = True
    positions: Positions = Rope()
    layer_positions: tuple[Rope, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: Norm | None = None
    windows: tuple[int | None, ...] = ()
    tied: bool = True
    scale: float | None = None
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_norm: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    encoder: Config | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "query_heads", "kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise InputError(f"Config: {name} must be at least 1, not {getattr(self, name)}")
        if self.query_heads % self.kv_heads:
            raise InputError(f"Config: query_heads {self.query_heads} is no multiple of kv_heads {self.kv_heads}")
        if isinstance(self.positions, Rope) and self.head_dim % 2:
            raise InputError(f"Config: rotary positions need an even head_dim, not {self.head_dim}")
        if self.layer_positions and not isinstance(self.positions, Rope):
            name = type(self.positions).__name__
            raise InputError(f"Config: layer_positions are rotations, but positions is {name}")
        if len(self.layer_positions) not in (0, self.num_layers):
            raise InputError(
                f"Config: layer_positions has {len(self.layer_positions)} entries for {self.num_layers} layers"
            )
        for name in ("attention_softcap", "logit_softcap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise InputError(f"Config: {name} must be more than 0, not {cap}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise InputError(f"Config: windows has {len(self.windows)} entries for {self.num_layers} layers")
        for window in self.windows:
            if window is not None and window < 1:
                raise InputError(f"Config: a window must be at least 1, not {window}")
        if self.encoder is not None:
            self._check_encoder(self.encoder)

    def _check_encoder(self, encoder: Config) -> None:
        if encoder.encoder is not None:
            raise InputError("Config: the encoder has an encoder of its own; only a decoder can have one")
        if encoder.logit_softcap is not None or encoder.head_bias or encoder.logit_scale != 1.0:
            raise InputError("Config: the encoder has logit_softcap, head_bias or logit_scale, but no head")
        mine, its = (self.vocab_size, self.width), (encoder.vocab_size, encoder.width)
        if encoder.tied and mine != its:
            raise InputError(
                f"Config: the encoder reads the decoder's table [V, M] = {list(mine)}, but is made for {list(its)}; "
                "give it tied=False and a table of its own"
            )

    @property
    def turns(self) -> tuple[Positions, ...]:
        """Positions of each layer."""
        return self.layer_positions or (self.positions,) * self.num_layers


__all__ = ["Config", "NormOrder"]
