"""A kind is a layout times a codec: with one codec, every layout gives what a dense cache of it gives."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from models import CAPACITY, FULL, LEARNED, PROMPTS, prompt_ids, tiny

import kvjax
from kvjax import InputError, caches, codecs

CODECS = {
    "float32": codecs.plain("float32"),
    "float16": codecs.plain("float16"),
    "bfloat16": codecs.plain("bfloat16"),
    "int8": codecs.int8(),
    "int8, bfloat16 scales": codecs.int8(scale="bfloat16"),
    "fp8": codecs.fp8(),
    "int4": codecs.int4(),
}
LAYOUTS = {
    "ring": lambda **how: caches.ring(64, **how),
    "ring and sinks": lambda **how: caches.ring(48, sinks=3, **how),
    "pages": lambda **how: caches.paged(8, **how),
    "shared pages": lambda **how: caches.paged(4, share=2, **how),
    "shared prefix": lambda **how: caches.shared_prefix(caches.dense(**how)),
    "traced": lambda **how: caches.traced(caches.paged(8, **how), store=how["store"]),
    "per layer": lambda **how: caches.per_layer(local=caches.ring(64), full=caches.dense(**how)),
}
STEPS = prompt_ids(7, len(PROMPTS), 3)


@functools.cache
def logits(plan, config=FULL):
    """Of a ragged prompt, of a longer chunk after it, and of single tokens."""
    model, found = tiny(config), []
    cache = kvjax.init_cache(model, plan, batch=len(PROMPTS), capacity=CAPACITY)
    for ids, valid in (
        (prompt_ids(), PROMPTS),
        (prompt_ids(3), np.array([4, 16, 9])),
        *((s[:, None], None) for s in STEPS.T),
    ):
        made, cache = kvjax.prefill(model, cache, ids, valid)
        found.append(np.asarray(made))
    cache.check()
    return np.stack(found)


def off(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def cells():
    for layout in LAYOUTS:
        for codec in CODECS:
            for rotated in (True, False) if codec in ("int8", "float32") else (True,):
                quick = rotated and codec == "int8" and layout in ("shared pages", "shared prefix")
                name = f"{layout}-{codec}{'' if rotated else '-un-rotated'}".replace(" ", "_").replace(",", "")
                yield pytest.param(layout, codec, rotated, id=name, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("layout", "codec", "rotated"), list(cells()))
def test_a_layout_reads_a_codec_as_a_dense_cache_does(layout, codec, rotated):
    how = {"store": CODECS[codec], "rotated": rotated}
    # Keys that two programs make an ulp apart, or their scales, may fall on two sides of a rounding to half precision.
    limit = 1e-3 if "float16" in codec else 1e-5
    assert off(logits(LAYOUTS[layout](**how)), logits(caches.dense(**how))) < limit


@pytest.mark.parametrize("codec", [c if c == "int4" else pytest.param(c, marks=pytest.mark.full) for c in CODECS])
def test_codecs_differ_from_what_they_encode_and_from_each_other(codec):
    """Otherwise the comparison above would compare nothing."""
    exact, coded = logits(caches.recompute()), logits(caches.dense(store=CODECS[codec]))
    assert (off(coded, exact) < 1e-5) == (codec == "float32")
    assert off(coded, logits(caches.dense(store=codecs.int8()))) > 1e-4 or codec == "int8"


@pytest.mark.full
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("absorb", [False, True])
def test_layer_inputs_take_every_codec_too(codec, absorb):
    plan = caches.layer_input(absorb=absorb, store=CODECS[codec])
    # About twice what is measured on this model, whose logits are wild; another row's logits are further off than any.
    limits = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "fp8": 0.3, "int4": 1.2}
    limit, want = limits.get(codec, 0.06), logits(caches.recompute(), LEARNED)
    assert off(logits(plan, LEARNED), want) < limit < off(np.roll(want, 1, axis=1), want)


@pytest.mark.parametrize("name", ["ring", "pages", "shared pages", "traced"])
def test_codes_in_groups_are_refused_where_they_make_no_sense(name):
    how = {"store": codecs.int4_channels(8, residual=8), "rotated": True}
    with pytest.raises(InputError, match="int4_channels"):
        kvjax.init_cache(tiny(FULL), LAYOUTS[name](**how), batch=1, capacity=64)
