"""CTranslate2's worker of `peers.py`: float32, its defaults. Ids go in as the tokens that its interface asks for.

The folder's weights are converted by CTranslate2's own converter, beside them; `t17` is the token of id 17.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import peers_worker
import transformers
from ctranslate2.converters import TransformersConverter

START, PAD, END, UNKNOWN = "t0", "t1", "t2", "t3"


class Ids:
    """What the converter asks of a tokenizer."""

    bos_token, pad_token, eos_token, unk_token = START, PAD, END, UNKNOWN

    def __init__(self, vocab: int):
        self._vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""
        return {f"t{i}": i for i in range(self._vocab)}


class Converter(TransformersConverter):
    """For folders without a tokenizer."""

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Ids:
        """Stands in for one."""
        return Ids(json.loads((Path(model_name_or_path) / "config.json").read_text())["vocab_size"])


def write(folder: Path) -> Path:
    """The folder's weights as CTranslate2 reads them."""
    out = folder / "ctranslate"
    if not (out / "model.bin").exists():
        Converter(str(folder)).convert(str(out), force=True)
    return out


def named(rows: list[list[int]]) -> list[list[str]]:
    """Tokens of ids."""
    return [[f"t{i}" for i in row] for row in rows]


class Peer:
    """One model."""

    def load(self, folder: str, rows: int, longest: int, threads: int) -> None:
        """A decoder, or an encoder-decoder."""
        path = write(Path(folder))
        encoder = "encoder_layers" in json.loads((Path(folder) / "config.json").read_text())
        make: Callable[..., Any] = ctranslate2.Translator if encoder else ctranslate2.Generator
        self.model = make(str(path), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads)

    def versions(self) -> dict[str, str]:
        """Of what ran."""
        return {"ctranslate2": ctranslate2.__version__}

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Greedy; the end token is one that these texts do not have."""
        given, options = named(prompts), {"max_length": new, "include_prompt_in_result": False}
        seconds, made = peers_worker.timed(lambda: self.model.generate_batch(given, **options))
        return {"seconds": seconds, "tokens": [row.sequences_ids[0] for row in made]}

    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        """The next token of each row, and a cache."""
        return self.generate(prompts, 1)

    def translate(self, prompts: list[list[int]], new: int, beams: int) -> dict[str, Any]:
        """Greedy, or the best text of a search, which is kept from ending early."""
        length = {"max_decoding_length": new} | ({} if beams == 1 else {"min_decoding_length": new})
        options = {"beam_size": beams, "target_prefix": [[START]] * len(prompts), **length}
        given = named(prompts)
        seconds, made = peers_worker.timed(lambda: self.model.translate_batch(given, **options))
        return {"seconds": seconds, "tokens": [[int(t[1:]) for t in row.hypotheses[0]] for row in made]}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    peers_worker.serve(Peer())
