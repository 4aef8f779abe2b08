"""SentencePiece tokenizers (Kudo and Richardson 2018, 1808.06226) of folders without tokenizer.json: T5 and MarianMT.

`pip install 'kvjax[sentencepiece]'` adds the library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvjax.checkpoint.folder import read_json, read_json_if_there
from kvjax.checkpoint.reader import show
from kvjax.errors import CheckpointError

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece puts for a space
EXTRA_IDS = 100  # of T5, where tokenizer_config.json does not say


class Encoded(NamedTuple):
    """Ids of a text."""

    ids: list[int]


class Special(NamedTuple):
    """A token that is no text."""

    special: bool = True


class Pieces:
    """A SentencePiece model whose pieces have ids in a vocabulary, as `Tokenizer` asks it of its backend.

    Args:
        processor: cuts texts into pieces.
        vocab: ids of pieces.
        special: ids of tokens that are no text; found in a text as they are written, and left out of decoded ones.
        unknown: the id of a piece that is not in `vocab`.
        end: the id that ends a text, or None.
        codes: a text may begin with a code as `>>fr<<`, a token of its own.
    """

    def __init__(
        self,
        processor: Any,
        vocab: Mapping[str, int],
        special: Mapping[str, int],
        *,
        unknown: int,
        end: int | None,
        codes: bool = False,
    ):
        self._processor = processor
        self._vocab = {**vocab, **special}
        self._tokens = {i: token for token, i in self._vocab.items()}
        self._special = dict(special)
        self._unknown = unknown
        self._end = [] if end is None else [end]
        self._code = re.compile(r">>.*?<<", re.DOTALL) if codes else None
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Ids of a text, its end among them unless `add_special_tokens` is off."""
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):
            ids += [self._special[part]] if i % 2 else self._pieces(part)
        return Encoded(ids + self._end if add_special_tokens else ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; those that no piece has are no text."""
        tokens = [self._tokens.get(i, "") for i in ids]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special]
        return b"".join(map(_bytes, tokens)).decode("utf-8", errors="replace").removeprefix(" ")

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece or special token."""
        return self._vocab.get(token)

    def id_to_token(self, i: int) -> str | None:
        """The piece or special token of an id."""
        return self._tokens.get(i)

    def get_added_tokens_decoder(self) -> dict[int, Special]:
        """The ids that are no text."""
        return {i: Special() for i in self._special.values()}

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Ids of all pieces and special tokens."""
        return dict(self._vocab)

    def _pieces(self, text: str) -> list[int]:
        pieces = []
        if self._code is not None and (code := self._code.match(text)):
            pieces, text = [code[0]], text[code.end() :]
        pieces += self._processor.encode(text, out_type=str)
        return [self._vocab.get(piece, self._unknown) for piece in pieces]


def _bytes(token: str) -> bytes:
    # What is in no piece may be written as its bytes, a piece each.
    return bytes([int(token[3:5], 16)]) if BYTE.fullmatch(token) else token.replace(SPACE, " ").encode()


def load_pieces(folder: Path) -> tuple[Pieces, Pieces] | None:
    """The tokenizers of sources and targets in a folder; T5 has one for both.

    Args:
        folder: may hold spiece.model, or source.spm, target.spm and vocab.json.

    Returns:
        None where there is neither.

    Raises:
        CheckpointError: a damaged file, or the library is not installed.
    """
    values = read_json_if_there(folder / "tokenizer_config.json")
    if (folder / "source.spm").exists():
        vocab = _vocab(folder / "vocab.json")
        target = _vocab(folder / "target_vocab.json") if values.get("separate_vocabs") else vocab
        return _marian(folder / "source.spm", vocab, values), _marian(folder / "target.spm", target, values)
    if not (folder / "spiece.model").exists():
        return None
    processor, extra = _processor(folder / "spiece.model"), values.get("extra_ids", EXTRA_IDS)
    if type(extra) is not int or not 0 <= extra <= 2**16:
        raise CheckpointError(
            f"{folder}: tokenizer_config.json: extra_ids must be an integer from 0, not {show(extra)}"
        )
    size = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(size)}
    marks = {f"<extra_id_{i}>": size + extra - 1 - i for i in range(extra)}  # backwards, as T5 was trained
    for name, i in _added(folder, values).items():
        if (vocab | marks).get(name) != i:
            raise CheckpointError(
                f"{folder}: token {show(name)} with id {show(i)} was added to spiece.model; give a tokenizer.json, "
                "which says how"
            )
    special = {token: i for token, i in vocab.items() if processor.is_control(i) or processor.is_unknown(i)}
    end = None if processor.eos_id() < 0 else processor.eos_id()
    one = Pieces(processor, vocab, special | marks, unknown=processor.unk_id(), end=end)
    return one, one


def _added(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Tokens that were added to a SentencePiece model, and their ids."""
    listed = values.get("added_tokens_decoder", {})
    found = dict(read_json_if_there(folder / "added_tokens.json"))
    for i, token in listed.items() if isinstance(listed, dict) else ():
        name = token.get("content") if isinstance(token, dict) else token
        found[str(name)] = int(i) if i.isdigit() else i
    return found


def _marian(path: Path, vocab: dict[str, int], values: dict[str, Any]) -> Pieces:
    names = [
        values.get(f"{key}_token", default) for key, default in (("unk", "<unk>"), ("eos", "</s>"), ("pad", "<pad>"))
    ]
    names = [name.get("content") if isinstance(name, dict) else name for name in names]
    if wrong := [name for name in names if not isinstance(name, str) or name not in vocab]:
        raise CheckpointError(f"{path.parent}: the vocabulary of {path.name} has no token {show(wrong[0])}")
    special = {name: vocab[name] for name in names}
    return Pieces(_processor(path), vocab, special, unknown=vocab[names[0]], end=vocab[names[1]], codes=True)


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    if not vocab or any(type(i) is not int or not 0 <= i < 2**31 for i in vocab.values()):
        raise CheckpointError(f"{path}: is no map from tokens to ids")
    return vocab


def _processor(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise CheckpointError(
            f"{path}: is a SentencePiece model; to read it, install the library: pip install 'kvjax[sentencepiece]'"
        ) from None
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no SentencePiece model that can be read: {error}") from error
    return processor


__all__ = ["Pieces", "load_pieces"]
