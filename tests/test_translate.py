"""`kvjax translate`: candidates with scores, lines in batches and in order, what is done stays done."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from models import ONE_LAYER, tiny

import kvjax
from kvjax import cli
from kvjax.cli.translate_text import candidates_of
from kvjax.ops.positions import Learned
from kvjax.text import Tokenizer
from kvjax.timing import Compilations

LETTERS = "abcdefghijklmnopqrstuvwxyzمحد\n "
ENCODER = dataclasses.replace(ONE_LAYER, positions=Learned(24), max_positions=24, tied=True)
CONFIG = dataclasses.replace(ONE_LAYER, positions=Learned(64), max_positions=64, encoder=ENCODER)
NAMES = ["anna", "bert", "", "محمد", "eva", "fritz", "gerd"]


def transliterator():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(LETTERS)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return kvjax.LM(
        tiny(CONFIG), Tokenizer(backend, vocab_size=96), "toy", eos_ids=tuple(range(32, 96)), start_ids=(95,)
    )


LM = transliterator()


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command in this process on a random model: `code, stdout, stderr`."""
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")
    monkeypatch.setattr("kvjax.cli.startup.load", lambda name, dtype: LM)

    def run(*argv):
        code = cli.main(["translate", *(str(a) for a in argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeff" + "\r\n".join(NAMES), "utf-8")
    return file


@functools.cache
def searched():
    """The candidates of each name, without the command; batches of three, which share programs with those of it."""
    beam, texts = kvjax.beam(4, returned=4), [name for name in NAMES if name]
    made = [kvjax.generate(LM, texts[i : i + 3], algorithm=beam).candidates for i in (0, 3)]
    return dict(zip(texts, made[0] + made[1], strict=True))


def wanted(name):
    """Its lines of standard output."""
    return [(" ".join(x.text.split()), f"{x.score:.4f}") for x in searched()[name]]


BEST = ("--batch", 3)
"""Options for one line a line, in the shape that these tests share."""


def best(names=NAMES):
    return [wanted(name)[0] if name else ("",) for name in names]


def pairs(out):
    return [tuple(line.split("\t")) for line in out.splitlines()]


def test_a_text_gives_its_candidates_with_scores_best_first(command):
    texts = ("محمد", "anna", "eva")
    code, out, err = command(*texts)
    assert code == 0 and [pairs(part) for part in out.split("\n\n")] == [wanted(text) for text in texts]
    assert [len(wanted(text)) for text in texts] == [4] * 3
    assert err.count("\n") == 1 and "3 sources" in err and "4 beams" in err
    assert pairs(command(*texts, "--candidates", 1)[1].replace("\n\n", "\n")) == best(texts)


def test_json_is_one_object_a_source(command):
    texts = ("محمد", "anna", "eva")
    code, out, err = command(*texts, "--json")
    assert (code, err) == (0, "")
    for line, source in zip(out.splitlines(), texts, strict=True):
        made = json.loads(line)
        assert made["source"] == source and set(made) == {"source", "candidates"}
        assert [x["text"] for x in made["candidates"]] == [x.text for x in searched()[source]]
        assert [x["score"] for x in made["candidates"]] == [pytest.approx(x.score) for x in searched()[source]]
    short = [json.loads(x) for x in command(*texts, "--json", "--max-new-tokens", 1)[1].splitlines()]
    assert all(len(x["text"]) <= 1 for row in short for x in row["candidates"])


def test_lines_come_in_order_one_each(command, names, monkeypatch):
    code, out, _ = command("--file", names, *BEST)
    assert code == 0 and pairs(out) == best()
    with Compilations() as made:
        command("--file", names, *BEST)
    assert made.count == 0, "the last batch, of one line, and that with a blank one are as large as the others"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(NAMES).encode()), "utf-8"))
    assert command(*BEST)[1] == out


@pytest.mark.full
def test_the_batch_and_the_kinds_change_nothing(command, names):
    kinds = ("--cache", "paged(8, share=4)", "--cross", "encoder_output(absorb=True)")
    for options in ((), (*BEST, *kinds)):
        assert [x for x, *_ in pairs(command("--file", names, *options)[1])] == [x for x, *_ in best()]


def test_what_is_wrong_is_said_in_one_line(command, names, tmp_path, monkeypatch):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"anna\nbert\neva\nanna\nx\xff\n")
    long = tmp_path / "long.txt"
    long.write_text("anna\nbert\neva\nanna\n" + "a" * 25 + "\n")
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    for argv, message, lines in (
        (["anna", "--file", names], "either TEXT or --file", 0),
        (["anna", "-"], "goes with no other TEXT", 0),
        (["anna", " "], "TEXT 2 is empty", 0),
        ([], "nothing to translate", 0),
        (["anna", "--candidates", 5], "--candidates 5 is more than --beams 4", 0),
        (["--file", tmp_path / "none"], "cannot read", 0),
        (["--file", bad, *BEST], "line 5 of .*bad.txt is not UTF-8", 4),
        (["--file", long, *BEST], "line 5 of .*long.txt has 25 tokens, the encoder has 24 positions", 4),
    ):
        code, out, err = command(*argv)
        assert (code, err.count("\n"), out.count("\n")) == (1, 1, lines)
        assert re.search(message, err), err
    monkeypatch.setattr("kvjax.cli.startup.load", lambda name, dtype: kvjax.LM(tiny(ONE_LAYER), name="plain"))
    assert "'plain' has no encoder, it continues a text: kvjax generate" in command("anna")[2]


def test_what_was_done_before_an_interrupt_or_a_closed_pipe_is_out(command, names, monkeypatch):
    for error, code in ((KeyboardInterrupt, 130), (BrokenPipeError, 141)):
        runs = iter([candidates_of, candidates_of, functools.partial(fail, error)])
        monkeypatch.setattr("kvjax.cli.translate_text.candidates_of", lambda *a, runs=runs: next(runs)(*a))
        ended, out, _ = command("--file", names, *BEST)
        assert ended == code and pairs(out) == best(NAMES[:6])


def fail(error, *args):
    raise error


def test_a_bar_shows_on_a_terminal_and_nowhere_else(command, names, monkeypatch):
    assert "\r" not in command("--file", names, *BEST)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = command("--file", names, *BEST)
    assert code == 0 and "7/7" in err and "\r" in err and pairs(out) == best()


@pytest.mark.full
def test_a_real_interrupt_loses_nothing_that_was_done(tmp_path):
    script = (
        "import signal, sys, test_translate; from kvjax import cli; from kvjax.cli import startup;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # what a background job inherits ignores it
        "startup.load = lambda name, dtype: test_translate.LM; sys.exit(cli.main())"
    )
    file = tmp_path / "names.txt"
    file.write_text("anna\nbert\n" * 20_000)
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "KVJAX_COMPILE_CACHE": "off", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    argv = [sys.executable, "-c", script, "translate", "--file", str(file), "--batch", "3"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as ran:
        first = [ran.stdout.readline() for _ in range(2)]  # written while the rest is still to come
        ran.send_signal(signal.SIGINT)
        lines, err = first + ran.stdout.readlines(), ran.stderr.read()
    assert ran.returncode == 130 and err.endswith("kvjax: interrupted\n")
    assert 3 <= len(lines) < 40_000 and lines == (first * len(lines))[: len(lines)]
