"""Promise: what a codec keeps errs by no more than it says, is kept exactly afterwards, and is read block by block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FULL, PROMPTS, filled, prompt_ids, tiny

import kvjax
from kvjax import CacheError, InputError, caches, codecs
from kvjax.caches.codecs import scaled
from kvjax.loops import decode as loop
from kvjax.ops import decoding
from kvjax.ops.attention import View, attention

D = 8
TINY = float(np.finfo(np.float32).tiny)  # a CPU flushes what is smaller to 0
CODECS = {
    f"{make.__name__} {scale}": make(scale=scale)
    for make in (codecs.int8, codecs.fp8, codecs.int4)
    for scale in scaled.SCALES
}
GROUPS = {"group": 4, "residual": 3, "slack": 5}


@st.composite
def vectors(draw):
    """`[1, 4, 2, D]` float32 of sizes from below the least normal number to nearly the largest, with zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = rng.uniform(-148, 127, (1, 4, 2, 1)) if draw(st.booleans()) else draw(st.floats(-148, 127))
    spread = draw(st.sampled_from([0.0, 3.0, 40.0]))
    x = rng.choice([-1, 1], (1, 4, 2, D)) * np.exp2(top - spread * rng.random((1, 4, 2, D)))
    x = np.where(rng.random(x.shape) < draw(st.sampled_from([0, 0.3, 1])), 0, x).astype(np.float32)
    return np.where(np.abs(x) < TINY, 0, x) if draw(st.booleans()) else x


def kept(codec, x):
    """Numbers and scales of a store that `x[B, T, K, D]` was written to, float64, `[B, T, K, D]` and `[B, T, K, 1]`."""
    b, t, k, d = x.shape
    slots = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :], (b, t))
    store = write(codec.empty(b, k, t, d, jnp.float32), x, slots)
    codes = caches.storage.unpack(store.codes, k, 1)
    numbers = np.asarray(scaled.numbers(codes, store.code.decode), np.float64).swapaxes(1, 2)
    scale = np.asarray(caches.storage.unpack(store.scale, k, 0), np.float64).swapaxes(1, 2)[..., None]
    return numbers, scale


write = jax.jit(lambda store, x, slots: store.write(x, slots, slots))


def bound(codec, x, scale):
    """The most that each element may err; a ten-thousandth for the quotient's own rounding."""
    if codec.code.name == "fp8":
        return 1.0001 * np.maximum(2.0**-4 * np.abs(x), scale * 2.0**-10) + TINY
    return 0.5001 * scale + TINY


@pytest.mark.corner
@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=vectors())
def test_every_element_errs_by_no_more_than_its_bound(name, x):
    codec = CODECS[name]
    numbers, scale = kept(codec, x)
    assert np.isfinite(scale).all()
    assert (np.abs(numbers * scale - x) <= bound(codec, x, scale)).all()
    assert not (numbers * scale)[x == 0].any()


def test_codes_that_were_made_with_a_finer_scale_than_is_kept_are_seen():
    codec, worst = codecs.int8(scale="bfloat16"), 0.0
    x = np.random.default_rng(0).normal(size=(1, 512, 2, D)).astype(np.float32)
    fine, scale = kept(codecs.int8(), x)
    coarse = np.asarray(jnp.asarray(scale, jnp.float32).astype(jnp.bfloat16), np.float64)
    worst = (np.abs(fine * coarse - x) / coarse).max()
    assert worst > 0.6
    assert (np.abs(fine * coarse - x) > bound(codec, x, coarse)).any()


def test_a_cast_to_e4m3_without_clipping_gives_nan():
    assert np.isnan(jnp.float32(465).astype(jnp.float8_e4m3fn))
    every = np.arange(256, dtype=np.uint8)
    want = jax.lax.bitcast_convert_type(every, jnp.float8_e4m3fn).astype(jnp.float32)
    (got,) = scaled.from_e4m3(jnp.asarray(every), jnp.float32)
    real = ~np.isnan(want)
    assert real.sum() == 254
    np.testing.assert_array_equal(got[real], want[real])
    (top,) = scaled.from_e4m3(scaled.to_e4m3(jnp.array([465.0, -1e30, jnp.nan])), jnp.float32)
    np.testing.assert_array_equal(top, [448, -448, 0])  # the scale shows what was not finite


@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=vectors())
def test_every_channel_of_a_group_errs_by_half_its_own_scale(x):
    keys, _ = codecs.int4_channels(4, residual=0, slack=0).pair(1, 2, 4, (D, D), jnp.float32)
    keys = write(keys, x, jnp.arange(4, dtype=jnp.int32)[None])
    scale, zero = (np.asarray(y, np.float64).reshape(2, 1, D) for y in (keys.scale, keys.zero))
    codes = np.asarray(scaled.numbers(keys.codes, scaled.from_nibbles), np.float64)  # [K, T, D]
    error = np.abs(codes * scale + zero - x[0].swapaxes(0, 1).astype(np.float64))
    # the zero point and the difference from it are rounded to float32
    assert (error <= 0.5001 * scale + 2.0**-22 * np.abs(x).max() + TINY).all()


OUTLIER = np.where(np.arange(D) == 3, 20, 1).astype(np.float32)


def test_an_outlier_channel_breaks_codes_per_token_and_not_per_channel():
    # A channel of the keys 20 times larger, and that of the queries 20 times smaller: the same attention.
    rng, t = np.random.default_rng(1), 64
    q, k, v = (rng.normal(size=(1, n, 2, D)).astype(np.float32) for n in (8, t, t))
    at, slots = jnp.full((1, 8), t, jnp.int32), jnp.arange(t, dtype=jnp.int32)[None]

    def attended(codec, planted):
        keys, values = codec.pair(1, 2, t, (D, D), jnp.float32)
        keys, values = write(keys, k * planted, slots), write(values, v, slots)
        views = caches.base.views_of(*(s.read(slots, jnp.array([t])) for s in (keys, values)))
        return np.asarray(attention(q * 3 / planted, at, views, kv_heads=2))

    exact = attended(codecs.plain(), 1)
    np.testing.assert_allclose(attended(codecs.plain(), OUTLIER), exact, rtol=1e-4, atol=1e-5)
    error = {
        (name, planted): np.abs(attended(codec, OUTLIER if planted else 1) - exact).max()
        for name, codec in (("token", codecs.int4()), ("channel", codecs.int4_channels(16, residual=0)))
        for planted in (False, True)
    }
    print({key: float(value) for key, value in error.items()})
    assert error["token", True] > 2 * error["token", False]
    assert error["channel", True] < 1.5 * error["channel", False]
    assert error["token", True] > 2 * error["channel", True]


@pytest.mark.parametrize("name", [*CODECS, "int4_channels"])
def test_a_key_that_is_not_finite_shows_while_it_is_seen_and_not_afterwards(name):
    codec = CODECS.get(name, codecs.int4_channels(1, residual=0))
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 1, 4, 2, D)).astype(np.float32)
    q = rng.normal(size=(1, 1, 2, D)).astype(np.float32)
    slots = jnp.arange(4, dtype=jnp.int32)[None]
    for bad in (np.nan, np.inf, -np.inf):
        k[0, 1, :, 5] = bad
        keys, values = codec.pair(1, 2, 4, (D, D), jnp.float32)
        keys, values = write(keys, k, slots), write(values, v, slots)
        views = caches.base.views_of(*(s.read(slots, jnp.array([4])) for s in (keys, values)))
        for window, wrong in ((None, True), (2, False)):  # positions 2 and 3 alone
            out = attention(q, jnp.full((1, 1), 3, jnp.int32), views, kv_heads=2, window=window)
            assert np.isnan(out).any() == wrong


@pytest.mark.parametrize(
    "store", [codecs.int8(), codecs.fp8(), codecs.int4(), codecs.int4_channels(4, residual=2)], ids=str
)
def test_a_gradient_through_codes_is_refused_and_not_silently_wrong(store):
    model, ids = tiny(FULL), prompt_ids(0, 1, 8)
    cache = kvjax.init_cache(model, caches.dense(store=store), capacity=16)
    loss = lambda params: jnp.sum(kvjax.prefill(model.replace(params=params), cache, ids)[0])  # noqa: E731
    with pytest.raises(InputError, match="no gradient goes through codes"):
        jax.grad(loss)(model.params)
    assert np.isfinite(loss(model.params))


@pytest.mark.parametrize("plan", [caches.dense(store="float16"), caches.paged(4, pages=12, store="float16")])
def test_what_float16_cannot_hold_shows_to_those_who_see_it_and_to_nobody_else(plan):
    model = tiny(FULL)
    params = model.params | {"embed": {"table": model.params["embed"]["table"].at[5].mul(1e-9)}}
    qkv = params["layers"]["0"]["attn"]["qkv"]["kernel"]
    layer = params["layers"]["0"] | {"attn": params["layers"]["0"]["attn"] | {"qkv": {"kernel": qkv * 1e6}}}
    model = model.replace(params=params | {"layers": params["layers"] | {"0": layer}})
    empty = kvjax.init_cache(model, plan, batch=2, capacity=16)
    _, cache = kvjax.prefill(model, empty, np.array([[7, 8, 9], [5, 5, 5]]))  # the norm's eps keeps token 5 small
    assert np.asarray(cache.flags).astype(bool).tolist() == [True, False]
    assert np.isfinite(np.asarray(cache.values(0))).all()
    freed = cache.release([0])
    got, freed = kvjax.prefill(model, freed, np.array([[5, 5], [5, 5]]))
    want, _ = kvjax.prefill(model, empty, np.array([[5, 5], [5, 5]]))
    assert not np.asarray(freed.flags).any()
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_a_scale_that_float16_cannot_hold_is_not_lost_in_the_weights():
    t = 256
    v = np.random.default_rng(3).normal(size=(1, t, 1, D)).astype(np.float32) * 1e-3
    slots, out = jnp.arange(t, dtype=jnp.int32)[None], {}
    for dtype in (jnp.float32, jnp.float16):
        store = write(codecs.int8().empty(1, 1, t, D, dtype), v, slots)
        views = caches.base.views_of(store.read(slots, None), store.read(slots, None))
        q = jnp.ones((1, 1, 1, D), dtype)
        out[dtype] = np.asarray(attention(q, jnp.full((1, 1), t, jnp.int32), views, kv_heads=1), np.float32)
    np.testing.assert_allclose(out[jnp.float16], out[jnp.float32], rtol=0.01, atol=2e-3 * np.abs(v).max())


# Groups behind a tail


def fed(splits, x):
    """Stores of groups that the texts `x[B, T, K, D]` were written to in pieces, row 1 seven tokens short."""
    b, t, k, d = x.shape
    stores = codecs.int4_channels(**GROUPS).pair(b, k, t, (d, d), jnp.float32)
    at, ends = np.zeros(b, int), np.array([t, t - 7])
    for size in splits:
        real = np.minimum(size, ends - at)
        index = np.minimum(at[:, None] + np.arange(size)[None, :], t - 1)
        slots = np.where(np.arange(size)[None, :] < real[:, None], at[:, None] + np.arange(size)[None, :], t)
        piece = np.take_along_axis(x, index[:, :, None, None], axis=1)
        stores = tuple(write(store, piece, jnp.asarray(slots, jnp.int32)) for store in stores)
        at = at + real
    return stores


@pytest.mark.corner
def test_what_is_kept_of_a_text_does_not_depend_on_how_it_was_split():
    x = np.random.default_rng(0).normal(size=(2, 41, 2, D)).astype(np.float32)
    want = fed([1] * 41, x)
    end = jnp.array([41, 34], jnp.int32)
    for splits in ([41], [13, 13, 15], [6] * 7, [9, 1, 1, 1, 9, 9, 9, 9]):
        for got, one in zip(fed(splits, x), want, strict=True):
            assert all((getattr(got, name) == getattr(one, name)).all() for name in one.axes)
    coded = want[0].sizes.coded(end)
    np.testing.assert_array_equal(coded, [36, 28])  # the last three, and what is no whole group
    exact = np.arange(41)[None, :] >= np.asarray(coded)[:, None]
    live = np.arange(41)[None, :] < np.asarray(end)[:, None]
    for store in want:
        same = (np.asarray(store.unpacked(end)).swapaxes(1, 2) == x).all(axis=(2, 3))
        np.testing.assert_array_equal(same[live], exact[live])


def run(plan, splits, ids, capacity=64):
    """Logits and cache after a text in pieces."""
    cache, at = kvjax.init_cache(tiny(FULL), plan, batch=len(ids), capacity=capacity), 0
    for size in splits:
        logits, cache = kvjax.prefill(tiny(FULL), cache, ids[:, at : at + size])
        at += size
    return np.asarray(logits), cache


@pytest.mark.full
def test_chunks_read_what_single_tokens_read():
    ids, plan = prompt_ids(0, 2, 32), caches.dense(store=codecs.int4_channels(**GROUPS))
    want, _ = run(plan, [1] * 32, ids)
    coarse, _ = run(caches.dense(store=codecs.int4()), [32], ids)
    for splits in ([32], [4] * 8):  # longer than the slack, and within it
        got, _ = run(plan, splits, ids)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(coarse - want).max() > 1e-3 * np.abs(want).max()


def test_a_group_is_never_rewound_into_beyond_the_slack():
    _, cache = filled(tiny(FULL), caches.dense(store=codecs.int4_channels(**GROUPS)))
    assert cache.max_rewind == 5
    assert kvjax.init_cache(tiny(FULL), caches.dense(store=codecs.int8()), capacity=8).max_rewind is None
    cache.rewind(PROMPTS - np.array([5, 5, 1]))
    with pytest.raises(CacheError, match=r"row 0 to length 10 is 6 behind .*keeps 5.*slack"):
        cache.rewind([10, 7, 1])


@pytest.mark.full
def test_a_kept_path_of_drafts_is_coded_as_if_it_alone_had_been_fed():
    x = np.random.default_rng(0).normal(size=(2, 41, 2, D)).astype(np.float32)
    path, start = np.array([0, 2, 4]), 20
    keys, _ = codecs.int4_channels(4, residual=0, slack=5).pair(2, 2, 41, (D, D), jnp.float32)
    slots = lambda a, n: jnp.broadcast_to(jnp.arange(a, a + n, dtype=jnp.int32)[None, :], (2, n))  # noqa: E731
    before = write(keys, x[:, :start], slots(0, start))
    tree = write(before, x[:, start : start + 5], slots(start, 5))
    moved = tree.move(jnp.asarray(np.stack([start + path] * 2), jnp.int32), slots(start, 3))
    want = write(before, x[:, start + path], slots(start, 3))
    for end in (start + 3, start + 2):
        got, one = (np.asarray(s.unpacked(jnp.full(2, end)))[:, :, :end] for s in (moved, want))
        np.testing.assert_array_equal(got, one)
    more = [write(s, x[:, 30:35], slots(start + 3, 5)) for s in (moved, want)]
    got, one = (np.asarray(s.unpacked(jnp.full(2, start + 8)))[:, :, : start + 8] for s in more)
    np.testing.assert_array_equal(got, one)


# Bytes, refusals


@pytest.mark.parametrize(
    ("codec", "slot"),
    [
        (codecs.int8(), 2 * (D + 4)),
        (codecs.int8(scale="bfloat16"), 2 * (D + 2)),
        (codecs.fp8(), 2 * (D + 4)),
        (codecs.int4(), 2 * (D // 2 + 4)),
        (codecs.int4(scale="bfloat16"), 2 * (D // 2 + 2)),
    ],
    ids=str,
)
def test_bytes_are_those_of_codes_and_scales(codec, slot):
    plan, sizes = caches.dense(store=codec), {"batch": 3, "capacity": 96}
    cache = kvjax.init_cache(tiny(FULL), plan, **sizes)
    want = 2 * 3 * 96 * 2 * slot + 4 * 3 * 96 + 12 * 3  # layers, rows, slots, heads
    assert cache.nbytes == kvjax.cache_nbytes(tiny(FULL), plan, **sizes) == want
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == want


def test_bytes_of_groups():
    plan = caches.dense(store=codecs.int4_channels(32, residual=16, slack=16))
    codes, tail = 64, 16 + 32 + 16  # (96 - 16) // 32 groups
    slots = codes * (D // 2) * 2 + codes // 32 * 2 * D * 4 + codes * 4 + 2 * tail * D * 4
    made = kvjax.cache_nbytes(tiny(FULL), plan, batch=3, capacity=96)
    assert made == 2 * 3 * 2 * slots + 4 * 3 * 96 + 12 * 3


def test_what_makes_no_sense_is_refused_by_name():
    groups = codecs.int4_channels()
    for plan in (caches.ring(6, store=groups), caches.paged(16, store=groups), caches.layer_input(store=groups)):
        with pytest.raises(InputError, match=r"int4_channels.*dense caches only"):
            kvjax.init_cache(tiny(FULL), plan, capacity=32)
    with pytest.raises(InputError, match="int4.*multiple of 2 channels, not 7"):
        codecs.int4().empty(1, 1, 4, 7, jnp.float32)
    for wrong in ("float16", "int8", "nothing"):
        with pytest.raises(InputError, match=f"codecs.fp8: scale must be .*{wrong}"):
            codecs.fp8(scale=wrong)
    for wrong in ({"group": 0}, {"residual": -1}, {"slack": 1.5}):
        with pytest.raises(InputError, match=f"int4_channels: {next(iter(wrong))}"):
            codecs.int4_channels(**wrong)


# Reading block by block

LONG, AT = 300, np.array([300, 131, 4])  # two blocks and a part; a row in the second, a row in the first
STORES = {
    "float16": codecs.plain("float16"),
    "bfloat16": codecs.plain("bfloat16"),
    "int8": codecs.int8(),
    "fp8": codecs.fp8(),
    "int4": codecs.int4(),
    "int4_channels": codecs.int4_channels(8, residual=2, slack=2),
}


def views_for(codec, *, rotated=True):
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, 3, LONG, 2, D)).astype(np.float32)
    slots = jnp.broadcast_to(jnp.arange(LONG, dtype=jnp.int32)[None, :], (3, LONG))
    at = jnp.where(slots < AT[:, None], slots, LONG)
    held = caches.base.filled_positions(LONG, jnp.asarray(AT))
    stores = (write(s, x, at) for s, x in zip(codec.pair(3, 2, LONG, (D, D), jnp.float32), (k, v), strict=True))
    return caches.base.views_of(*(s.read(held, jnp.asarray(AT)) for s in stores), rotated=rotated)


def turn(x, positions):
    angle = positions[:, :, None, None] * 0.1
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def attend(views, q, rotate=None, **how):
    return attention(q, jnp.asarray(AT)[:, None], views, kv_heads=2, rotate=rotate, **how)


@pytest.mark.corner
@pytest.mark.parametrize(
    ("rotated", "name"),
    [
        pytest.param(rotated, name, marks=() if rotated == (name != "int4_channels") else pytest.mark.full)
        for rotated in (True, False)
        for name in STORES
    ],
)
def test_blocks_give_what_the_whole_gives(monkeypatch, name, rotated):
    views, q = views_for(STORES[name], rotated=rotated), np.random.default_rng(6).normal(size=(3, 1, 4, D))
    q, found = q.astype(np.float32), {}
    for slots in (64, 128, 10**6):
        monkeypatch.setattr(decoding, "SLOTS", slots)
        once = jax.jit(lambda views, q: attend(views, q, turn, window=200))  # a new function: traced anew
        loops = str(jax.make_jaxpr(once)(views, q)).count("scan[")
        assert (loops > 0) == (slots < LONG / 2)
        found[slots] = np.asarray(once(views, q))
    for slots in (64, 128):
        np.testing.assert_allclose(found[slots], found[10**6], rtol=2e-5, atol=2e-6)


def test_blocks_depend_on_no_neighbour_and_on_no_unused_slot():
    (view,), q = views_for(codecs.int8()), np.random.default_rng(6).normal(size=(3, 1, 4, D)).astype(np.float32)
    run = jax.jit(attend)
    want = np.asarray(run((view,), q))
    for row in range(3):
        own = (np.arange(3) == row).repeat(2)[:, None]
        unused = np.repeat(np.asarray(view.positions) > 10**6, 2, axis=0)
        other = view.replace(
            k_scale=jnp.where(unused, jnp.nan, jnp.where(own, view.k_scale, 3.0)),
            v_scale=jnp.where(unused, 1e30, jnp.where(own, view.v_scale, 5.0)),
        )
        assert np.asarray(run((other,), q))[row].tobytes() == want[row].tobytes()
    seen = view.replace(k_scale=view.k_scale.at[0, 3].set(jnp.nan))
    assert np.isnan(run((seen,), q)[0]).any()


@pytest.mark.full
def test_blocks_can_be_mapped_and_differentiated():
    views, q = views_for(codecs.plain("float16")), np.random.default_rng(6).normal(size=(3, 1, 4, D))
    q = q.astype(np.float32)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), views)
    mapped = jax.vmap(attend)(two, jnp.stack([q, q * 2]))
    np.testing.assert_allclose(mapped[1], attend(views, q * 2), rtol=1e-5, atol=1e-6)
    loss = lambda q, k, v: jnp.sum(attend((views[0].replace(k=k, v=v),), q) ** 2)  # noqa: E731
    wide = [x.astype(jnp.float32) for x in (views[0].k, views[0].v)]  # as stored, and so not in blocks
    got = jax.grad(loss, (0, 1, 2))(q, views[0].k, views[0].v)
    want = jax.grad(loss, (0, 1, 2))(q, *wide)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2e-3, atol=1e-3 * np.abs(b).max())


@pytest.mark.full
@pytest.mark.optimised
@pytest.mark.parametrize("name", ["int8", "int4_channels"])
def test_a_step_is_the_same_compiled_and_not(name):
    model, plan = tiny(FULL), caches.dense(store=STORES[name])
    _, cache = filled(model, plan)
    tokens = prompt_ids(9)[:, 0]
    want, after = loop._step(model, cache, tokens)
    got, compiled = kvjax.step(model, cache, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    for layer in range(2):  # a code may fall on the other side by rounding, but by no more than its step
        np.testing.assert_allclose(compiled.keys(layer), after.keys(layer), atol=0.02 * np.abs(after.keys(layer)).max())


def test_a_view_of_the_queries_own_dtype_is_read_whole():
    x = jnp.zeros((2, 1000, D))
    view = View(x, x, jnp.zeros((1, 1000), jnp.int32))
    q = jnp.zeros((1, 1, 2, D))
    assert decoding.block_size(q, view, None) is None
    coded = decoding.block_size(q, view.replace(k=x.astype(jnp.int8)), None)
    assert coded == (decoding.SLOTS if jax.default_backend() == "cpu" else None)
