"""A cache in a file: what is loaded is what was saved, and anything else is an error."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import TABLE, each, of_sources
from models import FULL, MIXED, POSTNORM, STEPS, WINDOW, filled, prompt_ids, tiny
from safetensors import safe_open
from safetensors.numpy import save_file

import kvjax
from kvjax import CacheError, CheckpointError, caches, codecs, persist
from kvjax.caches.base import Kind

RING = (caches.ring(WINDOW, slack=4), caches.dense())


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


@each()
def test_a_cache_comes_back_bitwise_and_decodes_on_as_if_it_had_stayed(case, tmp_path):
    path = tmp_path / "talk.safetensors"
    logits, cache = filled(case.model, case.plan)
    kvjax.save_cache(path, cache, case.model)
    back = kvjax.load_cache(path, case.model)
    assert_same(back, cache)
    ours = kvjax.decode(case.model, back, logits, steps=STEPS)
    assert_same(ours, kvjax.decode(case.model, cache, logits, steps=STEPS))


@pytest.mark.parametrize("kind", caches.KINDS, ids=lambda kind: kind.__name__)
def test_what_was_rewound_grown_and_taken_apart_comes_back_too(kind, tmp_path):
    case, path = TABLE[kind][0], tmp_path / "talk.safetensors"
    _, cache = filled(case.model, case.plan)
    cache = cache.rewind(jnp.maximum(cache.lengths - 1, 0)).resize(2 * cache.capacity).take(np.array([2, 0, 0, 1]))
    kvjax.save_cache(path, cache, case.model)
    assert_same(kvjax.load_cache(path, case.model), cache)


FIRST = [pytest.param(TABLE[kind][0].model, TABLE[kind][0].plan, id=kind.__name__) for kind in caches.KINDS]
CODES = [pytest.param(tiny(MIXED), caches.dense(store=make()), id=make.__name__) for make in codecs.CODECS]


@pytest.mark.corner
@pytest.mark.parametrize("model, plan", FIRST + CODES)
def test_every_kind_and_codec_comes_back_as_stored(model, plan, tmp_path):
    path, rng = tmp_path / "bits.safetensors", np.random.default_rng(0)
    cache = kvjax.init_cache(model, plan, batch=3, capacity=96)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 2, x.shape)).astype(x.dtype), cache)
    kvjax.save_cache(path, cache, model)
    assert_same(kvjax.load_cache(path, model), cache)
    kept = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert kept < path.stat().st_size < kept + 5000, "codes lie there as narrow as in memory"


@each(lambda case: case.full or case.share > 1, of_sources)
def test_a_cache_with_a_source_comes_back_and_decodes_on(case, tmp_path):
    path = tmp_path / "talk.safetensors"
    logits, cache = case.filled()
    for some in (cache, cache.fork(2), cache.take(np.array([2, 0]))):
        kvjax.save_cache(path, some, case.model)
        assert_same(kvjax.load_cache(path, case.model), some)
    kvjax.save_cache(path, cache, case.model)
    ours = kvjax.decode(case.model, kvjax.load_cache(path, case.model), logits, steps=STEPS)
    assert_same(ours, kvjax.decode(case.model, cache, logits, steps=STEPS))


@pytest.mark.full
@pytest.mark.parametrize("cross", [k(store=make()) for k in caches.CROSS_KINDS for make in codecs.CODECS[:-1]], ids=str)
def test_what_is_kept_of_a_source_comes_back_as_stored(cross, tmp_path):
    path, case = tmp_path / "bits.safetensors", dataclasses.replace(of_sources()[0], config=POSTNORM, cross=cross)
    kvjax.save_cache(path, case.empty(), case.model)
    assert_same(kvjax.load_cache(path, case.model), case.empty())


@pytest.mark.full
def test_rows_that_share_a_prefix_and_its_source_come_back(tmp_path):
    path, model = tmp_path / "prefix.safetensors", tiny(POSTNORM)
    given = kvjax.encode(model, prompt_ids(0, 1, 9))
    prefix = kvjax.init_cache(model, caches.dense(), source=given, capacity=16)
    _, prefix = kvjax.prefill(model, prefix, prompt_ids(1, 1, 5))
    cache = kvjax.init_cache(model, caches.dense(), prefix=prefix, batch=3, capacity=32)
    kvjax.save_cache(path, cache, model)
    assert_same(kvjax.load_cache(path, model), cache)


STATES = '"states": [3, 16, 24], "dtype": "float32"'


@pytest.mark.parametrize(
    "about, tensors, message",
    [
        ({"source": "null"}, {}, "attends to a source"),
        ({"source": None}, {}, "metadata are"),
        ({"source": "]"}, {}, "source in the metadata"),
        ({"source": "[1]"}, {}, r"source is .*must be null, or kind, states \[R, S, E\] and dtype"),
        ({"source": f'{{"kind": "cross()", {STATES}, "more": 1}}'}, {}, "must be null, or kind"),
        ({"source": '{"kind": "cross()", "states": [3, 0, 24], "dtype": "float32"}'}, {}, "must be null, or kind"),
        ({"source": '{"kind": "cross()", "states": [3, 16, 24], "dtype": "object"}'}, {}, "must be null, or kind"),
        ({"source": f'{{"kind": "own()", {STATES}}}'}, {}, "source: .*own is none of .*give load_cache cross"),
        ({"source": f'{{"kind": "dense()", {STATES}}}'}, {}, "is not what can be kept of a source"),
        ({"source": f'{{"kind": "encoder_output()", {STATES}}}'}, {}, "shared/source/k/0/data nowhere"),
        ({"source": '{"kind": "cross()", "states": [3, 16, 32], "dtype": "float32"}'}, {}, "states of width 32"),
        ({"source": '{"kind": "cross()", "states": [2, 16, 24], "dtype": "float32"}'}, {}, "batch 3 is no multiple"),
        ({"source": '{"kind": "cross()", "states": [3, 32, 24], "dtype": "float32"}'}, {}, "shared/source/k/0/data"),
        ({}, {"shared/source/lengths": None}, r"shared/source/lengths int32\[3\], but there is none"),
    ],
)
def test_a_source_that_does_not_fit_is_named(with_source, about, tensors, message):
    changed(with_source, about, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        kvjax.load_cache(with_source, tiny(POSTNORM))
    assert str(with_source) in str(error.value) and len(str(error.value)) < 600


def test_another_word_for_what_is_kept_of_a_source_is_refused(with_source):
    with pytest.raises(CheckpointError, match=r"'cross\(\)' is kept there, encoder_output\(\) is given"):
        kvjax.load_cache(with_source, tiny(POSTNORM), cross=caches.encoder_output())
    kvjax.load_cache(with_source, tiny(POSTNORM), cross=caches.cross())


@pytest.fixture
def with_source(tmp_path):
    path, model = tmp_path / "source.safetensors", tiny(POSTNORM)
    given = kvjax.encode(model, prompt_ids(0, 3, 9))
    kvjax.save_cache(path, kvjax.init_cache(model, caches.dense(), source=given, capacity=32), model)
    return path


def test_every_buffer_lies_there_by_rows_and_heads(tmp_path):
    path = tmp_path / "one.safetensors"
    config = dataclasses.replace(MIXED, kv_heads=1)
    cache = kvjax.init_cache(tiny(config), RING, batch=1, capacity=20)
    cache = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), cache)
    kvjax.save_cache(path, cache, tiny(config))
    with safe_open(path, "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert cache.layers[0].k.data.shape == (WINDOW + 4, 8), "in memory without the axes of size 1"
    assert shapes["layers/0/k/data"] == [1, 1, WINDOW + 4, 8]
    assert shapes["layers/1/v/data"] == [1, 1, cache.capacity, 8]
    back = kvjax.load_cache(path, tiny(config))
    assert_same(back, cache)
    with pytest.raises(AssertionError):
        assert_same(back.replace(layers=back.layers[::-1]), cache)
    with pytest.raises(AssertionError):
        assert_same(back.replace(lengths=-back.lengths - 1), cache)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "talk.safetensors"
    _, cache = filled(tiny(MIXED), RING)
    kvjax.save_cache(path, cache, tiny(MIXED))
    return path


def changed(path, about=None, tensors=None):
    """The file with other metadata and tensors, and a checksum that fits them; None leaves one out."""
    with safe_open(path, "numpy") as file:
        made = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})
        words = file.metadata() | (about or {})
    made, words = ({k: v for k, v in d.items() if v is not None} for d in (made, words))
    words["checksum"] = persist._checksum(words, made)
    save_file(made, path, metadata=words)


def test_a_fitting_checksum_alone_changes_nothing(saved):
    before = kvjax.load_cache(saved, tiny(MIXED))
    changed(saved)
    assert_same(kvjax.load_cache(saved, tiny(MIXED)), before)


@pytest.mark.parametrize(
    "about, tensors, message",
    [
        ({"kvjax_cache": "1"}, {}, "version '1'; this reads version 2"),
        ({"kvjax_cache": None}, {}, "version 'none'"),
        ({"more": "x"}, {}, "metadata are .*'more'"),
        ({"plan": None}, {}, "metadata are"),
        ({"plan": '["dense()"]'}, {}, "1 kinds for 2 layers"),
        ({"plan": '["dense()", "dense()"]'}, {}, r"layers/0/k/data float32\[3, 2, 96, 8\], but .* \[3, 2, 10, 8\]"),
        ({"plan": '["own()", "dense()"]'}, {}, "own is none of .*give load_cache its plan"),
        ({"plan": '["__import__(\'os\')", "dense()"]'}, {}, "__import__ is none of"),
        ({"plan": "[1]"}, {}, "must be one text a layer"),
        ({"plan": "]"}, {}, "plan in the metadata"),
        ({"plan": "[" * 9999}, {}, "plan in the metadata"),
        ({}, {"lengths": None}, r"lengths int32\[3\], but there is none"),
        ({}, {"more": np.zeros(3)}, r"more nowhere, but there is float64\[3\]"),
        ({}, {"flags": np.zeros(4, np.int32)}, r"flags int32\[3\], but there is int32\[4\]"),
        ({}, {"tokens": None}, "tokens are"),
        ({}, {"tokens": np.zeros((3, 0), np.int32)}, "tokens are"),
        ({}, {"layers/1/v/data": np.zeros((3, 2, 96, 8), np.float16)}, "float32.* but there is float16"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(saved, about, tensors, message):
    changed(saved, about, tensors)
    with pytest.raises(CheckpointError, match=message.replace(r"\[3, 2, 10", r"float32\[3, 2, 10")) as error:
        kvjax.load_cache(saved, tiny(MIXED))
    assert str(saved) in str(error.value) and len(str(error.value)) < 600


def test_another_model_is_refused(saved):
    with pytest.raises(CheckpointError, match="parameters have the fingerprint"):
        kvjax.load_cache(saved, tiny(MIXED, seed=1))
    model = tiny(MIXED)
    x = model.params["layers"]["1"]["attn"]["out"]["kernel"]
    nudged = x.at[0, 0].set(np.nextafter(np.float32(x[0, 0]), np.float32(9)))
    params = jax.tree.map(lambda p: nudged if p is x else p, model.params)
    with pytest.raises(CheckpointError, match="other parameters"):
        kvjax.load_cache(saved, model.replace(params=params))
    with pytest.raises(CheckpointError, match=r"config.windows is \[6, null\] there, \[null, null\] in this model"):
        kvjax.load_cache(saved, tiny(FULL))
    activation = dataclasses.replace(MIXED, activation=jax.nn.relu)
    with pytest.raises(CheckpointError, match="config.activation is .*silu.* there, .*relu"):
        kvjax.load_cache(saved, kvjax.decoder(activation, model.params))


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    path, (_, cache) = tmp_path / "x.safetensors", filled(tiny(MIXED), RING)
    with pytest.raises(CacheError, match="no plan"):
        kvjax.save_cache(path, cache.replace(plan=()), tiny(MIXED))
    narrow = cache.replace(flags=cache.flags.astype(jnp.float8_e4m3fn))
    with pytest.raises(CacheError, match=r"flags int32\[3\], but there is float8"):
        kvjax.save_cache(path, narrow, tiny(MIXED))
    wide = dataclasses.replace(MIXED, head_dim=16)
    with pytest.raises(CacheError, match=r"layers/0/k/data float32\[3, 2, 10, 16\], but there is .*8\]"):
        kvjax.save_cache(path, cache, tiny(wide))
    assert list(tmp_path.iterdir()) == []


def test_damage_anywhere_is_an_error(saved, rng):
    good, model = saved.read_bytes(), tiny(MIXED)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*rng.integers(0, header, 200), *rng.integers(header, len(good), 60), *range(8)]
    damaged = [
        good[:i] + bytes([good[i] ^ 1 << int(bit)]) + good[i + 1 :] for i in places for bit in rng.integers(0, 8, 1)
    ]
    damaged += [good[:n] for n in (0, 7, 8, header // 2, header, *rng.integers(0, len(good), 30), len(good) - 1)]
    damaged += [good + b"\0", good[:header] + bytes(len(good) - header)]
    for data in damaged:
        saved.write_bytes(data)
        with pytest.raises(CheckpointError):
            kvjax.load_cache(saved, model)
    saved.write_bytes(good)
    kvjax.load_cache(saved, model)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_save_that_is_cut_short_leaves_the_old_file(saved, monkeypatch, error):
    before = saved.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(persist, "save_file", half)
    with pytest.raises(type(error)):
        kvjax.save_cache(saved, kvjax.load_cache(saved, tiny(MIXED)), tiny(MIXED))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_the_file_takes_its_place_only_once_it_is_on_the_disk(saved, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((a.parent == b.parent, b)), replace(a, b)))
    kvjax.save_cache(saved, kvjax.load_cache(saved, tiny(MIXED)), tiny(MIXED))
    assert calls == ["fsync", (True, saved)]


def test_what_was_loaded_does_not_change_with_the_file(saved):
    cache = kvjax.load_cache(saved, tiny(MIXED))
    before = jax.tree.map(np.array, cache)
    with open(saved, "rb+") as file:
        file.write(b"\xff" * saved.stat().st_size)
    assert_same(cache, before)


@dataclasses.dataclass(frozen=True)
class Own(Kind):
    """A kind that the library does not know: `dense` by another name."""

    def init(self, shape, batch, capacity):
        return caches.dense().init(shape, batch, capacity)


def test_a_kind_of_ones_own_needs_its_plan_again(tmp_path):
    path, model = tmp_path / "own.safetensors", tiny(FULL)
    cache = kvjax.init_cache(model, Own(), batch=2, capacity=32)
    kvjax.save_cache(path, cache, model)
    with pytest.raises(CheckpointError, match="give load_cache its plan"):
        kvjax.load_cache(path, model)
    assert_same(kvjax.load_cache(path, model, plan=Own()), cache)
    with pytest.raises(CheckpointError, match=r"plan is .*Own\(\).* there, .*dense\(\).* is given"):
        kvjax.load_cache(path, model, plan=caches.dense())


def test_a_model_without_a_configuration_is_known_by_its_parameters(tmp_path):
    path, inner = tmp_path / "mine.safetensors", tiny(FULL)
    model = kvjax.Model(inner.params, (FULL, 1.5, None, "x"), _apply, _head)
    cache = kvjax.init_cache(model, caches.dense(), batch=2, capacity=8)
    kvjax.save_cache(path, cache, model)
    assert_same(kvjax.load_cache(path, model), cache)
    with pytest.raises(CheckpointError, match="config is"):
        kvjax.load_cache(path, model.replace(config=(FULL, 1.25, None, "x")))


def _apply(params, config, cache, tokens, valid):
    return kvjax.model.apply_decoder(params, config[0], cache, tokens, valid)


def _head(params, config, x):
    return kvjax.model.decoder_head(params, config[0], x)
