"""docs/command_line.md is that of the parser, its examples run, and every command has the same options in one order."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_cli import write_folder

import kvjax
from kvjax import cli
from kvjax.cli.options import build_parser
from kvjax.strategies import STRATEGIES, WITH_SOURCE
from kvjax.testing import quick

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "command_line.md").read_text("utf-8")
EXAMPLES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMMANDS = ("generate", "chat", "translate", "info", "compare", "estimate", "doctor")
SMALLER = {
    "generate": ["--max-new-tokens", "4"],
    "chat": ["--max-new-tokens", "4"],
    "translate": ["--max-new-tokens", "2", "--beams", "4"],
    "compare": ["--context", "4", "--tokens", "2", "--edit", "2", "--rounds", "1", "--batch", "2"],
}
"""Appended: the last one counts."""


def options():
    """Of each command, its options without those of one form, in order."""
    (commands,) = (each for each in build_parser()._actions if hasattr(each, "choices") and each.dest == "command")
    return {
        name: [each for each in parser._actions if each.dest != "help"] for name, parser in commands.choices.items()
    }


def test_the_page_is_that_of_the_parser(monkeypatch, capsys):
    script = ROOT / "scripts" / "command_line_page.py"
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("command_line_page", script)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    monkeypatch.setattr(sys, "argv", [script.name, "--check"])
    assert page.main() == 0, capsys.readouterr().err
    monkeypatch.setattr(page, "INTRO", "# Another\n")
    assert page.main() == 1


def test_an_option_of_several_commands_is_one_option_everywhere_and_stands_in_one_order():
    found = options()
    assert tuple(found) == COMMANDS
    assert all(actions[-1].dest == "debug" and any(x.dest == "json" for x in actions) for actions in found.values())
    places: dict[str, tuple] = {}
    for name, actions in found.items():
        for each in actions:
            if not each.option_strings:
                continue
            # What a model is called and how many tokens there may be has another default where that is better.
            meaning = (each.option_strings, each.metavar, each.nargs, each.choices and tuple(each.choices))
            assert places.setdefault(each.dest, meaning) == meaning, (name, each.dest)
            assert each.help and not each.help.endswith("."), (name, each.dest)
    orders = [[x.dest for x in actions if x.option_strings] for actions in found.values()]
    before = {(a, b) for order in orders for i, a in enumerate(order) for b in order[i + 1 :]}
    assert [pair for pair in before if pair[::-1] in before] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_of_the_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"examples:\n  kvjax {name}" in out and "--json" in out
    assert max(map(len, out.splitlines())) <= 105


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the examples name, and the model that speaks in all of them."""
    place = tmp_path_factory.mktemp("examples")
    for name in ("stories260K", "a-model", "a-chat-model"):
        write_folder(place / name)
    bundled = Path(kvjax.__file__).parent / "bundled"
    shutil.copytree(bundled / "ar2en", place / "opus-mt-en-de")
    config = json.loads((bundled / "shakespeare" / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    settings = place / "a-chat-model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    files = {"scene.txt": "ROMEO:", "names.txt": "محمد\nفاطمة\n", "messages.txt": "Hi\nWho\n", "chat.jinja": template}
    for name, text in files.items():
        (place / name).write_text(text, "utf-8")
    return place, kvjax.load(place / "a-chat-model")


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_run(name, folder, monkeypatch, capsys):
    place, lm = folder
    monkeypatch.chdir(place)
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")
    monkeypatch.setattr(quick, "quick", [])
    monkeypatch.setattr("kvjax.strategies.runs.STRATEGIES", STRATEGIES[1:2])
    monkeypatch.setattr("kvjax.strategies.runs.WITH_SOURCE", WITH_SOURCE[1:2])
    if name != "translate":  # one tiny model: that the real ones speak is tested elsewhere
        for module in ("startup", "write_text", "compare_strategies"):
            monkeypatch.setattr(f"kvjax.cli.{module}.load", lambda source, dtype: lm)
    ran = 0
    for line in (each for each in EXAMPLES if re.search(r"kvjax (\w+)", each).group(1) == name):
        piped, _, command = line.rpartition("| ")
        _, *argv = shlex.split(re.sub(r"\s+# .*| > \S+", "", command))
        source = piped.split()[1] if piped else argv[argv.index("<") + 1] if "<" in argv else None
        argv = argv[: argv.index("<")] if "<" in argv else argv
        plots = "--plot" in argv and importlib.util.find_spec("matplotlib") is None
        if plots or argv == ["estimate"]:  # which measures, in test_estimate.py
            continue
        text = Path(source).read_bytes() if source else b"Hi\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        code = cli.main([*argv, *SMALLER.get(name, [])])
        out, err = capsys.readouterr()
        assert code == 0 and out, f"{line}\n{err}"
        if "--json" in argv:
            assert all(isinstance(json.loads(each), dict) for each in out.splitlines())
            assert out.count("\n") == (2 if source else 1)
        ran += 1
    assert ran
