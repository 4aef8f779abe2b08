"""`kvjax generate`: a prompt goes in, text streams out, then one line says what it cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from kvjax import sampling
from kvjax.errors import InputError
from kvjax.lm import LM, load
from kvjax.loops.generated import Generated
from kvjax.loops.run import Run


def run(args: argparse.Namespace) -> None:
    """Generates as the arguments say; text, or one JSON object, on stdout."""
    prompt = read_prompt(args.prompt, args.prompt_file)
    began = time.perf_counter()
    lm = load(args.model, dtype=args.dtype)
    loaded = time.perf_counter() - began
    ids = lm.encode(prompt)
    made = Run.start(
        lm,
        [ids],
        after=None,
        max_new_tokens=args.max_new_tokens,
        sampler=sampler_of(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        plan=args.cache,
        stop_ids=None,
    )
    out = _finish(made) if args.json else _stream(lm, made)
    if args.json:
        print(json.dumps(report(lm, out, loaded)))
    else:
        sys.stdout.flush()
        sys.stderr.write(_figures(out) + "\n")


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


def sampler_of(temperature: float, top_k: int, top_p: float) -> Any:
    """Greedy at temperature 0; else the filters that change anything, in the usual order."""
    if temperature == 0:
        return sampling.greedy()
    filters: list[Any] = [sampling.temperature(temperature)]
    if top_k:
        filters.append(sampling.top_k(top_k))
    if top_p < 1:
        filters.append(sampling.top_p(top_p))
    return sampling.chain(*filters)


def report(lm: LM, out: Generated, loaded: float) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "model": lm.name,
        "prompt_ids": out.prompts[0],
        "new_ids": out.tokens[0, : out.lengths[0]].tolist(),
        "text": out.text[0] if out.text is not None else None,
        "stop": out.stop[0],
        "timings": {"load": loaded, **dataclasses.asdict(out.timings), "tokens_per_second": _speed(out)},
        "cache_bytes": out.cache.nbytes,
    }


def _stream(lm: LM, made: Run) -> Generated:
    text = lm.tokenizer.stream(made.prompts[0]) if lm.tokenizer is not None else None
    done, last = 0, "\n"
    for now in made.chunks(1):
        made, new = now, now.new()[0]
        last = _put(text.push(new[done:]) if text is not None else "", last)
        done = len(new)
    last = _put(text.finish() if text is not None else "", last)
    if last != "\n":
        sys.stdout.write("\n")
    return made.result()


def _put(piece: str, last: str) -> str:
    sys.stdout.write(piece)
    sys.stdout.flush()
    return piece[-1:] or last


def _finish(made: Run) -> Generated:
    for now in made.chunks(1):  # looks up between chunks, so that an interrupt is heard
        made = now
    return made.result()


def _speed(out: Generated) -> float | None:
    new, seconds = int(out.lengths[0]), out.timings.decode
    return new / seconds if new and seconds > 0 else None


def _figures(out: Generated) -> str:
    speed = _speed(out)
    return (
        f"{len(out.prompts[0]):,} prompt tokens, {out.lengths[0]:,} new ({out.stop[0]}), "
        f"compile {out.timings.compile:.2f} s, prefill {out.timings.prefill:.3f} s, "
        f"{'-' if speed is None else f'{speed:,.0f}'} tokens/s, cache {out.cache.nbytes:,} bytes"
    )


__all__ = ["run", "read_prompt", "sampler_of", "report"]
