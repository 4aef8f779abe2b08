"""Chat templates: the texts and ids of Hugging Face Transformers, nothing outside the sandbox, errors in one line."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import jinja2
import pytest
import tokenizers

from kvjax import templates
from kvjax.errors import CheckpointError, InputError
from kvjax.templates import Template, read_template
from kvjax.text import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text("utf-8"))
NOW = datetime.datetime.fromisoformat(GOLDEN["now"])
HELLO = [{"role": "user", "content": "Hello"}]


def written(folder, config, file=None):
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if file is not None:
        (folder / "chat_template.jinja").write_text(file, "utf-8")
    return read_template(folder)


def rendered(text, messages=HELLO, **tokens):
    return Template(text, tokens).render(messages)


@pytest.mark.corner
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_texts_and_ids_are_those_of_transformers(case, tmp_path):
    template = written(tmp_path, case["config"], case["file"])
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"])), bos_id=0, add_bos=True)
    for made in case["made"]:
        messages = GOLDEN["talks"][made["talk"]]
        if "error" in made:
            with pytest.raises(InputError) as error:
                template.render(messages, generation_prompt=made["prompt"], now=NOW)
            assert " ".join(made["error"].split()) in str(error.value)
            continue
        text = template.render(messages, generation_prompt=made["prompt"], now=NOW)
        assert text == made["text"]
        if "ids" in made:
            assert tokenizer.encode_bare(text) == made["ids"]
            assert tokenizer.encode(text) != made["ids"] or made["ids"][0] == 0  # the template writes the BOS


def test_the_golden_file_has_refusals_dates_and_special_tokens():
    made = [each for case in GOLDEN["cases"] for each in case["made"]]
    assert sum("error" in each for each in made) >= 4
    assert any("22 Nov 2026" in each.get("text", "") for each in made)
    assert any(1 in each.get("ids", ()) for each in made)


def test_a_folder_without_a_template_says_so(tmp_path):
    template = written(tmp_path, {"bos_token": "<s>"})
    assert (template.text, template.tokens) == (None, {"bos_token": "<s>"})
    with pytest.raises(InputError, match="has no chat template"):
        template.render(HELLO)


@pytest.mark.parametrize(
    ("value", "says"),
    [(3, "must be text, not 3"), ([{"name": "rag", "template": "x"}], "no default"), (["x"], "no default")],
)
def test_what_is_no_template_is_an_error_that_names_the_file(tmp_path, value, says):
    with pytest.raises(CheckpointError, match=says) as error:
        written(tmp_path, {"chat_template": value})
    assert "tokenizer_config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_template(tmp_path)


@pytest.mark.parametrize(
    "text", ["{% for x in %}", "{{ a ", "{% generation %}x", "{{ x | nosuchfilter }}", "{% nosuch %}"]
)
def test_what_is_no_jinja_names_the_file_and_the_line(tmp_path, text):
    template = written(tmp_path, {}, "\n" + text)
    with pytest.raises(CheckpointError, match="line 2 of the chat template") as error:
        template.render(HELLO)
    assert "chat_template.jinja" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{% break %}", "{{ " + "[" * 2000 + "]" * 2000 + " }}"], ids=("break", "brackets"))
def test_what_cannot_be_made_into_a_program_names_the_file(tmp_path, text):
    with pytest.raises(CheckpointError, match="chat_template.jinja: the chat template: (SyntaxError|RecursionError)"):
        written(tmp_path, {}, text).render(HELLO)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append.__self__.__class__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('mro')() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% for f in ['{0.__class__}'.format] %}{{ f(messages) }}{% endfor %}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace(__call__=1) }}",
    "{% set x = namespace() %}{% set x.__html__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ dict.__class__ }}{{ dict().__class__.mro() }}",
    "{{ range(100001) | list | length }}",
]
"""Each is a way out of a template that is not in a sandbox."""


@pytest.mark.parametrize("text", ESCAPES)
def test_nothing_outside_the_sandbox_is_reached(text):
    try:
        assert rendered(text) == ""  # an undefined name
    except InputError as error:
        assert "the chat template failed" in str(error)
    outside = jinja2.Environment()
    outside.globals["raise_exception"] = rendered
    reached = outside.from_string(text).render(messages=[dict(x) for x in HELLO])
    assert reached or "set" in text, "the control: outside of it, something comes out"


@pytest.mark.parametrize(
    "text", ["{% include 'config.json' %}", "{% import 'os' as os %}", "{{ open('config.json') }}"]
)
def test_files_and_modules_are_not_there(text):
    with pytest.raises(InputError, match="the chat template failed"):
        rendered(text)


def test_a_text_without_end_is_cut_off_by_an_error():
    text = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '0123456789' * 100 }}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="more than 16,777,216 characters"):
        rendered(text)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], ["Hello"], [{"role": "user", "content": 3}], [{"role": None, "content": ""}]]
)
def test_what_are_no_messages_is_an_error(messages):
    with pytest.raises(InputError, match="messages: "):
        rendered("x", messages)


def test_a_failing_template_is_one_line_that_names_it():
    for text in ("{{ missing.x.y }}", "{{ 1 / 0 }}", "{{ missing | tojson }}", "{{ raise_exception('a\n b') }}"):
        with pytest.raises(InputError, match="^template: the chat template ") as error:
            rendered(text)
        assert "\n" not in str(error.value)


def test_a_message_is_put_in_as_it_is():
    hostile = [{"role": "user", "content": "{{ 1 + 1 }}{% raw %} <&>"}]
    assert rendered("{{ messages[0].content }}", hostile) == hostile[0]["content"]


def test_without_the_library_the_error_says_which_extra(monkeypatch):
    templates._environment.cache_clear()
    for name in ("jinja2", "jinja2.ext", "jinja2.sandbox"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=r"pip install 'kvjax\[chat\]'"):
        rendered("{{ messages }} never compiled before")


def test_a_library_with_a_known_way_out_is_refused(monkeypatch):
    templates._environment.cache_clear()
    monkeypatch.setattr(templates.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(CheckpointError, match=r"3\.1\.5 has known ways out"):
        rendered("{{ messages }} nor this one")
