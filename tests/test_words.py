"""Kinds and codecs as text: what is written is read back, and nothing else is read."""

import inspect

import jax.numpy as jnp
import pytest
from kinds import cases

from kvjax import InputError, caches, codecs
from kvjax.caches import words


def kinds_in_use():
    plans = [case.plan if isinstance(case.plan, tuple) else (case.plan,) for case in cases()]
    return list(dict.fromkeys(kind for plan in plans for kind in plan))


@pytest.mark.parametrize("kind", kinds_in_use(), ids=str)
def test_every_kind_is_read_back_from_its_text(kind):
    assert caches.parse(str(kind)) == kind
    name = str(kind).partition("(")[0]
    assert name in {make.__name__ for make in (*caches.KINDS, caches.per_layer)}, "and the text is a call, not a repr"


@pytest.mark.parametrize("make", codecs.CODECS, ids=lambda make: make.__name__)
def test_every_codec_is_read_back_inside_a_kind(make):
    needed = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    assert not needed, "then this test must give them"
    for layout in (caches.dense, lambda store: caches.ring(8, sinks=2, store=store)):
        kind = layout(store=make())
        assert caches.parse(str(kind)) == kind
        assert kind == layout(store=None) or str(kind) != str(layout(store=None))


def test_the_text_is_the_shortest_call_and_says_what_differs():
    assert str(caches.dense()) == "dense()"
    assert str(caches.ring(8, slack=2)) == "ring(8, slack=2)"
    assert str(caches.dense(store=jnp.bfloat16, rotated=False)) == "dense(store=plain(dtype=bfloat16), rotated=False)"
    both = caches.per_layer(local=caches.ring(4), full=caches.dense())
    assert str(both) == "per_layer(local=ring(4), full=dense())" and caches.parse(str(both)) == both


def test_what_people_write_is_read():
    assert caches.parse(" ring(1024, sinks=4) ") == caches.ring(1024, sinks=4)
    assert caches.parse("dense") == caches.dense()
    assert caches.parse("dense(store=bfloat16)") == caches.dense(store=jnp.bfloat16)
    assert caches.parse("dense(store=plain)") == caches.dense()


@pytest.mark.parametrize(
    "text, message",
    [
        ("rong(3)", "rong is none of dense"),
        ("plain(bfloat16)", "is no kind of cache"),
        ("dense(store=dense())", "neither a codec nor a dtype"),
        ("dense(store='float8')", "neither a codec nor a dtype"),
        ("ring(0)", "window"),
        ("ring(True)", "window"),
        ("ring()", "missing"),
        ("ring(4, slack=1, slack=2)", "twice|does not read as Python"),
        ("ring(4, **{'slack': 1})", "what stands there is none of"),
        ("ring(2 * 3)", "what stands there is none of"),
        ("caches.ring(3)", "what stands there is none of"),
        ("__import__('os')", "__import__ is none of"),
        ("[dense()]", "what stands there is none of"),
        ("(" * 400 + ")" * 400, "does not read as Python"),
        ("-" * 900 + "1", "what stands there is none of"),
        ("ring(" * 400, "characters"),
        ("", "does not read as Python"),
        ("\0", "does not read as Python"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        caches.parse(text)
    assert "\n" not in str(error.value)


def test_what_no_word_makes_has_no_text():
    class Own(caches.base.Kind):
        def __repr__(self):
            return "Own()"

    assert str(Own()) == "Own()"
    with pytest.raises(InputError, match=r"Own\(\) was made by none of dense"):
        words.text_of(Own(), words.known())
