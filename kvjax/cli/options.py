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
from kvjax.cli import (
    chat_text,
    check_machine,
    compare_strategies,
    describe_model,
    estimate_costs,
    translate_text,
    write_text,
)
from kvjax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")

TOP = """examples:
  kvjax generate "ROMEO:"                      text from the bundled model
  kvjax generate --help                        everything else that it takes
  kvjax chat --model ./a-chat-model            a conversation, with a model that was tuned for it
  kvjax translate "محمد"                       an Arabic name in English letters, with scores
  kvjax info shakespeare                       what a model is, and what its caches cost
  kvjax compare                                what could be kept of a text, side by side
  kvjax estimate ./config.json --device T4     what fits there, and how fast it can be
  kvjax doctor                                 whether all is well on this machine

What is asked for goes to standard output; figures, warnings, errors and, on a terminal, progress go
to standard error, without colours. With --json standard output is one JSON object, or one a line
from chat and translate; an error is a line on standard error then, too.

exit codes: 0, 1 for an error, 2 for wrong usage, 130 when interrupted, 141 when nobody reads on

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
begins a text of its own. Ctrl-C ends the text and keeps what there is of it, with --json and
--samples too.
"""

CHAT = """examples:
  kvjax chat --model ./a-chat-model
  kvjax chat --model ./a-chat-model --system "Answer in verse." --temperature 0
  kvjax chat --model ./a-chat-model --cache 'ring(4096, sinks=4)' --seed 7
  kvjax chat --model ./a-base-model --template chat.jinja       a template of one's own
  kvjax chat --model ./a-chat-model --json < messages.txt       a message a line, a JSON object a reply

at the prompt, or in a line:
  /retry          another reply to the last message
  /edit N TEXT    another N-th message; what followed it is dropped
  /undo           drops the last turn
  /show           the conversation so far
  /help, /quit    // begins a message with a slash

What was fed stays in the cache: a turn feeds only what is new. Replies go to standard output as they
are made, then one line of figures to standard error. Ctrl-C ends a reply and keeps what there is of
it; at the prompt, or where messages come from a file, it ends the program.
"""

TRANSLATE = """examples:
  kvjax translate "محمد"                                   candidates with scores, best first
  kvjax translate "محمد" "فاطمة" --beams 8 --candidates 3
  kvjax translate --file names.txt > english.txt           the best of each line, in the same order
  cat names.txt | kvjax translate --json                   one JSON object a line
  kvjax translate "Hello" --model ./opus-mt-en-de --cross 'encoder_output(absorb=True)'

A candidate and its score stand on one line, a tab between; the score is the mean log-probability
of its tokens. Lines of a file or of standard input are translated in batches, and what is done is
written at once, so that Ctrl-C loses nothing of it. A blank line gives a blank line.
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
of all sub-layers, and the textbook's example with the figures that are often said of it. Ctrl-C
keeps the rounds of timing that are whole.
"""

ESTIMATE = """examples:
  kvjax estimate                                       the bundled model on this machine, measured
  kvjax estimate ./config.json --device T4 --batch 8 --context 4096
  kvjax estimate ./a-model --device H100 --cache 'dense(store=int8())' --weights int8
  kvjax estimate ar2en --source 16 --device L4         with an encoder
  kvjax estimate ./config.json --device "TPU v5e" --plot speed.svg
  kvjax estimate shakespeare --device A100 --json

Bytes of weights, cache and temporaries, the largest batch and context that fit, FLOPs and bytes of a
step, the bound that rules, tokens a second at that limit, where one way begins to cost more than
another, and what could be kept instead. Nothing is loaded: config.json is enough. Devices: T4, L4,
A100, A100-40GB, H100, H200, TPU v5e, TPU v5p, TPU v6e (datasheet figures), or here, which measures
this one in a few seconds and says what is to be expected, too.
"""


DOCTOR = """examples:
  kvjax doctor
  kvjax doctor --json > report.json             for a report of something that goes wrong

Versions, devices and their memory, settings that change results or speed, the folder of compiled
programs, what is optional; then the promises on a tiny model, compiled anew in some seconds: cached
is recomputed, a rewind is exact, rows do not see each other, bytes are as predicted, no temporary is
as large as the cache. Each line is ok, warning or FAILED; the exit code is 1 if one failed.
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
    parser.add_argument("--version", action="version", version=_version(), help="which versions run")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_generate, _chat, _translate, _info, _compare, _estimate, _doctor):
        add(commands)
    return parser


def _generate(commands: Any) -> None:
    parser = commands.add_parser("generate", epilog=GENERATE, help="continue a prompt")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - reads standard input")
    _model(parser, "--model")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    add = _drawing(parser, least=0)
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given more than once")
    add("--samples", type=_whole(1), default=1, metavar="N", help="texts, with seeds S, S + 1, … (default 1)")
    add("--logprobs", type=_whole(0), metavar="K", help="with --json: log-probabilities, also of the K most probable")
    drafts = parser.add_argument_group("several tokens a call").add_mutually_exclusive_group()
    drafts.add_argument("--draft", metavar="MODEL", help="a smaller model drafts several tokens for each call")
    what = "what followed the same N tokens earlier drafts (default 3)"
    drafts.add_argument("--lookup", type=_whole(1), nargs="?", const=3, metavar="N", help=what)
    drafts.add_argument("--early-exit", type=_whole(1), metavar="L", help="the model's own first L layers draft")
    _precision(parser)
    _kept(parser)
    group, _ = _output(parser, "one JSON object instead of text and figures")
    _ends(group, parser, write_text.run)


def _chat(commands: Any) -> None:
    parser = commands.add_parser("chat", epilog=CHAT, help="talk with a model that was tuned for it")
    _model(parser, "--model")
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: none, or the template's own)")
    parser.add_argument("--template", metavar="FILE", help="a chat template in place of the model's own")
    _drawing(parser, least=1)
    _precision(parser)
    _kept(parser)
    group, _ = _output(parser, "one JSON object a line, for each reply, instead of text and figures")
    _ends(group, parser, chat_text.run)


def _translate(commands: Any) -> None:
    parser = commands.add_parser("translate", epilog=TRANSLATE, help="translate source texts, by beam search")
    what = "source texts; without one, or for -, lines of standard input"
    parser.add_argument("text", nargs="*", metavar="TEXT", help=what)
    _model(parser, "--model", "ar2en")
    parser.add_argument("--file", metavar="FILE", help="translate the lines of a UTF-8 file")
    add = parser.add_argument_group("what is made").add_argument
    add("--max-new-tokens", type=_whole(1), metavar="N", help="how many at most (default: 128, or twice the source)")
    add("--beams", type=_whole(1), default=4, metavar="W", help="width of the search (default 4)")
    add("--candidates", type=_whole(1), metavar="N", help="how many of a source (default: all beams, 1 for lines)")
    add("--batch", type=_whole(1), default=32, metavar="B", help="sources at a time (default 32)")
    _precision(parser)
    _kept(parser, cross=True)
    group, _ = _output(parser, "one JSON object a line, for each source")
    _ends(group, parser, translate_text.run)


def _info(commands: Any) -> None:
    parser = commands.add_parser("info", epilog=INFO, help="what a model is, and what its caches cost")
    _model(parser, "model")
    _precision(parser, weights=False)
    group, _ = _output(parser)
    _ends(group, parser, describe_model.run)


def _compare(commands: Any) -> None:
    parser = commands.add_parser("compare", epilog=COMPARE, help="what could be kept of a text, side by side")
    _model(parser, "model")
    like = parser.add_mutually_exclusive_group()
    like.add_argument("--no-rotation", action="store_true", help="a random model of this shape, learned positions")
    like.add_argument("--encoder", action="store_true", help="the same with an encoder of this shape")
    add = parser.add_argument_group("sizes").add_argument
    add("--batch", type=_whole(1), default=2, metavar="B", help="rows (default 2)")
    add("--context", type=_whole(1), metavar="T", help="tokens of a row at first (default: up to 512 with new ones)")
    _source(add)
    add("--sources", type=_whole(1), metavar="R", help="sources that the rows share evenly (default: one a row)")
    add("--tokens", type=_whole(1), metavar="N", help="new tokens decoded in a round (default 32, if there is room)")
    add("--edit", type=_whole(1), default=8, metavar="K", help="tokens that an edit goes back (default 8)")
    add("--rounds", type=_whole(1), default=5, metavar="R", help="of timing, in turn (default 5)")
    _precision(parser, weights=False)
    group, forms = _output(parser)
    forms.add_argument("--markdown", action="store_true", help="tables in Markdown")
    _ends(group, parser, compare_strategies.run)


def _estimate(commands: Any) -> None:
    parser = commands.add_parser("estimate", epilog=ESTIMATE, help="what fits on a device, and how fast it can be")
    _model(parser, "model", also="a config.json, ")
    parser.add_argument(
        "--device", default="here", metavar="NAME", help="a name, or here: this one, measured (default)"
    )
    add = parser.add_argument_group("sizes").add_argument
    add("--batch", type=_whole(1), default=1, metavar="B", help="rows (default 1)")
    add("--context", type=_whole(1), metavar="T", help="slots of a row (default: 4096, or the model's positions)")
    _source(add)
    _precision(parser, "what config.json says", "matrices in eight bits, a float32 scale for each output")
    _kept(parser, cross=True)
    group, _ = _output(parser)
    group.add_argument("--plot", metavar="FILE", help="draw tokens a second over the context; needs matplotlib")
    _ends(group, parser, estimate_costs.run)


def _doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", epilog=DOCTOR, help="whether all is well on this machine, and what to do")
    group, _ = _output(parser)
    _debug(group)
    parser.set_defaults(run=check_machine.run, compile_cache=False)  # what it runs it must see compiled


def _model(parser: argparse.ArgumentParser, name: str, default: str = "shakespeare", also: str = "") -> None:
    where = f"bundled name, {also}Hugging Face folder, or hub id (default {default})"
    positional: dict[str, Any] = {} if name.startswith("-") else {"nargs": "?"}
    parser.add_argument(name, default=default, metavar="MODEL", help=where, **positional)


def _drawing(parser: argparse.ArgumentParser, least: int) -> Callable[..., Any]:
    """How tokens are chosen; the function that adds more of it."""
    add, fewer = parser.add_argument_group("what is made").add_argument, "at most (default: 128, or fewer if no room)"
    add("--max-new-tokens", type=_whole(least), metavar="N", help=f"how many {fewer}")
    add("--temperature", type=_real(0), default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    add("--top-k", type=_whole(0, 2**31 - 1), default=0, metavar="K", help="only the K most probable (default 0: all)")
    add("--top-p", type=_real(0, 1), default=1.0, metavar="P", help="only the most probable up to P (default 1: all)")
    add("--min-p", type=_real(0, 1), default=0.0, metavar="P", help="at least P times the most probable (default 0)")
    add("--repetition-penalty", type=_real(1e-6), default=1.0, metavar="R", help="over 1: repeats less (default 1)")
    add("--seed", type=_whole(0, 0xFFFFFFFF), default=0, metavar="S", help="the same seed, the same text (default 0)")
    return add


def _source(add: Callable[..., Any]) -> None:
    add("--source", type=_whole(1), metavar="S", help="tokens of a source, with an encoder (default: as the context)")


def _precision(
    parser: argparse.ArgumentParser,
    default: str = "float32 on a CPU",
    eight: str = "matrices in eight bits; on a GPU or TPU",
    weights: bool = True,
) -> None:
    add = parser.add_argument_group("precision").add_argument
    add("--dtype", choices=DTYPES, help=f"of parameters and cache (default: {default})")
    if weights:
        add("--weights", choices=("int8",), help=eight)


def _kept(parser: argparse.ArgumentParser, cross: bool = False) -> None:
    add = parser.add_argument_group("what is kept").add_argument
    add("--cache", type=_cache, metavar="KIND", help=f"{_kinds()}; default: what suits the model")
    if cross:
        add("--cross", type=_cross, metavar="KIND", help=f"what is kept of the source; {_cross_kinds()}")


def _output(parser: argparse.ArgumentParser, json: str = "one JSON object") -> tuple[Any, Any]:
    """The group of what says how to write; and that of forms, of which there is one."""
    group = parser.add_argument_group("output")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help=json)
    return group, forms


def _ends(group: Any, parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None]) -> None:
    """What stands last in every command."""
    group.add_argument("--no-compile-cache", dest="compile_cache", action="store_false", help="keep nothing compiled")
    _debug(group)
    parser.set_defaults(run=run)


def _debug(group: Any) -> None:
    group.add_argument("--debug", action="store_true", help="a traceback with every error")


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
