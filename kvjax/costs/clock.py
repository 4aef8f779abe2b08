"""Time, predicted from FLOPs and bytes on a device of F FLOP/s and W bytes/s; and what reuse saves.

Sources: kipply, "Transformer Inference Arithmetic" (2022); Pope et al. 2022 (2211.05102); the JAX scaling book.
"""

from __future__ import annotations

from kvjax.config import Config
from kvjax.costs.memory import layer_input_ratio
from kvjax.costs.work import layer_flops


def step_seconds(
    linear_flops: float, weight_bytes: float, cache_bytes: float, *, flops: float, bandwidth: float
) -> float:
    """About one step: max(linear FLOPs / F, weight bytes / W) + cache bytes / W.

    Args:
        linear_flops: of all rows; attention over a cache is bound by its bytes.
        weight_bytes, cache_bytes: read once a step.
        flops, bandwidth: F and W.
    """
    return max(linear_flops / flops, weight_bytes / bandwidth) + cache_bytes / bandwidth


def least_step_seconds(
    all_flops: float, weight_bytes: float, cache_bytes: float, *, flops: float, bandwidth: float
) -> float:
    """What no step can beat: max(all FLOPs / F, (weight + cache bytes) / W)."""
    return max(all_flops / flops, (weight_bytes + cache_bytes) / bandwidth)


def kv_equals_weights_at(width: int, batch: int) -> float:
    """The context at which K/V bytes pass weight bytes: t = 6 M / B (as many kv heads, F = 4M, equal dtypes)."""
    return 6 * width / batch


def both_kv_equal_weights_at(width: int, batch: int) -> float:
    """The same with cross-attention, both texts together: t + S = 7 M / B, where rows share no source. Its map of keys
    and values is not among the weights that a step reads."""
    return 7 * width / batch


def attention_intensity(query_heads: int, kv_heads: int, itemsize: int) -> float:
    """FLOP per byte of decode attention, 2 · (H / K) / b: far below any balance F / W, so bound by bandwidth."""
    return 2 * (query_heads / kv_heads) / itemsize


def largest_reprojected_width(balance: float, itemsize: int) -> float:
    """M up to which projecting stored inputs again is no slower than reading K/V: b · (F / W) / 2 (as many kv heads;
    reading and projecting overlap)."""
    return itemsize * balance / 2


def largest_absorbed_heads(balance: float, itemsize: int) -> float:
    """H up to which absorbed layer inputs are no slower than reading K/V: b · (F / W) / 4 (as many kv heads; reading
    and attending do not overlap)."""
    return itemsize * balance / 4


def least_storage_for_kv(width: int, itemsize: int, flops: float) -> float:
    """Bytes/s of a storage from which loading K/V beats prefilling again: b · F / (12 M) (F = 4M)."""
    return itemsize * flops / (12 * width)


def most_storage_for_inputs(width: int, itemsize: int, flops: float, *, overlap: bool = True) -> float:
    """Bytes/s of a storage up to which loading layer inputs and projecting them beats loading K/V: b · F / (2 M), or
    b · F / (4 M) where loading and projecting do not overlap (HCache, 2410.05004)."""
    return itemsize * flops / ((2 if overlap else 4) * width)


def absorbed_heads(config: Config, balance: float, itemsize: int) -> float:
    """H up to which absorbed layer inputs are no slower than reading K/V, for any number of kv heads:
    `largest_absorbed_heads` · (2 · K · D / M - 1); not above 0 where a layer's input has no fewer bytes."""
    return largest_absorbed_heads(balance, itemsize) * (1 / layer_input_ratio(config) - 1)


def storage_for_kv(config: Config, itemsize: int, flops: float) -> float:
    """`least_storage_for_kv` for any shape: F · 2 · K · D · b over the FLOPs of one token in the maps of a layer."""
    one = layer_flops(config, 0)
    return flops * 2 * config.kv_heads * config.head_dim * itemsize / (one.projections + one.ffn)


def expected_tokens(drafted: int, acceptance: float) -> float:
    """Tokens for each call of the target model with γ drafted ones: (1 - α^(γ + 1)) / (1 - α), γ + 1 at α = 1
    (Leviathan et al., 2211.17192)."""
    if acceptance == 1:
        return drafted + 1
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def speculation_speedup(drafted: int, acceptance: float, draft: float, verify: float = 1.0) -> float:
    """`expected_tokens` / (v + γ · c).

    Args:
        drafted: γ.
        acceptance: α.
        draft: c, time of one step of the draft model against one of the target.
        verify: v, time of a target step over γ + 1 positions against one over a single one; measure it.
    """
    return expected_tokens(drafted, acceptance) / (verify + drafted * draft)


def beam_positions(beams: int, prompt: int, suffix: int) -> int:
    """Positions that beams keep where the prompt is stored once: t + n · s, instead of n · (t + s)."""
    return prompt + beams * suffix


def edit_share(position: int, length: int) -> float:
    """Linear work of editing at p of n against a prefill: (n - p) / n."""
    return (length - position) / length


def edit_cone(position: int, layer: int, window: int) -> tuple[int, int]:
    """The positions, the end not among them, whose K/V in a layer a replaced token changes where every layer has a
    window w: layer l, counted from 0, reads an input that l layers have spread, p up to p + l · (w - 1)."""
    return position, position + layer * (window - 1) + 1


def patch_sweep_share(layers: int, length: int) -> float:
    """Work of patching at every (layer, position) by resuming, against whole runs: (L + 1)(n + 1) / (4 L n)."""
    return (layers + 1) * (length + 1) / (4 * layers * length)


__all__ = [
    "step_seconds",
    "least_step_seconds",
    "kv_equals_weights_at",
    "both_kv_equal_weights_at",
    "attention_intensity",
    "largest_reprojected_width",
    "largest_absorbed_heads",
    "least_storage_for_kv",
    "most_storage_for_inputs",
    "absorbed_heads",
    "storage_for_kv",
    "expected_tokens",
    "speculation_speedup",
    "beam_positions",
    "edit_share",
    "edit_cone",
    "patch_sweep_share",
]
