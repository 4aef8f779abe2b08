"""`python -m kvjax.train lm | draft | induction | seq2seq | eval`: train the bundled models, or measure one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from kvjax.errors import KvjaxError

EXAMPLES = """examples:
  python -m kvjax.train lm --text tinyshakespeare.txt --out runs/shakespeare
      trains the bundled model (50 minutes on one core) into runs/shakespeare/model; after an
      interrupt the same command goes on from the checkpoint
  python -m kvjax.train lm --text my.txt --out runs/my --steps 500 --width 96 --layers 4
      a smaller one, on another text
  python -m kvjax.train draft shakespeare --out runs/shakespeare-draft
      trains the bundled draft of that model (20 minutes on one core), on texts that the model writes
  python -m kvjax.train induction --out runs/induction
      trains the bundled model of the copying task (5 minutes on one core)
  python -m kvjax.train seq2seq --text ar2en-train.txt --out runs/ar2en
      trains the bundled transliterator on lines of source, tab, target (20 minutes on one core)
  python -m kvjax.train eval --text tinyshakespeare.txt
      nats per character of the bundled model on the text's last 111,540 characters
  python -m kvjax.train eval runs/my/model --text my.txt
  python -m kvjax.train eval ar2en --text ar2en-eval.txt
      exact matches and character error rate of the bundled transliterator, greedy and with four beams

Progress goes to a terminal's standard error, the result to standard output, with --json as one JSON
object. Ctrl-C writes the checkpoint and ends with 130.
"""


def _parser() -> argparse.ArgumentParser:
    from kvjax.train import draft, induction, lm, seq2seq

    parser = argparse.ArgumentParser(
        prog="python -m kvjax.train",
        description="Train the bundled models, or measure one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    style: dict[str, Any] = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    for name, settings, what, text in (
        ("lm", lm.Settings, "train a small Llama on a text", "UTF-8 text file"),
        ("seq2seq", seq2seq.Settings, "train a small mBART on pairs of names", "lines of source, tab, target in UTF-8"),
    ):
        train = commands.add_parser(name, help=what, **style)
        train.add_argument("--text", type=Path, required=True, help=text)
        train.add_argument("--out", type=Path, required=True, help="directory of the checkpoint and of model/")
        train.add_argument("--quiet", action="store_true", help="no progress bar")
        for field in dataclasses.fields(settings):
            option = "--" + field.name.replace("_", "-")
            train.add_argument(option, type=type(field.default), default=field.default, help=f"default {field.default}")
    drafting = commands.add_parser("draft", help="train a small Llama to guess what another says", **style)
    drafting.add_argument("model", help="bundled name or directory of the model that it is for")
    copying = commands.add_parser("induction", help="train a tiny Llama to copy", **style)
    for train, options, plain in (
        (drafting, draft.OPTIONS, draft.Settings()),
        (copying, induction.OPTIONS, induction.SETTINGS),
    ):
        train.add_argument("--out", type=Path, required=True, help="directory of the checkpoint and of model/")
        train.add_argument("--quiet", action="store_true", help="no progress bar")
        for name in options:
            default, option = getattr(plain, name), "--" + name.replace("_", "-")
            train.add_argument(option, type=type(default), default=default, help=f"default {default}")
    measure = commands.add_parser("eval", help="loss on the end of a text, or errors on pairs", **style)
    measure.add_argument("model", nargs="?", default="shakespeare", help="bundled name or directory (shakespeare)")
    measure.add_argument("--text", type=Path, required=True, help="the text that the model was trained on, or pairs")
    measure.add_argument("--any-text", action="store_true", help="do not insist on the text of the model card")
    measure.add_argument(
        "--record", action="store_true", help="write the result into the package's record and model card"
    )
    for each in commands.choices.values():
        each.add_argument("--json", action="store_true", help="one JSON object instead of a line of text")
    return parser


def _tell(args: argparse.Namespace, text: str, **told: Any) -> None:
    print(json.dumps(told) if args.json else text)


def _trained(args: argparse.Namespace, text: str, step: int, **result: float) -> None:
    folder = args.out / "model"
    _tell(args, f"{text} at step {step}: {folder}", **result, step=step, folder=str(folder))


def _lm(args: argparse.Namespace) -> None:
    from kvjax.train import loop
    from kvjax.train.lm import Settings

    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    progress = loop.train(args.text, args.out, settings, quiet=args.quiet)
    loss = progress.best_loss
    _trained(args, f"held-out {loss:.4f} nats per character", progress.best_step, nats_per_character=loss)


def _induction(args: argparse.Namespace) -> None:
    from kvjax.train import induction

    settings = dataclasses.replace(induction.SETTINGS, **{name: getattr(args, name) for name in induction.OPTIONS})
    progress = induction.train(args.out, settings, quiet=args.quiet)
    loss = progress.best_loss
    _trained(args, f"{loss:.5f} nats per copied token", progress.best_step, nats_per_copied_token=loss)


def _draft(args: argparse.Namespace) -> None:
    from kvjax.train import draft

    settings = draft.Settings(**{name: getattr(args, name) for name in draft.OPTIONS})
    progress = draft.train(args.model, args.out, settings, quiet=args.quiet)
    kept = 1 - progress.best_loss
    _trained(args, f"{kept:.4f} of drawn tokens kept", progress.best_step, drawn_tokens_kept=kept)


def _seq2seq(args: argparse.Namespace) -> None:
    from kvjax.train import seq2seq

    settings = seq2seq.Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(seq2seq.Settings)})
    progress = seq2seq.train(args.text, args.out, settings, quiet=args.quiet)
    loss = progress.best_loss
    _trained(args, f"held-out {loss:.4f} nats per character", progress.best_step, nats_per_character=loss)


def _eval(args: argparse.Namespace) -> None:
    from kvjax.checkpoint.source import resolve
    from kvjax.train.measure import measure, record_test_loss
    from kvjax.train.package import read_record

    folder, _ = resolve(args.model, None)
    if "pairs" in read_record(folder):
        _eval_pairs(args, folder)
        return
    found = measure(args.model, args.text, any_text=args.any_text)
    if args.record:
        record_test_loss(args.model, found)
    text = f"{found.loss:.4f} nats per character ({found.chars:,} characters, {found.tokens:,} tokens)"
    _tell(args, text, nats_per_character=found.loss, characters=found.chars, tokens=found.tokens)


def _eval_pairs(args: argparse.Namespace, folder: Path) -> None:
    from kvjax.lm import load
    from kvjax.train.accuracy import measure
    from kvjax.train.pairs import read_pairs
    from kvjax.train.translator import record_accuracy

    wanted = read_pairs(args.text)
    found = measure(load(folder), wanted)
    if args.record:
        record_accuracy(folder, args.text.name, found)
    lines = [
        f"{name}: {one.exact:.4f} exact, character error rate {one.errors:.4f} ({len(wanted):,} pairs)"
        for name, one in found.items()
    ]
    made = {name: {"exact": one.exact, "character_error_rate": one.errors} for name, one in found.items()}
    _tell(args, "\n".join(lines), pairs=len(wanted), **made)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on an error (one line on stderr), 130 on an interrupt."""
    args = _parser().parse_args(argv)
    try:
        {"lm": _lm, "draft": _draft, "induction": _induction, "seq2seq": _seq2seq, "eval": _eval}[args.command](args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the checkpoint", file=sys.stderr)
        return 130
    except (KvjaxError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
