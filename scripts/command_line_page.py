"""Writes docs/command_line.md: every subcommand with its options, in the order of --help, and its examples.

python scripts/command_line_page.py
python scripts/command_line_page.py --check        (only whether the page is that of the parser)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pages

from kvjax.cli.options import build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "command_line.md"
INTRO = """# The command line

Written by `python scripts/command_line_page.py` from the parser of `kvjax`; `--help` after a command has the same.
`kvjax` and `python -m kvjax` are one. The examples run in `tests/test_command_line_page.py`, where `./a-chat-model`,
`scene.txt` and the like stand for what you have.

The commands that train and measure the bundled models are `python -m kvjax.train`, which has its own `--help`.
"""


def page() -> str:
    """The whole page."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {each.dest: each.help for each in commands._choices_actions}
    made = [INTRO, "## kvjax\n", *_parts(parser)]
    for name, command in commands.choices.items():
        made += [f"## kvjax {name}\n", f"{_sentence(helps[name])}\n", *_parts(command)]
    return "\n".join(made)


def _parts(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Tables of options, a group each; examples; and what the help says after them."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            title = {"positional arguments": "arguments"}.get(group.title or "", group.title)
            title = "commands" if isinstance(actions[0], argparse._SubParsersAction) else title
            yield f"| {title} | |\n|---|---|\n" + "".join(row for action in actions for row in _rows(action))
    examples, *rest = re.split(r"\n\n", (parser.epilog or "").strip())
    pairs = [re.split(r" {3,}", line.strip(), maxsplit=1) for line in examples.splitlines()[1:]]
    width = max(len(command) for command, *_ in pairs)
    lines = ("  # ".join([command.ljust(width), *what]).rstrip() for command, *what in pairs)
    yield "```sh\n" + "".join(f"{line}\n" for line in lines) + "```\n"
    for text in rest:
        title, _, body = text.partition(":\n")
        yield f"```text\n{text}\n```\n" if body.startswith("  ") else f"{text}\n"


def _rows(action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction):
        for each in action._choices_actions:
            yield f"| [`{each.dest}`](#kvjax-{each.dest}) | {each.help} |\n"
        return
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    value = f"[{value}]" if action.nargs == "?" and action.option_strings else value
    name = f"{', '.join(action.option_strings)} {value if action.nargs != 0 else ''}".strip()
    yield f"| `{name}` | {(action.help or '').replace('|', chr(92) + '|')} |\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def main() -> int:
    return pages.keep(__doc__, lambda: {PAGE: page()}, "python scripts/command_line_page.py")


if __name__ == "__main__":
    sys.exit(main())
