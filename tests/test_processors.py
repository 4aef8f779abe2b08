"""Filters against the logits processors of Transformers (tests/golden/processors.npz, by scripts/processors.py).

Two differences are on purpose, and the script leaves out the rows that show them. Of equal tokens at the bound of top-p
Transformers keeps those that its sort puts first, kvjax all. Transformers forces a first token on texts of one, the
start token of a model with an encoder; kvjax forces the first new token, whatever stands before it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax import sampling

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity

CLOSE = 1e-6
"""Of a logit, or of 1 where that is more: a product and a quotient in float32."""
META, GOLDEN = parity.read("processors")
CHAINS = [json.dumps(group["chain"]) for group in META["groups"]]
SINGLE = {}
for number, group in enumerate(META["groups"]):
    if len(group["chain"]) == 1:
        SINGLE.setdefault(group["chain"][0][0], []).append(number)
NONE = {"presence_penalty", "frequency_penalty", "logit_bias", "allowed"}
"""Filters without a processor: `test_sampling` has their numbers."""


def made(name, value):
    if name == "sequence_bias":
        value = {tuple(ids): bias for ids, bias in value}
    return getattr(sampling, name)(value)


def text(**changes):
    own = {key: GOLDEN[key] for key in ("tokens", "lengths", "starts", "limits")}
    return sampling.Text(**own | {"stops": np.asarray(META["stops"], np.int32)} | changes)


@jax.jit
def apply(filters, logits, text):
    return sampling.drawing.filtered(filters, logits, text)


def differences(filters, number, text):
    """Rows of a group in which a token is dropped by one side only, or has another value."""
    rows, want = META["groups"][number]["rows"], GOLDEN[f"group/{number}"]
    got = np.asarray(apply(tuple(filters), GOLDEN["logits"], text))[rows]
    dropped = np.isneginf(want)
    with np.errstate(invalid="ignore"):
        off = np.abs(got - want) > CLOSE * np.maximum(np.abs(want), 1)
    return ((np.isneginf(got) != dropped) | (off & ~dropped)).any(axis=1).sum()


def test_every_filter_has_a_group_or_no_processor():
    assert set(SINGLE) | NONE == {each.__name__ for each in sampling.FILTERS} and not set(SINGLE) & NONE
    cases = {name: sum(len(META["groups"][n]["rows"]) for n in numbers) for name, numbers in SINGLE.items()}
    assert min(cases.values()) >= 50


@pytest.mark.parametrize("number", range(len(CHAINS)), ids=CHAINS)
def test_masks_and_values_are_those_of_transformers(number):
    chain = META["groups"][number]["chain"]
    assert differences([made(*each) for each in chain], number, text()) == 0
    assert len(META["groups"][number]["rows"]) >= 18


def shifted(text):
    """The prompt is not counted."""
    since = [row[start:] for row, start in zip(text.tokens, text.starts, strict=True)]
    tokens = np.stack([np.pad(row, (0, text.tokens.shape[1] - len(row))) for row in since])
    return text.replace(tokens=tokens, lengths=text.lengths - text.starts, starts=text.starts * 0)


BROKEN = {
    "temperature": lambda v: (sampling.temperature(1 / v), text()),
    "top_k": lambda v: (sampling.top_k(v + 1), text()),
    "top_p": lambda v: (sampling.top_p(1 - v), text()),
    "min_p": lambda v: (sampling.min_p(v / 2), text()),
    "typical": lambda v: (sampling.top_p(v), text()),
    "repetition_penalty": lambda v: (sampling.repetition_penalty(v), shifted(text())),
    "no_repeat_ngram": lambda v: (sampling.no_repeat_ngram(v + 1), text()),
    "bad_words": lambda v: (sampling.bad_words([row[:-1] or row for row in v]), text()),
    "sequence_bias": lambda v: (sampling.sequence_bias({tuple(ids): bias + 1e-4 for ids, bias in v}), text()),
    "min_length": lambda v: (sampling.min_length(v + 1), text()),
    "min_new_tokens": lambda v: (sampling.min_length(v), text()),
    "forced_first": lambda v: (sampling.forced_first(v), text(starts=GOLDEN["starts"] - 1)),
    "forced_last": lambda v: (sampling.forced_last(v), text(limits=GOLDEN["limits"] + 1)),
    "banned": lambda v: (sampling.banned(np.add(v, 1)), text()),
    "banned_first": lambda v: (sampling.banned(v), text()),
}
"""Twins that are off by one, have the wrong sign, or do not count the prompt."""


@pytest.mark.parametrize("name", SINGLE)
def test_a_broken_twin_is_found(name):
    found = 0
    for number in SINGLE[name]:
        each, broken = BROKEN[name](META["groups"][number]["chain"][0][1])
        found += differences([each], number, broken)
    assert found > 0
