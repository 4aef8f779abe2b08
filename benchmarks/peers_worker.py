"""What the workers of `peers.py` share. A worker runs one peer in the peer's own environment; standard library only.

It reads a line of JSON a command, `{"do": name, ...arguments}`, and writes one, `{"result": …}` or `{"error": …}`.
Times are taken around the peer's call alone; what else it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(peer: Any) -> None:
    """Answers commands, which are methods of a peer, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": getattr(peer, asked.pop("do"))(**asked)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    made = run()
    return time.perf_counter() - began, made


class Worker:
    """The driver's end of one.

    Args:
        python: interpreter of the peer's environment.
        script: beside this file.
    """

    def __init__(self, python: Path, script: str):
        path = Path(__file__).resolve().parent / script
        pipe = subprocess.PIPE
        self._script = script
        self._process = subprocess.Popen([python, path], stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def ask(self, do: str, **arguments: Any) -> Any:
        """One command.

        Raises:
            RuntimeError: the worker ended, or says what went wrong.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script}: ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self._script}: {do}\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()
