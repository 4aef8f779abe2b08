"""`generate` and `stream`: from prompts to text, on the host. Buckets prompts, grows the cache, raises flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvjax.caches.base import Cache
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.loops.algorithms import Algorithm
from kvjax.loops.beginning import copied
from kvjax.loops.generated import Generated
from kvjax.loops.run import Run
from kvjax.model import Model


def generate(
    lm: LM | Model,
    prompts: Any = None,
    *,
    after: Generated | None = None,
    max_new_tokens: Any = None,
    sampler: Any = None,
    seed: Any = None,
    plan: Any = None,
    stop_ids: Sequence[int] | None = None,
    stop: Any = None,
    samples: int = 1,
    logprobs: int | None = None,
    prefix: Cache | None = None,
    algorithm: Algorithm | None = None,
    target: Any = None,
    cross: Any = None,
) -> Generated:
    """Continues prompts until something stops a row or its budget is spent. With an encoder, prompts are source texts,
    and what is made is a target for each.

    Compiles two programs for a prompt bucket and a capacity; other prompts, seeds, samplers' numbers, stops and budgets
    compile none.

    Args:
        lm: from `kvjax.load`; or a bare `Model`, for prompts of ids.
        prompts: a str, a list of str, or a list of lists of ids; rows may differ in length.
        after: what an earlier call gave: goes on as one longer call would have, and leaves it usable. With prompts, one
            a row, these follow what was made; of a text, the ids alone, with nothing around them. Seeds, sampler, stop
            ids and stops are its own unless given.
        max_new_tokens: int, or one a row; 0 gives nothing new. None is 128, or twice the source if that is more, or
            what the model's positions leave a row if that is less.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: int, or one a row; the same seed samples the same alone and in any row.
        plan: kind of cache; None is `caches.default`.
        stop_ids: tokens that end a row, themselves included in what is emitted; None is those of `lm`.
        stop: what else ends a row, one or a list: a str, without which and what follows it the text is given, while
            tokens and cache have all of what completed it; or a list of ids, found on the device, which stays. It must
            lie in what is new. Strings keep a second cache while a chunk runs: a row is run again up to where one ends.
        samples: rows of each prompt, next to each other in the result. A prompt is prefilled once; sample i of a
            prompt with seed s is what seed s + i gives by itself. `seed` may also be one a sample. (Of
            `codecs.int4_channels`, whose last tokens are precise, what is shared keeps its own last tokens so, here and
            with `prefix`: there the result may differ.)
        logprobs: log-probabilities of so many of the most probable tokens, and of those chosen; None is none. Of an
            algorithm that ranks texts, those of the best.
        prefix: a cache of one row whose text every prompt begins with. Only what follows is fed, and the prefix is
            kept once for all rows; it stays usable. The result is the same without it.
        algorithm: how tokens are chosen, such as `kvjax.beam(4)`; None draws them with `sampler`.
        target: what targets begin with, after the model's start token: text or ids, one for all or a list with one a
            row. It is the prompt of the result, and not among the new tokens.
        cross: what is kept of the sources, `caches.cross()` or `caches.encoder_output()`; None is `caches.cross()`.

    Returns:
        Texts, tokens, and a cache to go on from.

    Raises:
        InputError: a prompt is empty, has ids outside the vocabulary or does not go on from `prefix`, a source passes
            the encoder's positions, or budgets the model's.
        CacheError: a row was flagged, for example because of NaN logits.
    """
    run = Run.start(
        lm,
        prompts,
        after=after,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        plan=plan,
        stop_ids=stop_ids,
        stop=stop,
        samples=samples,
        logprobs=logprobs,
        prefix=prefix,
        algorithm=algorithm,
        target=target,
        cross=cross,
    )
    for run in run.chunks(loop.ALL):
        pass
    return run.result()


class Piece(NamedTuple):
    """What became certain of a row's text, by these new tokens or by some before them.

    Args:
        row: which.
        text: never half a character; None without a tokenizer.
        tokens: new ids since the row's last piece.
    """

    row: int
    text: str | None
    tokens: list[int]


def stream(lm: LM | Model, prompts: Any = None, *, every: int = loop.CHUNK, **options: Any) -> Stream:
    """`generate`, piece by piece: `for piece in kvjax.stream(lm, "ROMEO:"): print(piece.text, end="")`.

    The pieces of a row concatenate to its text in `result()`, which is that of `generate`. Nothing runs before the
    first piece is asked for but the prefill.

    Args:
        lm: as for `generate`.
        prompts: as for `generate`.
        every: tokens between two looks, 1 or more; another number compiles a program. An algorithm that ranks texts
            gives them at the end.
        options: as for `generate`.

    Returns:
        An iterator of `Piece`.
    """
    return Stream(Run.start(lm, prompts, every=every, **options))


class Stream(Iterator[Piece]):
    """See `stream`."""

    def __init__(self, run: Run):
        self._run = run.watched()
        self._pieces = self._made()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def result(self) -> Generated:
        """What `generate` gives, of what was made until now: everything, once the iterator has ended. It stays usable
        when the iterator goes on."""
        out = self._run.result()
        if not self._run.state.look()[1].any():
            return out
        cache, logits = copied((out.cache, out.logits))  # the next chunk uses up what there is
        return dataclasses.replace(out, cache=cache, logits=logits)

    def _made(self) -> Iterator[Piece]:
        done = [0] * len(self._run.prompts)
        for run in self._run.chunks(1):
            self._run = run
            if run.state.grows:
                yield from self._look(done, run.new(), run.pieces())
        yield from self._look(done, self._run.new(), self._run.rest())

    def _look(self, done: list[int], new: list[list[int]], texts: list[str | None]) -> Iterator[Piece]:
        for row, (ids, text) in enumerate(zip(new, texts, strict=True)):
            if text or len(ids) > done[row]:
                piece, done[row] = Piece(row, text, ids[done[row] :]), len(ids)
                yield piece


__all__ = ["generate", "stream", "Stream", "Piece"]
