"""A language model on the host: parameters, tokenizer, and what ends a text. `load` makes one."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.checkpoint.families import FAMILIES
from kvjax.checkpoint.fields import Fields, report
from kvjax.checkpoint.folder import Tensors, read_json, read_json_if_there
from kvjax.checkpoint.generation import read_generation
from kvjax.checkpoint.reader import show
from kvjax.checkpoint.rules import Family, Leaf, convert, plan
from kvjax.checkpoint.source import resolve
from kvjax.config import Config
from kvjax.errors import CheckpointError, InputError
from kvjax.model import Model, decoder
from kvjax.templates import Template, read_template
from kvjax.text import Tokenizer, load_tokenizer, special_id
from kvjax.types import DType


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LM:
    """What `generate` and the command line take.

    Args:
        model: the pytree.
        tokenizer: None where the folder has none; then only ids go in and out.
        name: for people.
        eos_ids: tokens that end a text, possibly none.
        bos_id: the token that begins one, or None.
        start_ids: what every target begins with, for a model with an encoder: its start token, then the forced first
            token if there is one (`decoder_start_token_id`, `forced_bos_token_id`).
        filters: of `kvjax.sampling`, what the folder asks of every generation, greedy, drawn or by beams; they come
            before those of a sampler. In the order of Transformers: `sequence_bias`, `repetition_penalty`,
            `no_repeat_ngram_size`, `bad_words_ids`, `min_new_tokens` or else `min_length`, `forced_eos_token_id`,
            `suppress_tokens`, `begin_suppress_tokens`, `renormalize_logits`. How tokens are chosen is the caller's:
            `temperature`, `top_k`, `top_p`, `num_beams` and the like are not applied, nor is `max_length`.
            `dataclasses.replace(lm, filters=())` follows none.
        template: of chats; without a text where the folder has none.
    """

    model: Model
    tokenizer: Tokenizer | None = None
    name: str = ""
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    start_ids: tuple[int, ...] = ()
    filters: tuple[Any, ...] = ()
    template: Template = Template()

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.model.params)
        dtypes = ", ".join(sorted({str(x.dtype) for x in leaves}))
        return f"LM({self.name!r}, {sum(x.size for x in leaves):,} parameters, {dtypes})"

    def encode(self, text: str) -> list[int]:
        """Ids of a text; see `Tokenizer.encode`."""
        return self.text_tokenizer().encode(text)

    def decode(self, ids: Any) -> str:
        """Text of ids; see `Tokenizer.decode`."""
        return self.text_tokenizer().decode(ids)

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError(f"model {self.name!r} has no tokenizer.json: give token ids instead of text")
        return self.tokenizer


def load(
    source: str | os.PathLike[str], *, dtype: DType | None = None, strict: bool = False, revision: str | None = None
) -> LM:
    """Loads a checkpoint in the Hugging Face layout: config.json, safetensors, tokenizer.json or SentencePiece models.

    Args:
        source: a bundled name; a path, if it has a separator or begins with "."; else a hub id.
        dtype: of the parameters; None is float32 on CPU, float16 on a T4 (it has no bfloat16), else the checkpoint's.
        strict: a key of config.json that kvjax does not know, or one of generation_config.json that changes what is
            generated and is not applied, is an error instead of a warning.
        revision: branch, tag or commit, of a hub id only.

    Returns:
        The model with its tokenizer.

    Raises:
        CheckpointError: missing, damaged, of an unknown family, or its tensors do not fit; every tensor in one error.
        InputError: `dtype` is not a floating one, or needs x64.
    """
    if dtype is not None:
        dtype = _checked(dtype)
    folder, name = resolve(source, revision)
    hf = read_json(folder / "config.json")
    family, config = read_config(hf, strict)
    with Tensors(folder) as tensors:
        leaves = plan(family, config, tensors)
        params = convert(leaves, tensors, default_dtype(leaves, tensors) if dtype is None else dtype)
    asked = read_generation(folder, hf, vocab_size=config.vocab_size, encoder=config.encoder is not None, strict=strict)
    bos, eos = asked.bos_id, asked.eos_ids
    tokenizer = load_tokenizer(folder, bos_id=bos, vocab_size=config.vocab_size)
    if tokenizer is not None:
        values = read_json_if_there(folder / "tokenizer_config.json")
        bos = tokenizer.bos_id if bos is None else bos
        if not eos and (found := special_id(tokenizer.backend, values, "eos_token", folder)) is not None:
            eos = (found,)
    chat = read_template(folder)
    return LM(decoder(config, params), tokenizer, name, eos, bos, asked.start_ids, asked.filters, chat)


def read_config(hf: dict[str, Any], strict: bool = False) -> tuple[Family, Config]:
    """The family and the configuration that a config.json describes.

    Args:
        hf: the parsed file.
        strict: unknown keys are errors.

    Raises:
        CheckpointError: an unknown family, a value that is refused or makes no sense, an unknown key if `strict`.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"config.json: model_type is {show(kind)}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    unknown = family.keys.check(hf)
    fields = Fields(hf, aliases=family.aliases)
    try:
        config = family.config(fields)
    except InputError as error:
        raise CheckpointError(f"config.json describes no model: {error}") from error
    report(unknown + fields.unknown, strict)
    return family, config


def _checked(dtype: DType) -> np.dtype[Any]:
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise InputError(f"load: dtype must be float16, bfloat16, float32 or float64, not {dtype}")
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise InputError("load: dtype float64 needs 64-bit mode: set JAX_ENABLE_X64=1")
    return dtype


def default_dtype(leaves: list[Leaf], tensors: Tensors) -> np.dtype[Any]:
    """What `load` makes of these tensors on the default device when it is told nothing."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.dtype(jnp.float32)
    if "T4" in device.device_kind:
        return jnp.dtype(jnp.float16)
    sizes: Counter[np.dtype[Any]] = Counter()
    for leaf in leaves:
        for part in leaf.parts:
            info = tensors.info(part.name)
            sizes[info.dtype] += info.stop - info.start
    own = sizes.most_common(1)[0][0]
    return own if own in (jnp.float16, jnp.bfloat16) else jnp.dtype(jnp.float32)


__all__ = ["LM", "load", "read_config", "default_dtype"]
