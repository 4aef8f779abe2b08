"""docs/troubleshooting.md quotes messages as they are printed: each is raised here, by what the page says raises it."""

import inspect
import io
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, VOCAB, tiny

import kvjax
from kvjax import caches, cli, donating, sampling
from kvjax.caches import flags
from kvjax.templates import Template

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text("utf-8")
QUOTED = re.findall(r"^### `([^\n]*)`$", PAGE.split("\n## JAX")[0], re.MULTILINE)
BUNDLED = Path(kvjax.__file__).parent / "bundled" / "shakespeare"
CONFIG = json.loads((BUNDLED / "config.json").read_text("utf-8"))
MODEL = tiny(FULL)
IDS = np.arange(20).reshape(2, 10) % VOCAB
ONE = kvjax.init_cache(MODEL, batch=2, capacity=16)


def fed(plan=None, tokens=10):
    """A cache with tokens in it, nothing compiled: what is asked of it is refused before anything runs."""
    cache = kvjax.init_cache(MODEL, plan, batch=2, capacity=64)
    lengths = jnp.full((2,), tokens, jnp.int32)
    return cache.replace(lengths=lengths, written=lengths)


def flagged(bit):
    return lambda: ONE.replace(flags=jnp.array([bit, 0], jnp.int32)).check()


def shakespeare():
    return kvjax.load("shakespeare")


def folder(path, files):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return f"./{path.name}"


def changed(path, **keys):
    """The bundled model with other keys in its config.json, loaded."""
    (path / "model.safetensors").write_bytes((BUNDLED / "model.safetensors").read_bytes())
    return kvjax.load(folder(path, {"config.json": CONFIG | keys}))


def saved_for_another():
    kvjax.save_cache("talk.safetensors", ONE, MODEL)
    kvjax.load_cache("talk.safetensors", tiny(FULL, 1))


def told(*words):
    """The one line that a command ends with."""
    assert cli.main([*words, "--no-compile-cache"]) == 1


def without_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    kvjax.load("shakspeare")


def without_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    Template("{{ compiled_nowhere_before }}").render([{"role": "user", "content": "x"}])


RAISED = {
    "more do not fit: capacity": lambda: kvjax.prefill(MODEL, fed(), np.zeros((2, 60), int)),
    "past the capacity were dropped": flagged(flags.CAPACITY),
    "more pass the model's": lambda: kvjax.generate(shakespeare(), [[5] * 250], max_new_tokens=100),
    "behind the furthest token written": lambda: fed(caches.ring(16, slack=8), 40).rewind(20),
    "but the row has": lambda: fed().rewind(12),
    "resize: capacity": lambda: fed().resize(4),
    "the page pool was exhausted": flagged(flags.PAGES),
    "absorb=True": lambda: kvjax.init_cache(MODEL, caches.layer_input(absorb=True), capacity=16),
    "kinds for": lambda: kvjax.init_cache(MODEL, [caches.dense()] * 3, capacity=16),
    "is no kind of cache": lambda: kvjax.init_cache(MODEL, "dense", capacity=16),
    "is none of": lambda: caches.parse("rings(64)"),
    "keeps no '": lambda: fed().trace(0, "after_ffn"),
    "was not recorded": lambda: kvjax.resume(MODEL, fed(), layer=1, position=3),
    "recompute keeps no": lambda: fed(caches.recompute()).keys(0),
    "it was made for another": lambda: kvjax.prefill(shakespeare().model, ONE, IDS),
    "the vocabulary has": lambda: kvjax.prefill(MODEL, ONE, np.full((2, 3), 99)),
    "was outside the vocabulary": flagged(flags.TOKEN),
    "the columns of tokens": lambda: kvjax.prefill(MODEL, ONE, IDS, [30, 3]),
    "step: tokens": lambda: kvjax.step(MODEL, ONE, IDS),
    "has no tokenizer; give ids": lambda: kvjax.generate(MODEL, "ROMEO:"),
    "is a filter; wrap it": lambda: kvjax.generate(MODEL, [[1]], sampler=sampling.temperature(0.8)),
    "is out of range": lambda: sampling.temperature(-1.0),
    "a filter must give": lambda: sampling.greedy(lambda x, text: x[0])(jnp.zeros((2, 5)), None),
    "an algorithm chooses them itself": lambda: kvjax.generate(MODEL, [[1]], algorithm=kvjax.beam(2), seed=3),
    "no token may be chosen": flagged(flags.NO_TOKEN),
    "the model gave NaN logits": flagged(flags.NAN),
    "must lie between 0 and 4294967295": lambda: kvjax.generate(MODEL, [[1]], seed=-1),
    "attends to a source": lambda: kvjax.init_cache(kvjax.load("ar2en").model, capacity=16),
    "install the client": without_hub,
    "is no folder": lambda: kvjax.load("./no-such-folder"),
    "pickled weights": lambda path: kvjax.load(folder(path, {"config.json": CONFIG, "w.bin": ""})),
    "known are": lambda path: kvjax.load(folder(path, {"config.json": {"model_type": "walrus"}})),
    "the tensors do not fit": lambda path: changed(path, num_hidden_layers=3),
    "is refused": lambda path: changed(path, rope_scaling={"type": "dynamic", "factor": 2.0}),
    "unknown keys": lambda path: changed(path, new_option=1),
    "set JAX_ENABLE_X64": lambda: kvjax.load("shakespeare", dtype="float64"),
    "with other parameters": saved_for_another,
    "has no chat template:": lambda: told("chat", "--model", "shakespeare"),
    "kvjax[chat]": without_jinja,
    "is for a GPU or TPU": lambda: told("generate", "ROMEO:", "--weights", "int8"),
}
"""Part of a message: what raises it."""


def pattern(quoted):
    """What the page writes, as an expression: `…` is anything."""
    return re.sub(r"\\?…", ".+", re.escape(quoted))


def message(raises, tmp_path, monkeypatch, capsys):
    """What comes of it: the text of the error or of the warning, or what a command wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    given = {"path": tmp_path / "model", "monkeypatch": monkeypatch}
    given["path"].mkdir()
    try:
        raises(*(given[name] for name in inspect.signature(raises).parameters))
    except (kvjax.KvjaxError, UserWarning) as error:
        return " ".join(str(error).split())
    return capsys.readouterr().err.removeprefix("kvjax: error: ").strip()


def quoting(part):
    """The one message of the page with this part."""
    (found,) = [quoted for quoted in QUOTED if part in quoted]
    return found


@pytest.mark.parametrize("part", RAISED)
def test_a_message_is_raised_by_what_the_page_says(part, tmp_path, monkeypatch, capsys):
    said = message(RAISED[part], tmp_path, monkeypatch, capsys)
    assert re.fullmatch(pattern(quoting(part)), said), said


def test_every_message_of_the_page_is_raised_here_and_one_that_is_not_would_be_found(tmp_path, monkeypatch, capsys):
    assert len(QUOTED) == len(RAISED) >= 35
    assert {quoting(part) for part in RAISED} == set(QUOTED)
    said = message(RAISED["resize: capacity"], tmp_path, monkeypatch, capsys)
    assert not re.fullmatch(pattern(quoting("resize: capacity").replace("less", "more")), said)


@pytest.mark.parametrize(
    ("part", "raises"),
    [
        ("Array has been deleted", lambda cache: donating.step(MODEL, cache, [1, 2]) and cache.lengths + 1),
        ("__array__()", lambda cache: jax.jit(lambda c: c.check())(cache)),
        ("boolean conversion", lambda cache: jax.jit(lambda n: cache.resize(n))(32)),
        ("Non-hashable static", lambda cache: kvjax.decode(MODEL, cache, jnp.zeros((2, VOCAB)), steps=jnp.int32(2))),
    ],
)
def test_what_jax_says_is_quoted_by_its_words(part, raises):
    quoted = next(line for line in PAGE.splitlines() if line.startswith("### ") and part in line)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=pattern(quoted.strip("# `").rstrip(" …"))):
        raises(kvjax.init_cache(MODEL, batch=2, capacity=16))
