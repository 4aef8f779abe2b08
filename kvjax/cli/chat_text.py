"""`kvjax chat`: messages go in, replies stream out, and each says what it had to feed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.cli.startup import interruptible, load_lm, one_line
from kvjax.cli.translate_text import decoded
from kvjax.cli.write_text import sampler_of
from kvjax.errors import InputError, KvjaxError
from kvjax.lm import LM
from kvjax.loops.conversation import Conversation, Reply, Turn
from kvjax.templates import read_text

HELP = "/retry  /edit N TEXT  /undo  /show  /quit; // begins a message with a slash"


def run(args: argparse.Namespace) -> None:
    """Talks as the arguments say; text, or one JSON object a reply, on stdout."""
    if sys.stdin is None:
        raise InputError("chat: standard input is closed; messages come from there")
    lm = load_lm(args)
    session = Session(conversation(lm, args), as_json=args.json)
    typed = sys.stdin.isatty()
    if typed:
        _note(HELP)
    for line in _typed() if typed else _read():
        if not line.strip():
            continue
        try:
            if not session.obey(line):
                return
            if session.stopped and not typed:
                raise KeyboardInterrupt
        except (KvjaxError, KeyboardInterrupt) as error:
            if not typed:  # a script must not go on as if nothing had been
                raise
            _note(f"kvjax: {f'error: {one_line(str(error))}' if isinstance(error, KvjaxError) else 'interrupted'}")


def conversation(lm: LM, args: argparse.Namespace) -> Conversation:
    """As the arguments say.

    Raises:
        InputError: the model has no chat template, and none is given, or it has an encoder.
        CheckpointError: a template that cannot be read, or is no jinja2.
    """
    if lm.model.encode is not None:
        raise InputError(f"chat: model {lm.name!r} has an encoder: kvjax translate --model {args.model}")
    template = lm.template
    if args.template is not None:
        template = dataclasses.replace(template, text=read_text(Path(args.template)), where=args.template)
    if template.text is None:
        raise InputError(
            f"chat: model {lm.name!r} has no chat template: a base model continues a text, as kvjax generate --model "
            f"{args.model} does; --template FILE gives it one"
        )
    return Conversation(
        lm,
        system=args.system,
        sampler=sampler_of(args),
        seed=args.seed,
        plan=args.cache,
        max_new_tokens=args.max_new_tokens,
        template=template,
    )


class Session:
    """A conversation at the command line.

    Args:
        talk: to begin with.
        as_json: replies are JSON objects.
    """

    def __init__(self, talk: Conversation, *, as_json: bool):
        self.talk = talk
        self._as_json = as_json
        self._commands: dict[str, Callable[[str], None]] = {
            "/retry": self._retry,
            "/edit": self._edit,
            "/undo": self._undo,
            "/show": self._show,
            "/help": lambda rest: _note(HELP),
        }

    @property
    def stopped(self) -> bool:
        """Whether the last reply was interrupted."""
        return bool(self.talk.turns) and self.talk.turns[-1].stop == "stopped"

    def obey(self, line: str) -> bool:
        """Does what a line says; False when it says to end.

        Raises:
            InputError: an unknown command, no such turn, or what `Conversation.say` raises.
        """
        word, _, rest = line.partition(" ")
        if word.strip() == "/quit":
            return False
        if not line.startswith("/") or line.startswith("//"):
            self._answer(self.talk.say(line[line.startswith("/") :]))
        elif word.strip() in self._commands:
            self._commands[word.strip()](rest.strip())
        else:
            raise InputError(f"chat: there is no command {word}; {HELP}")
        return True

    def _retry(self, rest: str) -> None:
        self._answer(self.talk.retry())

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        turns = len(self.talk.turns)
        if not number.isdecimal() or not 1 <= int(number) <= turns or not text.strip():
            raise InputError(f"chat: /edit takes a turn from 1 to {turns}, and its new message, not {rest!r}")
        self._answer(self.talk.edit(int(number) - 1, text))

    def _undo(self, rest: str) -> None:
        self.talk = self.talk.undo()
        _note(f"turns: {len(self.talk.turns)}")

    def _show(self, rest: str) -> None:
        number = 0
        for message in self.talk.messages:
            number += message["role"] == "user"
            _note(f"{number or '-'} {message['role']}: {message['content']}")

    def _answer(self, reply: Reply) -> None:
        last = "\n"
        with interruptible(reply.stop):
            try:
                for piece in reply:
                    if not self._as_json:
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                        last = piece[-1]
            finally:
                sys.stdout.write("" if last == "\n" else "\n")
        self.talk = reply.result()
        if self._as_json:
            sys.stdout.write(json.dumps(report(self.talk)) + "\n")
        sys.stdout.flush()
        if not self._as_json:
            _note(_figures(self.talk))


def report(talk: Conversation) -> dict[str, Any]:
    """What `--json` prints of the last turn."""
    turn = talk.turn(-1)
    return {
        "role": "assistant",
        "turn": len(talk.turns),
        "text": turn.reply,
        "stop": turn.stop,
        "tokens": {"reused": turn.reused, "fed": turn.fed, "new": len(turn.new)},
        "timings": {**dataclasses.asdict(turn.timings), "tokens_per_second": _speed(turn)},
        "cache_bytes": talk.nbytes,
    }


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (a line can be edited, and lines before it brought back)
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return


def _read() -> Iterator[str]:
    for line in decoded(getattr(sys.stdin, "buffer", sys.stdin), "standard input"):
        yield line.text


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _speed(turn: Turn) -> float | None:
    seconds = turn.timings.decode
    return len(turn.new) / seconds if turn.new and seconds > 0 else None


def _figures(talk: Conversation) -> str:
    turn = talk.turn(-1)
    speed = _speed(turn)
    return (
        f"[{len(talk.turns)}] {turn.reused:,} of {len(turn.prompt):,} tokens reused, {turn.fed:,} fed, "
        f"{len(turn.new):,} new ({turn.stop}), compile {turn.timings.compile:.2f} s, prefill "
        f"{turn.timings.prefill:.3f} s, {'-' if speed is None else f'{speed:,.0f}'} tokens/s, caches "
        f"{talk.nbytes:,} bytes"
    )


__all__ = ["run", "conversation", "report", "Session"]
