"""The arguments of every subcommand, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, NoReturn

import kvjax
from kvjax import caches
from kvjax.cli import chat_text, compare_strategies, describe_model, translate_text, write_text
from kvjax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")

TOP = """examples:
  kvjax generate "ROMEO:"                      text from the bundled model
  kvjax generate --help                        everything else that it takes
  kvjax chat --model ./a-chat-model            a conversation, with a model that was tuned for it
  kvjax translate "محمد"                       an Arabic name in English letters, with scores
  kvjax info shakespeare                       what a model is, and what its caches cost
  kvjax compare                                what could be kept of a text, side by side

exit codes: 0, 1 for an error, 2 for wrong usage, 130 when interrupted
Compiled programs are kept in the user's cache folder; KVJAX_COMPILE_CACHE=off keeps none, a path
moves them, and JAX_COMPILATION_CACHE_DIR is respected.
"""

GENERATE = """examples:
  kvjax generate "ROMEO:"
  kvjax generate "ROMEO:" --temperature 0 --max-new-tokens 200       greedy
  kvjax generate "Once" --model ./stories260K --seed 7 --top-p 0.9   a Hugging Face folder
  kvjax generate "ROMEO:" --cache 'ring(128, sinks=4)'               memory that does not grow
  kvjax generate "ROMEO:" --stop JULIET: --samples 3                 three texts, each up to a name
  kvjax generate "ROMEO:" --draft shakespeare-draft                  several tokens a call, the same law
  kvjax generate --prompt-file scene.txt --json                      one JSON object
  cat scene.txt | kvjax generate -                                   the prompt from standard input

The text after the prompt goes to standard output as it is made, then one line of figures to
standard error. A prompt is taken exactly, its last line break included; without one the model
begins a text of its own.
"""

CHAT = """examples:
  kvjax chat --model ./a-chat-model
  kvjax chat --model ./a-chat-model --system "Answer in verse." --temperature 0
  kvjax chat --model ./a-chat-model --cache 'ring(4096, sinks=4)' --seed 7
  kvjax chat --model ./a-base-model --template chat.jinja       a template of one's own
  kvjax chat --model ./a-chat-model --json < messages.txt       one message a line, one JSON object a reply

at the prompt, or in a line:
  /retry          another reply to the last message
  /edit N TEXT    another N-th message; what followed it is dropped
  /undo           drops the last turn
  /show           the conversation so far
  /help, /quit    // begins a message with a slash

What was fed stays in the cache: a turn feeds only what is new. Replies go to standard output as they
are made, then one line of figures to standard error. Ctrl-C ends a reply and keeps what there is of it;
at the prompt it ends the program.
"""

TRANSLATE = """examples:
  kvjax translate "محمد"                                   candidates with scores, best first
  kvjax translate "محمد" "فاطمة" --beams 8 --candidates 3
  kvjax translate --file names.txt > english.txt           the best of each line, in the same order
  cat names.txt | kvjax translate --json                   one JSON object a line
  kvjax translate "Hello" --model ./opus-mt-en-de --cross 'encoder_output(absorb=True)'

A candidate and its score stand on one line, a tab between; the score is the mean log-probability
of its tokens. Lines of a file or of standard input are translated in batches, and what is done is
written at once. A blank line gives a blank line.
"""

INFO = """examples:
  kvjax info shakespeare
  kvjax info ./stories260K --dtype bfloat16
  kvjax info shakespeare --json

Reads config.json and the headers of the weights, not the weights. Bytes are of one row.
"""


COMPARE = """examples:
  kvjax compare
  kvjax compare --no-rotation                   absorption too, on a random model of the same shape
  kvjax compare ar2en                           a model with an encoder: what is kept of a source
  kvjax compare --encoder                       the same on a random model of the default's shape
  kvjax compare ./stories260K --batch 8 --context 400 --tokens 64
  kvjax compare --json > figures.json

Keeps of a text nothing, keys and values, each layer's input (keys and values made again, or
absorbed), the outputs of all layers, or both: bytes and FLOPs predicted and found, time of a
decoded token, of going back, exchanging rows, editing and resuming, and whether the tokens are equal.
Of a model with an encoder also its output, projected once, absorbed or projected again, the outputs
of all sub-layers, and the textbook's example with the figures that are often said of it.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves the examples as they are written."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(2, f"kvjax: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; `args.run` is the function to call with what it gives."""
    about = "Transformer decoding in JAX where the KV cache is a value."
    parser = Parser(prog="kvjax", epilog=TOP, description=about)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    generate = commands.add_parser("generate", epilog=GENERATE, help="continue a prompt")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - reads standard input")
    _model(generate, "--model")
    add = generate.add_argument
    add("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    _drawing(generate, least=0)
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given more than once")
    add("--samples", type=_whole(1), default=1, metavar="N", help="texts, with seeds S, S + 1, … (default 1)")
    add("--logprobs", type=_whole(0), metavar="K", help="with --json: log-probabilities, also of the K most probable")
    drafts = generate.add_mutually_exclusive_group()
    drafts.add_argument("--draft", metavar="MODEL", help="a smaller model drafts several tokens for each call")
    what = "what followed the same N tokens earlier drafts (default 3)"
    drafts.add_argument("--lookup", type=_whole(1), nargs="?", const=3, metavar="N", help=what)
    drafts.add_argument("--early-exit", type=_whole(1), metavar="L", help="the model's own first L layers draft")
    add("--json", action="store_true", help="one JSON object instead of text and figures")
    _common(generate, write_text.run)

    chat = commands.add_parser("chat", epilog=CHAT, help="talk with a model that was tuned for it")
    _model(chat, "--model")
    add = chat.add_argument
    add("--system", metavar="TEXT", help="the system message (default: none, or the template's own)")
    add("--template", metavar="FILE", help="a chat template in place of the model's own")
    _drawing(chat, least=1)
    add("--json", action="store_true", help="one JSON object a reply instead of text and figures")
    _common(chat, chat_text.run)

    translate = commands.add_parser("translate", epilog=TRANSLATE, help="translate source texts, by beam search")
    add = translate.add_argument
    add("text", nargs="*", metavar="TEXT", help="source texts; without one, or for -, lines of standard input")
    _model(translate, "--model", "ar2en")
    add("--file", metavar="FILE", help="translate the lines of a UTF-8 file")
    add("--beams", type=_whole(1), default=4, metavar="W", help="width of the search (default 4)")
    add("--candidates", type=_whole(1), metavar="N", help="how many of a source (default: all beams, 1 for lines)")
    add("--max-new-tokens", type=_whole(1), metavar="N", help="how many at most (default: 128, or twice the source)")
    add("--batch", type=_whole(1), default=32, metavar="B", help="sources at a time (default 32)")
    _dtype(translate)
    add("--cache", type=_cache, metavar="KIND", help=f"{_kinds()}; default: what suits the model")
    add("--cross", type=_cross, metavar="KIND", help=f"what is kept of the source; {_cross_kinds()}")
    add("--json", action="store_true", help="one JSON object a source")
    _common(translate, translate_text.run)

    info = commands.add_parser("info", epilog=INFO, help="what a model is, and what its caches cost")
    _model(info, "model")
    _dtype(info)
    info.add_argument("--json", action="store_true", help="one JSON object")
    _common(info, describe_model.run)

    compare = commands.add_parser("compare", epilog=COMPARE, help="what could be kept of a text, side by side")
    _model(compare, "model")
    add = compare.add_argument
    add("--tokens", type=_whole(1), metavar="N", help="new tokens decoded in a round (default 32, if there is room)")
    add("--context", type=_whole(1), metavar="T", help="tokens before them (default: up to 512 with them)")
    add("--batch", type=_whole(1), default=2, metavar="B", help="rows (default 2)")
    add("--edit", type=_whole(1), default=8, metavar="K", help="tokens that an edit goes back (default 8)")
    add("--rounds", type=_whole(1), default=5, metavar="R", help="of timing, in turn (default 5)")
    add("--source", type=_whole(1), metavar="S", help="tokens of a source, with an encoder (default: as the context)")
    add("--sources", type=_whole(1), metavar="R", help="sources that the rows share evenly (default: one a row)")
    like = compare.add_mutually_exclusive_group()
    like.add_argument("--no-rotation", action="store_true", help="a random model of this shape, learned positions")
    like.add_argument("--encoder", action="store_true", help="the same with an encoder of this shape")
    _dtype(compare)
    output = compare.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object")
    output.add_argument("--markdown", action="store_true", help="tables in Markdown")
    _common(compare, compare_strategies.run)
    return parser


def _model(parser: argparse.ArgumentParser, name: str, default: str = "shakespeare") -> None:
    where = f"bundled name, Hugging Face folder, or hub id (default {default})"
    positional: dict[str, Any] = {} if name.startswith("-") else {"nargs": "?"}
    parser.add_argument(name, default=default, metavar="MODEL", help=where, **positional)


def _drawing(parser: argparse.ArgumentParser, least: int) -> None:
    add, fewer = parser.add_argument, "how many at most (default: 128, or fewer if no room)"
    add("--max-new-tokens", type=_whole(least), metavar="N", help=fewer)
    add("--temperature", type=_real(0), default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    add("--top-k", type=_whole(0, 2**31 - 1), default=0, metavar="K", help="only the K most probable (default 0: all)")
    add("--top-p", type=_real(0, 1), default=1.0, metavar="P", help="only the most probable up to P (default 1: all)")
    add("--min-p", type=_real(0, 1), default=0.0, metavar="P", help="at least P times the most probable (default 0)")
    add("--repetition-penalty", type=_real(1e-6), default=1.0, metavar="R", help="over 1: repeats less (default 1)")
    add("--seed", type=_whole(0, 0xFFFFFFFF), default=0, metavar="S", help="the same seed, the same text (default 0)")
    _dtype(parser)
    add("--cache", type=_cache, metavar="KIND", help=f"{_kinds()}; default: what suits the model")


def _dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters and cache (default: float32 on a CPU)")


def _common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument("--no-compile-cache", dest="compile_cache", action="store_false", help="keep nothing compiled")
    parser.add_argument("--debug", action="store_true", help="a traceback with every error")
    parser.set_defaults(run=run)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    return _number(int, "a whole number", least, most)


def _real(least: float, most: float | None = None) -> Callable[[str], float]:
    return _number(float, "a number", least, most)


def _number(kind: Callable[[str], Any], what: str, least: float, most: float | None) -> Callable[[str], Any]:
    bounds = f"{what} of {least} or more" if most is None else f"{what} from {least} to {most}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value != value or value in (math.inf, -math.inf) or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} must be {bounds}")
        return value

    return read


def _cache(text: str) -> Any:
    return _parsed(text, caches.Kind, _kinds())


def _cross(text: str) -> Any:
    return _parsed(text, caches.CrossKind, _cross_kinds())


def _parsed(text: str, kind: type, known: str) -> Any:
    try:
        found = caches.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(found, kind):
        raise argparse.ArgumentTypeError(f"{text!r} is for something else; {known}")
    return found


def _cross_kinds() -> str:
    return "kinds: " + ", ".join(kind.__name__ for kind in caches.CROSS_KINDS)


def _kinds() -> str:
    return "kind of cache as in Python, 'ring(1024, sinks=4)'; kinds: " + ", ".join(k.__name__ for k in caches.KINDS)


def _version() -> str:
    jax, flax = (metadata.version(name) for name in ("jax", "flax"))
    return f"kvjax {kvjax.__version__} (jax {jax}, flax {flax}, Python {platform.python_version()}, {sys.platform})"


__all__ = ["build_parser"]
