"""Sentences about the cost of caches that are often said wrong, and what is right: each a test of its numbers.

d 512, 6 layers, 8 heads, a batch of 4 and 100 + 100 positions are the textbook example: an encoder-decoder.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import costs
from kvjax.config import Config
from kvjax.ops.norms import LayerNorm
from kvjax.ops.positions import Learned

D, LAYERS, BATCH, POSITIONS = 512, 6, 4, 100
TEXTBOOK = Config(
    10_000,
    LAYERS,
    D,
    query_heads=8,
    kv_heads=8,
    head_dim=64,
    ffn_width=4 * D,
    norm=LayerNorm(),
    gated=False,
    positions=Learned(4096),
)
TRANSLATOR = dataclasses.replace(TEXTBOOK, encoder=TEXTBOOK)
LLAMA_3_8B = Config(128_256, 32, 4096, query_heads=32, kv_heads=8, head_dim=128, ffn_width=14_336, tied=False)


def kv(batch=BATCH, positions=POSITIONS, itemsize=4):
    """Bytes of self- and cross-attention K/V of the textbook example."""
    container = costs.container_nbytes(batch, positions)
    store = {2: jnp.bfloat16, 4: jnp.float32}[itemsize]
    own = costs.dense_nbytes(TEXTBOOK, batch=batch, capacity=positions, store=store) - container
    cross = costs.cross_nbytes(TRANSLATOR, source=positions, rows=batch, store=store)
    return own + cross - costs.source_nbytes(batch)


def outputs(itemsize=4):
    """Bytes of the outputs of the six decoder layers of the textbook example, the embedding not counted."""
    shape = {"batch": BATCH, "capacity": POSITIONS, "sites": 1, "embedding": 0}
    return costs.trace_nbytes(TEXTBOOK, **shape) * itemsize // 4


def linear(config=TEXTBOOK):
    one = costs.layer_flops(config, 1)
    return one.projections + one.ffn


def test_the_textbook_example_is_these_integers():
    assert kv() == 19_660_800 == 4 * 4_915_200
    assert kv(itemsize=2) == 9_830_400
    assert outputs() == 4_915_200 == 4 * 1_228_800
    assert kv() == 4 * outputs(), "4 : 1"


def test_24_mb_and_12_mb_fit_no_size_of_an_element_but_a_padding_to_128_makes_24_mib():
    elements = kv() // 4
    for said in (24e6, 12e6, 24 * 2**20, 12 * 2**20):
        assert said / elements not in (1, 2, 4, 8)
    assert kv(positions=128) == 24 * 2**20
    assert kv(positions=128, itemsize=2) == 12 * 2**20


def test_not_36_mb_a_sample_for_both_caches_but_24_6_mb_for_the_batch():
    both = kv() + outputs()
    assert both == 24_576_000
    assert both / BATCH == 6_144_000 != 36e6


def test_everything_is_not_three_layer_outputs_but_five_or_seven_widths_a_position_and_layer():
    width = LAYERS * D * POSITIONS * BATCH * 4
    own = costs.dense_nbytes(TEXTBOOK, batch=BATCH, capacity=POSITIONS) - costs.container_nbytes(BATCH, POSITIONS)
    sites = costs.trace_nbytes(TEXTBOOK, batch=BATCH, capacity=POSITIONS, sites=3, embedding=0)
    assert own + sites == 5 * width
    assert kv() + sites == 7 * width
    assert sites == 3 * width != own + sites


def test_an_absorbed_encoder_output_is_twice_the_layers_less_than_cross_attention_kv():
    shape, beside = {"source": POSITIONS, "rows": BATCH}, costs.source_nbytes(BATCH)
    cross = costs.cross_nbytes(TRANSLATOR, **shape) - beside
    assert cross == 2 * LAYERS * (costs.encoder_output_nbytes(TRANSLATOR, **shape) - beside)
    assert costs.cross_ratio(TRANSLATOR) == 2 * LAYERS


def test_layer_inputs_are_half_of_kv_with_full_heads_and_twice_kv_in_llama_3_8b():
    assert costs.layer_input_ratio(TEXTBOOK) == 0.5
    assert costs.layer_input_ratio(LLAMA_3_8B) == 2.0
    for config, ratio in ((TEXTBOOK, 0.5), (LLAMA_3_8B, 2.0)):
        shape = {"batch": 2, "capacity": 64}
        container = costs.container_nbytes(**shape)
        inputs = costs.layer_input_nbytes(config, **shape) - container
        assert inputs == ratio * (costs.dense_nbytes(config, **shape) - container)


def test_what_codes_add_to_an_element():
    wide = Config(10, 1, 64, query_heads=1, kv_heads=1, head_dim=64, ffn_width=1)
    elements = 2 * 64

    def per_element(store):
        return costs.slot_nbytes(wide, store) / elements

    assert per_element(jnp.float32) == 4
    assert per_element(costs.Stored(8, scales=4)) == 1 + 4 / 64
    assert per_element(costs.Stored(8, scales=2)) == 1 + 2 / 64
    assert per_element(costs.Stored(4, scales=4)) == 0.5 + 4 / 64
    # in groups: 1/2 + 8/G bytes an element, and the tail of R + G + slack tokens in full precision
    exact = costs.Stored(4, group=32, channel=8, tail=0)
    assert exact.nbytes(96, 64) / (96 * 64) == 0.5 + 8 / 32
    grouped = costs.Stored(4, group=32, channel=8, residual=64, slack=16)
    assert grouped.nbytes(160, 64) == 96 * 64 * (0.5 + 8 / 32) + (64 + 32 + 16) * 64 * 4
    assert grouped.nbytes(191, 64) == grouped.nbytes(160, 64), "the tail has what is no whole group"


def test_a_latent_cache_counts_latents_and_their_rotary_part():
    assert costs.latent_nbytes(27, 512, 64, 1000, 2, 2) == 27 * 576 * 1000 * 2 * 2


def test_a_prefix_is_kept_once_and_pages_waste_less_than_a_page_a_row():
    shape = {"batch": 8, "capacity": 600}
    slot = LAYERS * costs.slot_nbytes(TEXTBOOK)
    shared = costs.shared_prefix_nbytes(TEXTBOOK, **shape, prefix=500)
    assert shared == slot * (500 + 8 * 100) + 4 * 501 + costs.container_nbytes(**shape)
    paged = costs.paged_nbytes(TEXTBOOK, **shape, pages=8 * 38, page_size=16)
    assert paged - 4 * 8 * 38 - 2 * 4 * 8 * 38 - costs.container_nbytes(**shape) == slot * 8 * 38 * 16
    assert 0 <= 8 * 38 * 16 - 8 * 600 <= 8 * 15


def test_one_decoded_token_is_24_d_squared_and_4_t_d_a_layer_not_d_squared_alone():
    for t in (1, 100, 3072, 10_000):
        made = costs.layer_flops(TEXTBOOK, t)
        assert made.contractions == 24 * D**2 + 4 * t * D
    assert costs.layer_flops(TEXTBOOK, 6144).contractions == 72 * D**2, "three times that of an empty text"
    both = costs.layer_flops(TRANSLATOR, 50) + costs.cross_layer_flops(TRANSLATOR, 70)
    assert both.contractions == 28 * D**2 + 4 * 50 * D + 4 * 70 * D


def test_with_cached_kv_attention_is_not_o_1_but_4_t_d():
    assert [costs.layer_flops(TEXTBOOK, t).scores for t in (1, 10, 1000)] == [4 * t * D for t in (1, 10, 1000)]


def test_the_linear_part_is_the_larger_one_until_t_is_6_d():
    assert costs.attention_equals_linear_at(TEXTBOOK) == 6 * D == 3072
    below, above = costs.layer_flops(TEXTBOOK, 3071), costs.layer_flops(TEXTBOOK, 3073)
    assert below.scores < below.projections + below.ffn
    assert above.scores > above.projections + above.ffn
    at_100 = costs.layer_flops(TEXTBOOK, 100)
    assert at_100.ffn == 16 * D**2 > 10 * at_100.scores, "the feed-forward is not the cheap part"
    # with cross-attention both texts together: t + S = 7 d
    t, s = 3 * D, 4 * D
    both = costs.layer_flops(TRANSLATOR, t) + costs.cross_layer_flops(TRANSLATOR, s)
    assert both.contractions - both.scores == both.scores == 28 * D**2


def test_a_step_without_a_cache_is_also_t_d_squared_and_that_is_the_largest_term():
    for t in (100, 2500):
        made = costs.recompute_flops(dataclasses.replace(TEXTBOOK, num_layers=1, windows=()), slots=t)
        assert made.projections + made.ffn == 24 * D**2 * t
        assert made.scores >= 4 * D * t**2
        assert made.projections + made.ffn > made.scores
    q, k_and_v = 2 * D * D, 2 * 2 * D * D * 100
    assert (q, k_and_v) != (D, 100 * D), "a query anew is O(d²), all keys and values O(t · d²)"


def test_n_tokens_stay_quadratic_with_a_cache():
    for n in (1, 7, 64):
        assert costs.with_kv_flops(TEXTBOOK, n) == LAYERS * sum(24 * D**2 + 4 * t * D for t in range(1, n + 1))
        anew = sum(24 * D**2 * t + 4 * D * t**2 for t in range(1, n + 1))
        assert costs.without_cache_flops(TEXTBOOK, n) == LAYERS * anew
    n = 10**6
    leading = LAYERS * (24 * D**2 * n + 2 * D * n**2)
    assert costs.with_kv_flops(TEXTBOOK, n) / leading == pytest.approx(1, abs=1e-5)
    assert costs.with_kv_flops(TEXTBOOK, 2 * n) > 3.9 * costs.with_kv_flops(TEXTBOOK, n)


def test_streams_kept_instead_of_keys_and_values_save_less():
    for step, whole in (
        (costs.kv_flops, costs.with_kv_flops),
        (costs.reprojected_flops, costs.with_reprojected_flops),
        (costs.absorbed_flops, costs.with_absorbed_flops),
    ):
        steps = sum(dataclasses.replace(step(TEXTBOOK, slots=t), head=0).contractions for t in range(1, 65))
        assert whole(TEXTBOOK, 64) == steps
    for n in (64, 1024):
        kept = [f(TEXTBOOK, n) for f in (costs.with_kv_flops, costs.with_reprojected_flops, costs.without_cache_flops)]
        assert kept == sorted(kept)
        assert kept[2] / kept[1] < 6 + n / D, "4 d² a position and step, where 24 d² + 4 t d are without a cache"


@pytest.mark.parametrize("n", [2, 16, 256, 4096, 10**6])
def test_a_cache_saves_between_n_over_2_and_2_n_over_3_not_up_to_ten(n):
    ratio = costs.without_cache_flops(TEXTBOOK, n) / costs.with_kv_flops(TEXTBOOK, n)
    assert n / 2 < ratio < (2 * n + 1) / 3
    if n >= 256:
        assert ratio > 10
    if n == 10**6:
        assert ratio == pytest.approx(2 * n / 3, rel=0.01)


def test_flops_and_bytes_of_the_cache_are_linear_in_the_batch():
    one, eight = (costs.kv_flops(TEXTBOOK, slots=100, batch=b) for b in (1, 8))
    assert one * 8 == eight
    cache = [costs.dense_nbytes(TEXTBOOK, batch=b, capacity=100) for b in (1, 8)]
    assert cache[1] == 8 * cache[0]
    # only reading the weights is flat
    device = {"flops": 1e15, "bandwidth": 1e12}
    weights = 12 * D**2 * LAYERS * 4
    empty = [costs.step_seconds(one.contractions * b, weights, 0, **device) for b in (1, 8)]
    assert empty[0] == empty[1] == weights / 1e12
    filled = [costs.step_seconds(0, weights, c, **device) - empty[0] for c in cache]
    assert filled[1] == pytest.approx(8 * filled[0])


@pytest.mark.parametrize("config", [TEXTBOOK, LLAMA_3_8B], ids=["textbook", "llama"])
def test_layer_outputs_save_no_flop_over_kv(config):
    kept = costs.kv_flops(config, slots=500, batch=2)
    again = costs.reprojected_flops(config, slots=500, batch=2)
    per_position = 4 * config.width * config.kv_heads * config.head_dim
    assert again.contractions - kept.contractions == config.num_layers * 2 * 500 * per_position > 0
    absorbed = costs.absorbed_flops(config, slots=500, batch=2)
    assert absorbed.scores == kept.scores * config.width / config.head_dim
    assert absorbed.contractions > kept.contractions


def test_absorption_costs_the_heads_times_the_attention():
    kept, absorbed = costs.kv_flops(TEXTBOOK, slots=100), costs.absorbed_flops(TEXTBOOK, slots=100)
    assert absorbed.scores == 8 * kept.scores == LAYERS * 4 * 100 * 8 * D


def test_keys_and_values_of_a_source_pay_at_the_second_step_and_absorption_costs_the_heads_times_the_attention():
    shape = {"source": 100, "rows": BATCH}
    once = costs.projecting_flops(TRANSLATOR, **shape).contractions
    assert once == 4 * D**2 * 100 * BATCH * LAYERS
    kept = costs.cross_flops(TRANSLATOR, source=100, batch=BATCH).contractions
    again = costs.cross_reprojected_flops(TRANSLATOR, **shape, batch=BATCH).contractions
    assert [n * again - (once + n * kept) for n in (1, 2, 100)] == [0, once, 99 * once]
    assert again / kept > 80, "projecting 100 positions where one token is decoded"
    absorbed = costs.cross_absorbed_flops(TRANSLATOR, source=100)
    assert absorbed.scores == 8 * costs.cross_flops(TRANSLATOR, source=100).scores == LAYERS * 4 * 100 * 8 * D
    assert absorbed.projections == LAYERS * (4 + 4) * D**2, "4 d² for the way there and back"


def test_time_is_bound_by_bytes_and_no_step_beats_the_least():
    device = {"flops": 200e12, "bandwidth": 1e12}
    for batch in (1, 16, 4096):
        step = costs.kv_flops(TEXTBOOK, slots=1000, batch=batch)
        linear_flops = step.contractions - step.scores
        weights = 12 * D**2 * LAYERS * 2
        cache = costs.dense_nbytes(TEXTBOOK, batch=batch, capacity=1000, store=jnp.bfloat16)
        about = costs.step_seconds(linear_flops, weights, cache, **device)
        least = costs.least_step_seconds(step.contractions, weights, cache, **device)
        assert about >= least * (1 - 1e-12)  # the same sum in another order
    slot = costs.slot_nbytes(TEXTBOOK)
    t = costs.kv_equals_weights_at(D, 4)
    assert t == 6 * D / 4
    assert 4 * t * slot == 12 * D**2 * 4
    both = costs.both_kv_equal_weights_at(D, 4)
    assert 4 * both * slot == (4 + 2 + 8) * D**2 * 4, "the query's and the output's map of cross-attention"
    assert costs.attention_intensity(8, 8, 2) == 1
    assert costs.attention_intensity(32, 8, 2) == 4 < 200, "far below the balance of an accelerator"


def test_when_making_keys_and_values_again_beats_reading_them():
    balance, b, bandwidth = 200, 2, 1e12
    flops = balance * bandwidth
    d = costs.largest_reprojected_width(balance, b)
    assert d == 200
    assert 4 * d**2 / flops == pytest.approx(2 * d * b / bandwidth), "projecting one position takes as long as its K/V"
    h = costs.largest_absorbed_heads(balance, b)
    assert h == 100
    absorbed = 4 * h * D / flops + D * b / bandwidth
    assert absorbed == pytest.approx(2 * D * b / bandwidth)


def test_when_loading_beats_computing():
    flops, b = 100e12, 2
    storage = costs.least_storage_for_kv(D, b, flops)
    assert 2 * D * b / storage == pytest.approx(24 * D**2 / flops)
    storage = costs.most_storage_for_inputs(D, b, flops)
    assert 4 * D**2 / flops == pytest.approx(2 * D * b / storage)
    storage = costs.most_storage_for_inputs(D, b, flops, overlap=False)
    assert D * b / storage + 4 * D**2 / flops == pytest.approx(2 * D * b / storage)


def test_what_speculation_gives():
    for drafted, acceptance in ((1, 0.0), (3, 0.5), (4, 0.9), (5, 1.0)):
        expected = sum(acceptance**i for i in range(drafted + 1))  # the i-th draft counts if all before it did
        assert costs.expected_tokens(drafted, acceptance) == pytest.approx(expected)
    assert costs.speculation_speedup(4, 0.8, 0.05) == pytest.approx(sum(0.8**i for i in range(5)) / 1.2)
    assert costs.speculation_speedup(4, 0.8, 0.05, verify=2.0) < costs.speculation_speedup(4, 0.8, 0.05)


def test_beams_keep_the_prompt_once():
    assert costs.beam_positions(4, 1000, 50) == 1200 < 4 * (1000 + 50)
    shape = {"batch": 4, "capacity": 1050}
    shared = costs.shared_prefix_nbytes(TEXTBOOK, **shape, prefix=1000)
    slot = LAYERS * costs.slot_nbytes(TEXTBOOK)
    assert shared - 4 * 1001 - costs.container_nbytes(**shape) == slot * costs.beam_positions(4, 1000, 50)


def test_what_an_edit_reaches():
    assert costs.edit_share(30, 40) == 0.25
    n, w, p = 40, 5, 10
    changed = np.arange(n) == p  # the embedding
    for layer in range(4):
        first, end = costs.edit_cone(p, layer, w)
        assert np.flatnonzero(changed).tolist() == list(range(first, end))
        changed = np.array([changed[max(0, i - w + 1) : i + 1].any() for i in range(n)])


def test_a_patching_sweep_by_resuming_is_3_3_to_3_8_times_less():
    for layers, n in ((6, 128), (12, 200), (18, 512)):
        work = sum((layers - layer) * (n - at) for layer in range(layers) for at in range(n))
        assert costs.patch_sweep_share(layers, n) == pytest.approx(work / (layers * n) ** 2)
        assert 3.3 < 1 / costs.patch_sweep_share(layers, n) < 3.8


def test_float8_e4m3_reaches_448_not_240_and_is_nan_beyond_464():
    cast = np.array([240, 448, 464, 465, -466], np.float32).astype(jnp.float8_e4m3fn).astype(np.float32)
    assert cast[:3].tolist() == [240, 448, 448]
    assert np.isnan(cast[3:]).all()
    assert float(jnp.finfo(jnp.float8_e4m3fn).max) == 448
