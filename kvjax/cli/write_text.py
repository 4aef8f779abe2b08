"""`kvjax generate`: a prompt goes in, text streams out, then one line says what it cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvjax import sampling
from kvjax.cli.startup import interruptible, load_lm
from kvjax.errors import InputError
from kvjax.lm import LM, load
from kvjax.loops.drafters import draft_model, early_exit, prompt_lookup
from kvjax.loops.generated import Generated
from kvjax.loops.host import Stream, stream
from kvjax.loops.speculative import Speculated, speculate


def run(args: argparse.Namespace) -> None:
    """Generates as the arguments say; text, or one JSON object, on stdout."""
    prompt = read_prompt(args.prompt, args.prompt_file)
    if args.logprobs is not None and not args.json:
        raise InputError("generate: --logprobs goes with --json")
    began = time.perf_counter()
    lm = load_lm(args)
    loaded = time.perf_counter() - began
    options = {
        "max_new_tokens": args.max_new_tokens,
        "sampler": sampler_of(args),
        "seed": args.seed,
        "plan": args.cache,
        "stop": args.stop,
        "samples": args.samples,
        "logprobs": args.logprobs,
        "algorithm": algorithm_of(args),
    }
    pieces = stream(lm, [lm.encode(prompt)], **options)
    interrupts: list[bool] = []
    with interruptible(lambda: interrupts.append(True)):
        (_shown if args.samples == 1 and not args.json else _counted)(pieces, interrupts)
    out = pieces.result()
    if interrupts:  # what there is of it is written all the same
        out = dataclasses.replace(out, stop=["stopped" if each == "length" else each for each in out.stop])
    if args.json:
        print(json.dumps(report(lm, out, loaded)))
    elif args.samples > 1:
        _put_all(out)
    sys.stdout.flush()
    if not args.json:
        sys.stderr.write(_figures(out) + "\n")
    if interrupts:
        raise KeyboardInterrupt


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt, from wherever it comes; '' where there is none.

    Raises:
        InputError: two prompts, a file that cannot be read, or bytes that are no UTF-8.
    """
    if prompt is not None and file is not None:
        raise InputError("generate: give either PROMPT or --prompt-file")
    source = file if file is not None else prompt if prompt == "-" else None
    if source is None:
        return prompt or ""
    if source == "-" and sys.stdin is None:
        raise InputError("generate: PROMPT is -, but standard input is closed")
    try:
        # Bytes, so that line breaks come as they are, whatever the platform makes of them.
        raw = getattr(sys.stdin, "buffer", sys.stdin).read() if source == "-" else Path(source).read_bytes()
        return raw.decode("utf-8") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        where = "standard input" if source == "-" else source
        raise InputError(f"generate: {where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"generate: cannot read {source}: {error.strerror or error}") from error


def sampler_of(args: argparse.Namespace) -> Any:
    """Greedy at temperature 0; else the filters that change anything, in the order of Transformers."""
    filters: list[Any] = []
    if args.repetition_penalty != 1:
        filters.append(sampling.repetition_penalty(args.repetition_penalty))
    if args.temperature == 0:
        return sampling.greedy(*filters)
    filters.append(sampling.temperature(args.temperature))
    if args.top_k:
        filters.append(sampling.top_k(args.top_k))
    if args.top_p < 1:
        filters.append(sampling.top_p(args.top_p))
    if args.min_p:
        filters.append(sampling.min_p(args.min_p))
    return sampling.chain(*filters)


def algorithm_of(args: argparse.Namespace) -> Any:
    """Speculation where drafts are asked for, else None."""
    if args.draft is not None:
        return speculate(draft_model(load(args.draft, dtype=args.dtype)))
    if args.lookup is not None:
        return speculate(prompt_lookup(args.lookup))
    return None if args.early_exit is None else speculate(early_exit(args.early_exit))


def report(lm: LM, out: Generated, loaded: float) -> dict[str, Any]:
    """What `--json` prints; of several samples, `samples` has each, and the rest is of the first."""
    each = [_sample(out, row) for row in range(len(out.stop))]
    return {
        "model": lm.name,
        "prompt_ids": out.prompts[0],
        **each[0],
        **({"samples": each} if len(each) > 1 else {}),
        "timings": {"load": loaded, **dataclasses.asdict(out.timings), "tokens_per_second": _speed(out)},
        "cache_bytes": out.cache.nbytes,
        **({} if out.speculated is None else {"drafts": _drafts(out.speculated)}),
    }


def _drafts(made: Speculated) -> dict[str, Any]:
    kept, tested, calls = (int(x.sum()) for x in (made.kept, made.tested, made.calls))
    tokens = made.tokens_per_call if calls else None
    return {"kept": kept, "tested": tested, "calls": calls, "tokens_per_call": tokens}


def _sample(out: Generated, row: int) -> dict[str, Any]:
    n = int(out.lengths[row])
    found: dict[str, Any] = {
        "seed": int(out.seeds[row]),
        "new_ids": out.tokens[row, :n].tolist(),
        "text": out.text[row] if out.text is not None else None,
        "stop": out.stop[row],
    }
    if out.logprobs is not None:
        found["logprobs"] = out.logprobs.chosen[row, :n].tolist()
        best = zip(out.logprobs.ids[row, :n].tolist(), out.logprobs.values[row, :n].tolist(), strict=True)
        found["top_logprobs"] = [[[i, x] for i, x in zip(*pair, strict=True) if i >= 0] for pair in best]
    return found


def _shown(pieces: Stream, interrupts: list[bool]) -> None:
    last = "\n"
    for piece in pieces:
        last = _put(piece.text or "", last)
        if interrupts:
            break
    if last != "\n":
        sys.stdout.write("\n")


def _counted(pieces: Stream, interrupts: list[bool]) -> None:
    """To the end, or to an interrupt; on a terminal a bar says how far it is."""
    with tqdm(unit=" tokens", file=sys.stderr, disable=None, leave=False) as bar:
        for piece in pieces:
            bar.update(len(piece.tokens))
            if interrupts:
                break


def _put(piece: str, last: str) -> str:
    sys.stdout.write(piece)
    sys.stdout.flush()
    return piece[-1:] or last


def _put_all(out: Generated) -> None:
    for row, text in enumerate(out.text or []):
        sys.stdout.write(f"--- seed {out.seeds[row]} ({out.stop[row]})\n{text}" + ("" if text.endswith("\n") else "\n"))


def _speed(out: Generated) -> float | None:
    new, seconds = int(out.lengths.sum()), out.timings.decode
    return new / seconds if new and seconds > 0 else None


def _figures(out: Generated) -> str:
    speed, drafts = _speed(out), ""
    if out.speculated is not None and (tested := int(out.speculated.tested.sum())):
        kept, each = int(out.speculated.kept.sum()), out.speculated.tokens_per_call
        drafts = f"{kept:,} of {tested:,} drafts kept, {each:.2f} tokens a call, "
    return (
        f"{len(out.prompts[0]):,} prompt tokens, {out.lengths.sum():,} new ({', '.join(dict.fromkeys(out.stop))}), "
        f"{drafts}compile {out.timings.compile:.2f} s, prefill {out.timings.prefill:.3f} s, "
        f"{'-' if speed is None else f'{speed:,.0f}'} tokens/s, cache {out.cache.nbytes:,} bytes"
    )


__all__ = ["run", "read_prompt", "sampler_of", "report"]
