"""Text to ids and back, over a tokenizer library, with ids checked and streaming that never breaks a character."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from kvjax.checkpoint.folder import read_json_if_there
from kvjax.errors import CheckpointError, InputError
from kvjax.pieces import BYTE, Pieces, load_pieces

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character, or not yet
_WINDOW = 64  # tokens decoded again for each new one, at most twice this


class Tokenizer:
    """A tokenizer.json with what its neighbour tokenizer_config.json says of the beginning of a text.

    Args:
        backend: of the `tokenizers` library.
        bos_id: the beginning-of-sequence token, or None.
        add_bos: put it first, or never; None leaves that to the post-processor of `backend`.
        vocab_size: ids that may be decoded, V; None is what `backend` knows. A model's table can be longer.
        target: of what the model writes, where that has a backend of its own (translation).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | Pieces,
        *,
        bos_id: int | None = None,
        add_bos: bool | None = None,
        vocab_size: int | None = None,
        target: Pieces | None = None,
    ):
        self.backend = backend
        self.target = backend if target is None else target
        self.bos_id = bos_id
        self.add_bos = add_bos
        self._skipped = {i for i, token in self.target.get_added_tokens_decoder().items() if token.special}
        known = max(self.target.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = max(known, vocab_size or 0)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, beginning as the tokenizer begins texts; of an empty text, the BOS alone.

        Raises:
            InputError: `text` is no str, holds a lone surrogate, or is empty and there is no BOS.
        """
        _check("encode", text)
        if not text:
            if self.bos_id is None:
                raise InputError("encode: text is empty, and this tokenizer has no BOS token to begin with")
            return [self.bos_id]
        ids = list(self.backend.encode(text).ids)
        if self.bos_id is not None and self.add_bos is not None:
            begins = ids[:1] == [self.bos_id]
            if self.add_bos and not begins:
                ids.insert(0, self.bos_id)
            elif not self.add_bos and begins and self.backend.encode(text, add_special_tokens=False).ids[:1] != ids[:1]:
                del ids[0]
        return ids

    def encode_bare(self, text: str) -> list[int]:
        """Ids of a text with nothing around them."""
        _check("encode", text)
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_target(self, text: str) -> list[int]:
        """Ids of how a target begins, for a model with an encoder: nothing around them, and none of an empty text.

        Raises:
            InputError: `text` is no str, or holds a lone surrogate.
        """
        _check("encode_target", text)
        return list(self.target.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return self._decode(self._checked(ids))

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """What `new` adds to the text: decode(prompt + new) without its beginning decode(prompt).

        Where the prompt ends inside a character that `new` completes, decode(prompt) is no such beginning; then the
        result is what follows the common part.
        """
        before = self.decode(prompt)
        after = self.decode([*prompt, *new])
        return after[_common(before, after) :]

    def stream(self, prompt: Sequence[int] = ()) -> Stream:
        """A decoder of one continuation, token by token."""
        return Stream(self, prompt)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, by its text."""
        return self.backend.token_to_id(token)

    def _decode(self, ids: list[int]) -> str:
        return self.target.decode(ids, skip_special_tokens=True)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        try:
            checked = [operator.index(i) for i in ids]
        except TypeError:
            raise InputError(f"decode: ids must be whole numbers, not {ascii(ids)[:60]}") from None
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"decode: id {i} is outside the vocabulary of {self.vocab_size}")
        return checked

    def _ends_in_byte(self, ids: list[int]) -> bool:
        for i in reversed(ids):
            token = self.target.id_to_token(i)
            if token is not None and i not in self._skipped:
                return BYTE.fullmatch(token) is not None
        return False


class Stream:
    """Pieces of text as ids arrive; together with `finish` they concatenate to `Tokenizer.continuation`.

    A piece is held back while it may still change: while the text ends in an incomplete character, or in a token for a
    single byte, which joins its neighbours.

    Args:
        tokenizer: decodes.
        prompt: ids that came before; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._prompt = tokenizer._checked(prompt)
        self._new: list[int] = []
        self._pieces: list[str] = []
        self._window = list(self._prompt)  # decoded again with each id; `_seen` is the part of its text already out
        self._seen = tokenizer._decode(self._window)
        self.held = ""
        """What would follow the pieces so far if no more ids came."""

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that became certain with these ids, often one token, sometimes ''."""
        new = self._tokenizer._checked([int(ids)] if isinstance(ids, int | np.integer) else ids)
        self._new += new
        self._window += new
        text = self._tokenizer._decode(self._window)
        piece = text[_common(self._seen, text) :]
        if not new or text.endswith(BROKEN) or self._tokenizer._ends_in_byte(self._window):
            self.held = piece
            return ""
        self.held = ""
        self._pieces.append(piece)
        self._seen = text
        self._shorten()
        return piece

    def finish(self) -> str:
        """The rest: whatever was held back."""
        whole = self._tokenizer.continuation(self._prompt, self._new)
        done = "".join(self._pieces)
        rest = whole[_common(done, whole) :]
        self._pieces.append(rest)
        return rest

    def _shorten(self) -> None:
        # Decoders treat the beginning of a text apart (a stripped space); a later beginning is right only if its text
        # ends what was decoded from the earlier one.
        if len(self._window) > 2 * _WINDOW:
            window = self._window[-_WINDOW:]
            text = self._tokenizer._decode(window)
            if text and not text.startswith(BROKEN) and self._seen.endswith(text):
                self._window, self._seen = window, text


def load_tokenizer(folder: Path, *, bos_id: int | None = None, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: may hold tokenizer.json, or what `kvjax.pieces` reads, and tokenizer_config.json.
        bos_id: taken where tokenizer_config.json does not say whether there is a BOS.
        vocab_size: rows of the model's table.

    Returns:
        None where there is no tokenizer.

    Raises:
        CheckpointError: a damaged file, a BOS that the vocabulary lacks, or a library that is not installed.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        pieces = load_pieces(folder)
        return None if pieces is None else Tokenizer(pieces[0], vocab_size=vocab_size, target=pieces[1])
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: no tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    values = read_json_if_there(folder / "tokenizer_config.json")
    if "bos_token" in values:
        bos_id = special_id(backend, values, "bos_token", folder)
    add_bos = values.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise CheckpointError(f"{folder}: tokenizer_config.json: add_bos_token must be true or false")
    return Tokenizer(backend, bos_id=bos_id, add_bos=add_bos, vocab_size=vocab_size)


def special_id(backend: tokenizers.Tokenizer | Pieces, values: dict[str, Any], key: str, folder: Path) -> int | None:
    """The id of a token that tokenizer_config.json names, as text or as an object with `content`; None for null."""
    token = values.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    found = backend.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise CheckpointError(
            f"{folder}: tokenizer_config.json names {key} {ascii(token)[:60]}, tokenizer.json has no such token"
        )
    return found


def _check(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name}: text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: text holds a lone surrogate at character {error.start}") from None


def _common(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


__all__ = ["Tokenizer", "Stream", "load_tokenizer"]
