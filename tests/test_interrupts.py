"""Ctrl-C in a process of its own: it ends with 130, in one line, and keeps what is done.

`translate` has its own in test_translate.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_chat

from kvjax import cli, sampling
from kvjax.loops.run import Run
from kvjax.strategies import OPERATIONS

BEGIN = """
import signal, sys, test_interrupts
from kvjax import cli, sampling
from kvjax.cli import compare_strategies, startup
from kvjax.strategies import runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a background job inherits ignores it
startup.load = compare_strategies.load = lambda name, dtype: test_interrupts.ENDLESS
runs.STRATEGIES, round = runs.STRATEGIES[:2], runs._Course.round
def told(course):
    print("a round", file=sys.stderr, flush=True)
    return round(course)
runs._Course.round = told
sys.exit(cli.main())
"""
FOREVER = 100_000
ENDLESS = dataclasses.replace(test_chat.LM, filters=(sampling.banned(range(len(test_chat.SPECIAL))),))
"""Never says that a text ends."""


def started(*argv):
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "KVJAX_COMPILE_CACHE": "off", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", BEGIN, *map(str, argv)], env=environment, text=True, **pipes)


@pytest.mark.full
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_text_that_streams_stays_and_its_figures_are_told(command):
    argv = ("generate", "Hi") if command == "generate" else ("chat",)
    with started(*argv, "--max-new-tokens", FOREVER) as ran:
        if command == "chat":
            ran.stdin.write("Hi\nWho\n")
        ran.stdin.close()
        ran.stdin = None
        first = ran.stdout.read(8)
        ran.send_signal(signal.SIGINT)
        rest, err = ran.communicate(timeout=60)
    assert ran.returncode == 130 and err.endswith("kvjax: interrupted\n") and "Traceback" not in err
    assert err.count("\n") == 2 and "new (stopped), " in err
    assert 8 <= len(first + rest) < FOREVER and rest.endswith("\n")


@pytest.mark.full
def test_a_comparison_keeps_its_whole_rounds():
    with started("compare", "--json", "--context", 14, "--tokens", 6, "--edit", 3, "--rounds", FOREVER) as ran:
        for _ in range(2 + 3 * 2):  # one each to compile, then three rounds of two
            assert ran.stderr.readline() == "a round\n"
        ran.send_signal(signal.SIGINT)
        out, err = ran.communicate(timeout=60)
    assert ran.returncode == 130 and err.endswith("kvjax: interrupted\n") and "Traceback" not in err
    made = json.loads(out)
    assert made["interrupted"] and [row["tokens"] for row in made["strategies"]] == ["equal", "equal"]
    rounds = {len(seconds) for row in made["strategies"] for seconds in row["seconds"].values()}
    assert len(rounds) == 1 and 2 <= rounds.pop() < FOREVER
    assert set(made["strategies"][0]["seconds"]) <= set(OPERATIONS)


@pytest.mark.parametrize("options", [("--json",), ("--json", "--samples", "2"), ("--samples", "2")])
def test_what_there_is_of_a_text_is_written_at_the_end_too(options, capsys, monkeypatch):
    chunks = Run.chunks

    def interrupted(self, n):
        for i, run in enumerate(chunks(self, n)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield run

    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")
    monkeypatch.setattr("kvjax.cli.startup.load", lambda name, dtype: ENDLESS)
    monkeypatch.setattr(Run, "chunks", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code = cli.main(["generate", "Hi", "--max-new-tokens", "60", *options])
    out, err = capsys.readouterr()
    assert code == 130 and err.endswith("kvjax: interrupted\n") and signal.getsignal(signal.SIGINT) is before
    if "--json" in options:
        made = json.loads(out)
        assert err.count("\n") == 1 and made["stop"] == "stopped" and 0 < len(made["new_ids"]) < 60
    else:
        assert re.findall(r"--- seed (\d) \(stopped\)", out) == ["0", "1"] and "new (stopped)" in err
