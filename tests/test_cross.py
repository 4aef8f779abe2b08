"""Promise: a source is encoded once, kept once, shared by all that read it, and nothing else of it is seen.

`test_suite_of_sources` runs the contract suite over what may be kept of a source.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from models import CAPACITY, POSTNORM, PROMPTS, RELATIVE, prompt_ids, tiny
from naive import encode, gap, run

import kvjax
from kvjax import CacheError, InputError, caches, codecs, costs, transformer
from kvjax.caches.base import SOURCE, OpenCache
from kvjax.caches.flags import COUNT, NAN, NO_SOURCE, POSITIONS, TOKEN
from kvjax.caches.recompute import Recompute
from kvjax.config import Config
from kvjax.loops.decode import VALUE
from kvjax.ops.attention import attention
from kvjax.ops.positions import Relative
from kvjax.testing.cases import SOURCES, source_ids
from kvjax.timing import Compilations

EXACT = 1e-5
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Programs of other shapes sum float32 in another order: 1e-6 of logits of about ten; a wrong source moves them by
more than one (`test_what_was_close_is_not_so_with_another_source`)."""
CROSS = {
    "cross": caches.cross(),
    "projected again": caches.encoder_output(),
    "absorbed": caches.encoder_output(absorb=True),
}
each_cross = pytest.mark.parametrize(
    "cross", [pytest.param(x, id=n, marks=() if n != "projected again" else pytest.mark.full) for n, x in CROSS.items()]
)
FEED = prompt_ids(8, 8)[:, :3]


def source(model, rows=3, seed=11):
    return kvjax.encode(model, source_ids(rows, seed), np.resize(SOURCES, rows))


def begun(model, cross=None, plan=None, **options):
    given = options.pop("source", None)
    how = {"source": source(model) if given is None else given, "cross": cross, "capacity": CAPACITY} | options
    return kvjax.init_cache(model, caches.dense() if plan is None else plan, **how)


def big(cache):
    """What is kept of the source, without lengths and flags."""
    return [x for x in jax.tree.leaves(cache.shared[SOURCE]) if x.ndim > 1]


def pointers(arrays):
    return [x.unsafe_buffer_pointer() for x in arrays]


# ---------------------------------------------------------------- the model


def forward_gap(model, reference):
    """How far logits over ragged texts are from those of the model in NumPy, and how much the source does there."""
    found = kvjax.forward(model, prompt_ids(), PROMPTS, source=source(model))
    worst, did = 0.0, 1.0
    for row, (n, s) in enumerate(zip(PROMPTS, SOURCES, strict=True)):
        states = encode(reference, source_ids(3)[row, :s])
        want, _ = run(reference, prompt_ids()[row, :n], source=states)
        other, _ = run(reference, prompt_ids()[row, :n], source=encode(reference, source_ids(3)[(row + 1) % 3, :s]))
        worst, did = max(worst, gap(found[row, :n], want)), min(did, gap(other, want))
    return worst, did


@pytest.mark.parametrize("config", [RELATIVE, POSTNORM], ids=["relative", "post norm"])
def test_encoder_and_decoder_give_the_logits_that_they_give_in_numpy(config):
    worst, did = forward_gap(tiny(config), tiny(config))
    assert worst <= EXACT and did > 1000 * EXACT


def in_order(params, config, tokens, valid):
    with mock.patch.object(transformer, "Recompute", lambda causal: Recompute()):
        return transformer.apply_encoder(params, config, tokens, valid)


def padding_encoded(params, config, tokens, valid):
    return transformer.apply_encoder(params, config, tokens, jnp.full_like(valid, tokens.shape[1]))


def behind_only(params, config, tokens, valid):
    encoder = dataclasses.replace(config.encoder, positions=Relative(8, 16))
    return transformer.apply_encoder(params, dataclasses.replace(config, encoder=encoder), tokens, valid)


def biased(params, config, cache, tokens, valid):
    def cross_attend(self, layer, q, project, **how):
        views, bias = self.shared[SOURCE].views(layer, project), config.positions.bias(params["positions"])
        return attention(q, self.span.positions, views, bias=bias, **how)

    with mock.patch.object(OpenCache, "cross_attend", cross_attend):
        return transformer.apply_decoder(params, config, cache, tokens, valid)


@pytest.mark.parametrize(
    "twin",
    [
        pytest.param({"encode": in_order}, marks=pytest.mark.full),
        pytest.param({"encode": padding_encoded}, marks=pytest.mark.full),
        pytest.param({"encode": behind_only}, marks=pytest.mark.full),
        {"apply": biased},
    ],
    ids=lambda twin: next(iter(twin.values())).__name__,
)
def test_a_broken_twin_of_the_model_does_not(twin):
    worst, _ = forward_gap(tiny(RELATIVE).replace(**twin), tiny(RELATIVE))
    assert worst > 1000 * EXACT


# ---------------------------------------------------------------- sources of any length


@pytest.mark.full
def test_sources_of_one_token_and_of_sixty_stand_in_one_batch():
    model, lengths = tiny(RELATIVE), [60, 1, 2]
    ids = prompt_ids(3, 3, 60)
    found = kvjax.forward(model, prompt_ids(), PROMPTS, source=kvjax.encode(model, ids, lengths))
    for row, (n, s) in enumerate(zip(PROMPTS, lengths, strict=True)):
        want, _ = run(model, prompt_ids()[row, :n], source=encode(model, ids[row, :s]))
        assert gap(found[row, :n], want) <= EXACT


def test_what_is_no_source_is_an_error_on_the_host():
    model, ids = tiny(POSTNORM), source_ids(3)
    plain = tiny(dataclasses.replace(POSTNORM, encoder=None))
    wide = kvjax.Source(jnp.zeros((3, 4, 32)), jnp.full((3,), 4), jnp.zeros((3,), jnp.int32))
    spoilt = source(model).replace(flags=jnp.asarray([0, NO_SOURCE, 0]))
    for call, error, message in (
        (lambda: kvjax.encode(model, ids, [11, 0, 16]), InputError, "row 1 of the source is empty"),
        (lambda: kvjax.encode(model, ids[:, :0]), InputError, "at least one token"),
        (lambda: kvjax.encode(model, ids[0]), InputError, r"must be \[R, S\]"),
        (lambda: kvjax.encode(model, ids, [11, 17, 16]), InputError, "between 0 and 16"),
        (lambda: kvjax.encode(model, prompt_ids(0, 1, 17)), InputError, "row 0 has 17 tokens, the encoder has 16"),
        (lambda: kvjax.encode(model, ids + 90), InputError, "row 0 has id .*, the vocabulary has 96 ids"),
        (lambda: kvjax.encode(plain, ids), InputError, "has no encoder"),
        (lambda: kvjax.init_cache(model, capacity=8), InputError, "give source=kvjax.encode"),
        (lambda: kvjax.forward(model, ids), InputError, "give source=kvjax.encode"),
        (lambda: begun(plain, source=wide), InputError, "has no encoder and attends to none"),
        (lambda: begun(model, source=wide), InputError, "states of width 32, the model reads 24"),
        (lambda: begun(model, batch=4), InputError, "batch 4 is no multiple of the 3 rows"),
        (lambda: begun(model, caches.dense()), InputError, "is not what can be kept of a source"),
        (lambda: begun(model, source=spoilt), CacheError, "row 1, length 0.*its source"),
        (lambda: kvjax.init_cache(plain, cross=caches.cross(), capacity=8), InputError, "no source is given"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_under_jit_it_is_flagged_and_only_its_rows_are_refused():
    model, run_encoder = tiny(POSTNORM), jax.jit(kvjax.encode)
    ids, lengths = prompt_ids(11, 3, 18), jnp.asarray([11, 1, 16])
    poisoned = model.params["encoder"]["embed"]["table"].at[7].set(jnp.nan)
    params = model.params | {"encoder": model.params["encoder"] | {"embed": {"table": poisoned}}}
    ids[ids == 7] = 8
    seven = ids.copy()
    seven[1, 0] = 7
    odd = ids.copy()
    odd[1, 0] = 96
    good = run_encoder(model, ids, lengths)
    for wrong, bit in (
        (run_encoder(model, ids, lengths.at[1].set(17)), POSITIONS),
        (run_encoder(model, ids, lengths.at[1].set(19)), COUNT | POSITIONS),
        (run_encoder(model, ids, lengths.at[1].set(-1)), COUNT),
        (run_encoder(model, ids, lengths.at[1].set(0)), 0),
        (run_encoder(model, odd, lengths), TOKEN),
        (run_encoder(model.replace(params=params), seven, lengths), NAN),
    ):
        assert wrong.flags.tolist() == [0, bit | NO_SOURCE, 0] and np.isfinite(wrong.states).all()
        found, want = (kvjax.forward(model, prompt_ids(), source=x) for x in (wrong, good))
        assert np.isnan(found[1]).all() and np.array_equal(found[::2], want[::2])


# ---------------------------------------------------------------- kept once


LONG = Config(
    64, 2, 64, query_heads=2, kv_heads=2, head_dim=64, ffn_width=64, positions=Relative(), tied=False,
    encoder=Config(64, 1, 512, 2, 2, 8, 8, positions=Relative(bidirectional=True), tied=False),
)  # fmt: skip
SLOTS = 4096


def compiled(cross, how, program):
    """A program that exchanges beams and goes on, and the cache that it is given; nothing is allocated."""
    model = jax.eval_shape(lambda: kvjax.decoder(LONG, kvjax.init_params(LONG, jax.random.key(0))))
    shape = jax.ShapeDtypeStruct
    given = kvjax.Source(shape((2, SLOTS, 512), jnp.float32), *(shape((2,), jnp.int32) for _ in range(2)))
    make = lambda model, source: kvjax.init_cache(  # noqa: E731
        model, caches.dense(), source=source, cross=cross, batch=4, capacity=16
    )
    cache = jax.eval_shape(make, model, given)

    def one(model, cache, beams, tokens):
        return kvjax.step(model, getattr(cache, how)(beams), tokens)

    def scanned(model, cache, beams, tokens):
        def body(cache, tokens):
            logits, cache = one(model, cache, beams, tokens)
            return cache, logits

        return jax.lax.scan(body, cache, tokens)

    rows = shape((4,), jnp.int32)
    run_it, tokens = (scanned, shape((3, 4), jnp.int32)) if program == "scan" else (one, rows)
    return jax.jit(run_it, donate_argnums=1).lower(model, cache, rows, tokens).compile(), cache


def moved(cross, how, program):
    """Bytes that a program has beside its arguments, over those of what is kept of the source; and its copies of it."""
    made, cache = compiled(cross, how, program)
    kept = [x for x in jax.tree.leaves(cache.shared[SOURCE]) if x.ndim > 1]
    size, found = sum(x.size * x.dtype.itemsize for x in kept), made.memory_analysis()
    extra = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    shapes = "|".join(sorted({",".join(map(str, x.shape)) for x in kept}))
    copies = re.findall(rf"\w+\[(?:{shapes})\]\S* (copy|gather|transpose|concatenate|dynamic-slice)\(", made.as_text())
    return extra / size, copies


@pytest.mark.corner
@pytest.mark.parametrize("program", ["scan", pytest.param("step", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "cross", [CROSS["cross"], pytest.param(CROSS["absorbed"], marks=pytest.mark.full)], ids=["cross", "absorbed"]
)
def test_reordered_beams_neither_gather_nor_copy_the_source(cross, program):
    extra, copies = moved(cross, "reorder", program)
    print(f"{jax.__version__}: {extra:.4f} of the source beside the arguments")
    assert extra <= 0.1 and copies == []  # scores are 2 % of the encoder's output


def test_the_measure_catches_rows_that_take_their_source_along():
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        extra, _ = moved(CROSS["cross"], "take", "step")
    assert extra > 1


@each_cross
def test_after_a_compiled_step_there_is_one_buffer_for_all_layers_or_two_for_each(cross):
    model = tiny(RELATIVE)
    _, cache = kvjax.step(model, begun(model, cross), FEED[0])
    count = 2 * RELATIVE.num_layers if cross == caches.cross() else 1
    assert len(set(pointers(big(cache)))) == len(big(cache)) == count
    own = jax.tree.map(jnp.copy, cache)
    where = pointers(big(own))
    _, after = kvjax.donating.step(model, own, FEED[0])
    assert pointers(big(after)) == where, "a donated step leaves the source where it is"
    assert pointers(big(after.fork(4))) == where and after.fork(4).shared[SOURCE].share == 4


def test_samples_that_share_a_source_are_those_that_each_have_their_own():
    model, beams = tiny(RELATIVE), [1, 0, 3, 3, 5, 4]
    made = []
    for start in (begun(model).fork(2), begun(model).take([0, 0, 1, 1, 2, 2])):
        _, cache = kvjax.prefill(model, start, prompt_ids(0, 6), np.repeat(PROMPTS, 2))
        logits, cache = kvjax.step(model, cache.reorder(beams), FEED[:2].reshape(-1))
        made.append((logits, cache.tokens))
    np.testing.assert_allclose(*(x[0] for x in made), **CLOSE)
    np.testing.assert_array_equal(*(x[1] for x in made))
    shared = begun(model).fork(2)
    with pytest.raises(CacheError, match="row 1 reads source 0, row 2 another"):
        shared.reorder([0, 2, 2, 3, 4, 5])
    strayed = jax.jit(lambda cache, beams: cache.reorder(beams))(shared, jnp.asarray([0, 2, 2, 3, 4, 5]))
    assert np.asarray(strayed.flags).astype(bool).tolist() == [False, True, False, False, False, False]


def test_what_was_close_is_not_so_with_another_source():
    """The control of `CLOSE`: the same prompt and the same row, beside the source of its neighbour."""
    model = tiny(RELATIVE)
    logits = [
        kvjax.prefill(model, begun(model).take([0, 1, 2]).reorder(order), prompt_ids(), PROMPTS)[0]
        for order in ([0, 1, 2], [1, 0, 2])
    ]
    off = np.abs(logits[0] - logits[1]).max(axis=1)
    assert (off[:2] > 1).all() and np.allclose(logits[0][2], logits[1][2], **CLOSE)


@pytest.mark.full
@pytest.mark.parametrize("cross", [CROSS["cross"], CROSS["absorbed"]], ids=str)
def test_rows_that_go_on_from_one_text_read_its_source(cross):
    model, one = tiny(RELATIVE), source(tiny(RELATIVE), 1)
    _, prefix = kvjax.prefill(model, begun(model, cross, source=one, capacity=16), prompt_ids()[:1, :10])
    rows = kvjax.init_cache(model, caches.dense(), prefix=prefix, batch=3, capacity=CAPACITY)
    assert len(rows.shared[SOURCE].lengths) == 1 and rows.shared[SOURCE].share == 3
    whole = np.concatenate([np.repeat(prompt_ids()[:1, :10], 3, axis=0), prompt_ids(1)[:, :6]], axis=1)
    found, rows = kvjax.prefill(model, rows, prompt_ids(1)[:, :6])
    want, plain = kvjax.prefill(model, begun(model, cross, source=one, batch=3), whole)
    np.testing.assert_allclose(found, want, **CLOSE)
    after = (kvjax.step(model, cache.reorder([2, 0, 1]), FEED[0])[0] for cache in (rows, plain))
    np.testing.assert_allclose(*after, **CLOSE)
    with pytest.raises(InputError, match="the rows read that of the prefix"):
        kvjax.init_cache(model, caches.dense(), prefix=prefix, source=one, batch=3, capacity=CAPACITY)


@pytest.mark.full
@pytest.mark.parametrize("cross", [CROSS["cross"], CROSS["absorbed"]], ids=str)
def test_a_row_with_a_longer_source_takes_a_place_among_beams(cross):
    model = tiny(RELATIVE)
    _, beams = kvjax.prefill(model, begun(model, cross, source=source(model, 1), batch=3), prompt_ids()[:, :4])
    long = kvjax.encode(model, prompt_ids(4, 1, 20))
    _, other = kvjax.prefill(model, begun(model, cross, source=long), prompt_ids(1, 1)[:, :6])
    found, _ = kvjax.step(model, beams.insert([1], other), FEED[0])
    kept, _ = kvjax.step(model, beams, FEED[0])
    alone, _ = kvjax.step(model, other, FEED[0, 1:2])
    np.testing.assert_allclose(found, [kept[0], alone[0], kept[2]], **CLOSE)


# ---------------------------------------------------------------- done once


ran = []


def counting(params, config, tokens, valid):
    jax.debug.callback(lambda: ran.append(1))
    return transformer.apply_encoder(params, config, tokens, valid)


@pytest.mark.full
def test_the_encoder_runs_once_whatever_is_made_of_its_source():
    model = tiny(POSTNORM).replace(encode=counting)
    given = source(model)
    for cross in CROSS.values():
        logits, cache = kvjax.prefill(model, begun(model, cross, source=given), prompt_ids(), PROMPTS)
        kvjax.decode(model, cache.fork(2).take([0, 2, 4]).rewind(PROMPTS), logits, steps=3)
    jax.effects_barrier()
    assert ran == [1]


def test_no_loop_has_an_encoder_and_only_what_projects_again_projects():
    model, rows = jax.eval_shape(lambda: tiny(RELATIVE)), jax.ShapeDtypeStruct((3,), jnp.int32)
    work = {}
    for name, cross in CROSS.items():
        cache = jax.eval_shape(functools.partial(begun, cross=cross), model)
        count = lambda where: costs.count_flops(VALUE.step, model, cache, rows, within=where).contractions  # noqa: E731, B023
        assert count("encoder") == 0 < count("cross_attention")
        work[name] = count("cross_attention")
    again = 2 * 3 * 16 * 32 * 2 * 2 * 8 * RELATIVE.num_layers  # 3 rows of 16 positions, M by 2 K D, in each layer
    assert work["projected again"] - work["cross"] == again


def test_a_new_source_of_the_same_bucket_compiles_nothing_and_each_part_has_one_program():
    model = tiny(dataclasses.replace(POSTNORM, ffn_width=20))  # a model that no other test has
    kind = caches.encoder_output(absorb=True, store=codecs.int8())
    begun(tiny(POSTNORM), kind)  # JAX's own small programs, for zeros

    def counted(call):
        with Compilations() as made:
            value = jax.block_until_ready(call())
        return made.count, value

    found = []
    for lengths in ([16, 3, 9], [1, 2, 16]):
        programs, given = counted(lambda: kvjax.encode(model, source_ids(3, lengths[0]), lengths))  # noqa: B023
        kept, cache = counted(lambda: begun(model, kind, source=given))  # noqa: B023
        filled, (logits, cache) = counted(lambda: kvjax.prefill(model, cache, prompt_ids(), PROMPTS))  # noqa: B023
        stepped, _ = counted(lambda: kvjax.step(model, cache, FEED[0]))  # noqa: B023
        found.append([programs, kept, filled, stepped])
    assert found == [[1, 1, 1, 1], [0, 0, 0, 0]]


STORES = [make() for make in codecs.CODECS]


@pytest.mark.parametrize(
    "cross",
    [
        pytest.param(kind, id=str(kind), marks=() if str(kind) == "cross(store=int4())" else pytest.mark.full)
        for kind in (
            *(caches.cross(store=store) for store in STORES),
            *(caches.encoder_output(absorb=absorb, store=s) for s in STORES[:-1] for absorb in (False, True)),
        )
    ],
)
def test_predicted_bytes_are_those_of_the_arrays(cross):
    model, given = tiny(POSTNORM), source(tiny(POSTNORM))
    cache = begun(model, cross, source=given)
    asked = {"source": jax.eval_shape(lambda: given), "cross": cross, "capacity": CAPACITY}
    assert kvjax.cache_nbytes(model, caches.dense(), **asked) == sum(x.nbytes for x in jax.tree.leaves(cache))
    if "int4()" in str(cross):
        numbers = 2 * 2 * 8 if str(cross).startswith("cross") else 24
        codes = [x for x in big(cache) if x.dtype == jnp.uint8]
        assert sum(x.nbytes for x in codes) == 3 * 16 * numbers // 2, "two to a byte"


def test_group_codes_are_refused_where_all_layers_read_one_buffer():
    with pytest.raises(InputError, match="int4_channels"):
        begun(tiny(POSTNORM), caches.encoder_output(store=codecs.int4_channels()))


# ---------------------------------------------------------------- looking inside


def test_a_trace_shows_every_site_and_a_text_is_taken_up_again_with_another_stream():
    model, plan = tiny(RELATIVE), caches.hybrid()
    _, cache = kvjax.prefill(model, begun(model, plan=plan), prompt_ids(), np.array([16, 12, 9]))
    patch = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32) * 2
    logits, _ = kvjax.resume(model, cache, 1, 7, patch)
    for row, n in enumerate([16, 12, 9]):
        text, states = prompt_ids()[row, :n], encode(model, source_ids(3)[row, : SOURCES[row]])
        plain, sites = run(model, text, source=states)
        want, _ = run(model, text, [(1, 7, patch[row])], source=states)
        assert {site for _, site in sites} >= {"after_self_attention", "after_cross_attention", "after_ffn"}
        for (layer, site), x in sites.items():
            assert gap(cache.trace(layer, site)[row, :n], x) <= EXACT
        assert gap(logits[row], want[-1]) <= EXACT and gap(plain[-1], want[-1]) > 100 * EXACT


# ---------------------------------------------------------------- the list of kinds


def test_a_kind_without_a_line_is_found(monkeypatch):
    def fresh():
        pass

    kinds.of_sources()
    monkeypatch.setattr(caches, "CROSS_KINDS", (*caches.CROSS_KINDS, fresh))
    with pytest.raises(AssertionError, match="no case for .*fresh"):
        kinds.of_sources()
