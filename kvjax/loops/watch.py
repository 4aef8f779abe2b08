"""Text of a row as its tokens arrive: pieces that are certain, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvjax.text import BROKEN, Tokenizer


class Strings:
    """Stop strings, made ready once for all rows.

    Args:
        strings: none of them empty; possibly none.
    """

    def __init__(self, strings: Sequence[str] = ()):
        self.longest = max(map(len, strings), default=0)
        longest_first = sorted(strings, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, longest_first))) if strings else None
        self._begins = {text[:n] for text in strings for n in range(1, len(text))}

    def __bool__(self) -> bool:
        return self._found is not None

    def first(self, text: str, new: int) -> int | None:
        """Where the first that reaches beyond `text[:new]` begins; None where there is none."""
        at = max(new - self.longest + 1, 0)
        while self._found is not None and (match := self._found.search(text, at)) is not None:
            if match.end() > new:
                return match.start()
            at = match.start() + 1
        return None

    def open(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of one."""
        longest = min(self.longest - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text[len(text) - n :] in self._begins), 0)


class Watch:
    """The text that is new in a row.

    After each token the text is looked at as it would be if the row ended there, so that what is found does not depend
    on how many tokens arrive at a time.

    Args:
        tokenizer: decodes.
        prompt: ids before what is new.
        strings: that end the row.
        earlier: text that an earlier call made, in which a stop string may have begun.
        known: how much of it there was before its last token; a stop string that reaches further has ended the row.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], strings: Strings, earlier: str = "", known: int = 0
    ):
        self._tokenizer, self._prompt, self._strings = tokenizer, prompt, strings
        self._stream = tokenizer.stream(prompt)
        self._new: list[int] = []
        self._seen = earlier.rstrip(BROKEN)  # half a character at its end may become a whole one
        self._begin = self._out = len(self._seen)
        self.ended = strings.first(earlier, known) is not None
        """Whether a stop string was found."""

    def push(self, ids: Sequence[int]) -> int | None:
        """Takes in new ids: how many of them the row keeps, where one of them completed a stop string; else None."""
        for n, one in enumerate(ids, 1):
            if self.ended:
                return n - 1
            if not 0 <= one < self._tokenizer.vocab_size:
                return None  # flagged on the device
            self._new.append(one)
            before = len(self._seen)
            self._seen += self._stream.push(one)
            text = self._seen + self._stream.held
            at = self._strings.first(text, before)
            if at is not None:
                self._seen, self.ended = text[:at], True
                return n
        return None

    def piece(self) -> str:
        """The text that became certain since the last piece."""
        return self._give(self._seen if self.ended else self._seen[: len(self._seen) - self._strings.open(self._seen)])

    def finish(self) -> str:
        """The rest, when no more ids come."""
        return self._give(self._seen[: self._begin] + self.whole()[0])

    def whole(self) -> tuple[str, bool]:
        """All text that is new if the row ends here, and whether a stop string ended it."""
        if self.ended:
            return self._seen[self._begin :], True
        text = self._seen[: self._begin] + self._tokenizer.continuation(self._prompt, self._new)
        at = self._strings.first(text, self._begin)
        return text[self._begin : at], at is not None

    def _give(self, upto: str) -> str:
        piece = upto[self._out :]
        self._out += len(piece)
        return piece


__all__ = ["Strings", "Watch"]
