"""A conversation as a value: its messages, and caches of what was fed, so that a turn feeds only what is new."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np

from kvjax import sampling
from kvjax.checks import count
from kvjax.errors import CacheError, InputError
from kvjax.lm import LM
from kvjax.loops.generated import Generated, Timings
from kvjax.loops.host import generate, stream
from kvjax.loops.prompts import BUDGET, fed
from kvjax.templates import Template

ENDS = ("eos_token", "eot_token")
"""Special tokens that end a reply, besides those of the model."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What was said, and the reply.

    Args:
        user: the message.
        reply: the text of the new tokens, without special ones.
        seed: of the reply.
        prompt: ids of the whole conversation up to the reply.
        new: ids of the reply.
        stop: as in `Generated`; "stopped" of a reply that its reader ended.
        reused: tokens of the prompt that were in a cache.
        timings: of the reply, and of what was fed before it.
    """

    user: str
    reply: str
    seed: int
    prompt: list[int]
    new: list[int]
    stop: str
    reused: int
    timings: Timings

    @property
    def fed(self) -> int:
        """Tokens of the prompt that had to be fed."""
        return len(self.prompt) - self.reused


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Conversation:
    """Messages and the caches of what was fed: a value, which stays usable whatever is made of it.

        talk = Conversation(lm, system="Answer in verse.")
        talk = talk.say("Who are you?").result()
        for piece in (reply := talk.say("And I?")):
            print(piece, end="", flush=True)
        other = talk.retry().result()

    At each turn the template makes the whole conversation's text again. What a kept cache holds of its beginning is not
    fed again; the reply is that of feeding everything. A cache that goes further is rewound, where its kind can. Of a
    kind that can go back to any length only the last cache is kept. Others cannot go back, or not far: of these, the
    caches after each turn's prompt and reply are kept, so that retrying, editing or undoing a turn, or a reply that has
    other tokens once it is a message, starts from the last cache that fits.

    Args:
        lm: without an encoder.
        system: the system message; None is none.
        sampler: see `kvjax.sampling`; None is greedy.
        seed: of every reply but those that are retried.
        plan: kind of cache; None is `caches.default`.
        max_new_tokens: of a reply, at most, where the model's positions leave that room; None is 128.
        stop: what else ends a reply, as for `generate`.
        template: None is that of `lm`.
        keep: caches kept at most, where one does not do; each has its own memory.
        turns: so far.
        kept: what the caches were made by, the last one last.
        began: what a template that asks for the date gets, at every turn: another would change the text's beginning.

    Raises:
        InputError: a model with an encoder, without a tokenizer or without a template; a number out of range.
        CheckpointError: the template is no jinja2, or the library is not installed.
    """

    lm: LM
    system: str | None = None
    sampler: Any = None
    seed: int = 0
    plan: Any = None
    max_new_tokens: int | None = None
    stop: Any = ()
    template: Template | None = None
    keep: int = 4
    turns: tuple[Turn, ...] = ()
    kept: tuple[Generated, ...] = ()
    began: datetime = dataclasses.field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        if not isinstance(self.lm, LM):
            raise InputError(f"Conversation: lm must come from kvjax.load, not be a {type(self.lm).__name__}")
        if self.lm.model.encode is not None:
            raise InputError(
                f"Conversation: model {self.lm.name!r} has an encoder: it writes targets, and does not chat"
            )
        self.lm.text_tokenizer()
        template = self.lm.template if self.template is None else self.template
        if not isinstance(template, Template):
            raise InputError(f"Conversation: template must be a Template of kvjax.templates, not {template!r}")
        if template.text is None:
            raise InputError(
                f"Conversation: model {self.lm.name!r} has no chat template: a base model continues a text; "
                "kvjax.generate does, or give a template"
            )
        template.check()
        count("Conversation: keep", self.keep)
        if self.max_new_tokens is not None:
            count("Conversation: max_new_tokens", self.max_new_tokens)
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "sampler", sampling.checked(self.sampler))

    def __repr__(self) -> str:
        return f"Conversation({self.lm.name!r}, {len(self.turns)} turns, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all kept caches."""
        return sum(each.cache.nbytes for each in self.kept)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As templates take them."""
        made = [] if self.system is None else [("system", self.system)]
        for turn in self.turns:
            made += [("user", turn.user), ("assistant", turn.reply)]
        return [{"role": role, "content": content} for role, content in made]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a reply: the model's end-of-sequence ids, and those that tokenizer_config.json names."""
        assert self.template is not None
        named = [self.template.tokens[key] for key in ENDS if key in self.template.tokens]
        found = [self.lm.text_tokenizer().token_to_id(token) for token in named]
        return tuple(dict.fromkeys([*self.lm.eos_ids, *(i for i in found if i is not None)]))

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation with one more message, up to where the reply begins.

        Raises:
            InputError: the template refuses it, or it is empty.
        """
        assert self.template is not None
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.lm.text_tokenizer().encode_bare(self.template.render(messages, now=self.began))
        if not ids:
            raise InputError(f"{self.template.where}: the chat template makes an empty text of these messages")
        return ids

    def say(self, text: str, *, seed: int | None = None) -> Reply:
        """Feeds what is new of the conversation with this message, and begins the reply.

        Raises:
            InputError: the template refuses the message, or the model's positions are full.
        """
        return Reply(self, text, self.seed if seed is None else seed)

    def retry(self, seed: int | None = None) -> Reply:
        """Another reply to the last message; `seed` is the next one unless given. Greedy ones are all the same.

        Raises:
            InputError: there is no turn yet.
        """
        last = self.turn(-1)
        return self.undo().say(last.user, seed=(last.seed + 1) % (1 << 32) if seed is None else seed)

    def edit(self, turn: int, text: str, *, seed: int | None = None) -> Reply:
        """Another message in place of that of a turn; what followed it is dropped.

        Args:
            turn: from 0; -1 is the last.
            text: the message.
            seed: as in `say`.

        Raises:
            InputError: there is no such turn; as `say`.
        """
        self.turn(turn)
        return dataclasses.replace(self, turns=self.turns[:turn]).say(text, seed=seed)

    def undo(self) -> Conversation:
        """The conversation before the last turn. Caches are kept: what is said next uses what it can of them.

        Raises:
            InputError: there is no turn yet.
        """
        self.turn(-1)
        return dataclasses.replace(self, turns=self.turns[:-1])

    def turn(self, number: int) -> Turn:
        """One turn, from 0; -1 is the last.

        Raises:
            InputError: there is none.
        """
        if not isinstance(number, int) or not -len(self.turns) <= number < len(self.turns):
            there = f"{number!r}, there are {len(self.turns)}" if self.turns else "yet"
            raise InputError(f"Conversation: there is no turn {there}")
        return self.turns[number]

    def nearest(self, ids: list[int]) -> tuple[Generated | None, int]:
        """Of the kept caches the one that has most of the beginning of `ids`, rewound to it, and how much that is."""
        found = []
        for each in self.kept:
            have = fed(each.cache)[0]
            same = len(os.path.commonprefix([have, ids]))
            whole = same == len(have)  # may have all of `ids`: its logits are those that come next
            found.append((same if whole else min(same, len(ids) - 1), whole, each))
        for same, whole, each in sorted(found, key=lambda x: x[:2], reverse=True):
            try:
                if same:
                    return each if whole else dataclasses.replace(each, cache=each.cache.rewind(same)), same
            except CacheError:  # further back than the kind keeps
                continue
        return None, 0


class Reply:
    """A reply as it is made: an iterator over pieces of its text, of which none breaks a character.

    Args:
        talk: it is a reply in; stays as it is.
        text: the message.
        seed: of the reply.
    """

    def __init__(self, talk: Conversation, text: str, seed: int):
        self._talk, self._text, self._seed = talk, text, seed
        self._prompt = talk.prompt(text)
        budget = self._budget()
        base, self.reused = talk.nearest(self._prompt)
        asked = {"sampler": talk.sampler, "seed": seed, "stop_ids": talk.stop_ids, "stop": talk.stop}
        rest = [self._prompt[self.reused :]] if self.reused < len(self._prompt) else None
        self._spent = Timings()
        if rest is not None and (base is None or base.cache.max_rewind is not None):
            begin: dict[str, Any] = {"plan": talk.plan} if base is None else {"after": base}
            base, rest = generate(talk.lm, rest, max_new_tokens=0, **begin, **asked), None
            self._spent = base.timings
        assert base is not None
        self._given = base
        if rest is None:  # nothing of what stands there is of this reply
            base = dataclasses.replace(base, starts=np.asarray([len(self._prompt)], np.int32))
        self._stream = stream(talk.lm, rest, after=base, max_new_tokens=budget, **asked)
        self._stopped = False
        self._pieces = self._made()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def stop(self) -> None:
        """Ends the reply with what there is, at the next look; a signal's handler may call it."""
        self._stopped = True

    def result(self) -> Conversation:
        """The conversation with this turn, made to its end unless it was stopped."""
        for _ in self._pieces:
            pass
        out, spent = self._stream.result(), self._spent
        talk, prompt = self._talk, self._prompt
        turn = Turn(
            user=self._text,
            reply=(out.text or [""])[0],
            seed=self._seed,
            prompt=prompt,
            new=out.tokens[0, : out.lengths[0]].tolist(),
            stop="stopped" if self._stopped and out.stop == ["length"] else out.stop[0],
            reused=self.reused,
            timings=dataclasses.replace(
                out.timings,
                compile=spent.compile + out.timings.compile,
                prefill=spent.prefill + out.timings.prefill,
                programs=spent.programs + out.timings.programs,
            ),
        )
        kept = [out]
        if out.cache.max_rewind is not None:
            earlier = [x for x in talk.kept if (ids := fed(x.cache)[0]) == prompt[: len(ids)] and ids != prompt]
            kept = [*earlier, self._given, out][-talk.keep :]
        return dataclasses.replace(talk, turns=(*talk.turns, turn), kept=tuple(kept))

    def _made(self) -> Iterator[str]:
        for piece in self._stream:
            if piece.text:
                yield piece.text
            if self._stopped:
                return

    def _budget(self) -> int:
        wanted = BUDGET if self._talk.max_new_tokens is None else self._talk.max_new_tokens
        positions, have = self._talk.lm.model.max_positions, len(self._prompt)
        if positions is None:
            return wanted
        if have >= positions:
            raise InputError(
                f"Conversation: with this message it has {have} tokens, the model has {positions} positions; undo or "
                "edit a turn, or begin anew"
            )
        return min(wanted, positions - have)


__all__ = ["Conversation", "Turn", "Reply"]
