"""config.json read key by key: the type of every value checked, every key in one of three lists."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.checkpoint.reader import show
from kvjax.errors import CheckpointError

_REQUIRED: Any = object()


class Fields:
    """Typed access to the values of one JSON object.

    Args:
        values: the object.
        where: its name in errors.
        aliases: other names of keys; the first one that is there counts.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", aliases: Mapping[str, str] | None = None):
        self._values = dict(values)
        self._where = where
        self.unknown: list[str] = []  # keys of nested objects that nobody reads; the caller reports them with its own
        for alias, name in (aliases or {}).items():
            if alias not in self._values:
                continue
            value = self._values.pop(alias)
            if self._values.setdefault(name, value) != value:
                own, other = show(self._values[name]), show(value)
                raise CheckpointError(f"{where}: {name!r} is {own}, but {alias!r}, which is the same, is {other}")

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._values.get(name, default)

    def integer(
        self,
        name: str,
        default: int | None = _REQUIRED,
        *,
        nullable: bool = False,
        least: int = 1,
        most: int = 2**31 - 1,
    ) -> Any:
        """An int from `least` to `most`; `default` where the key is missing, None for null if `nullable`."""
        value = self._get(name, default, nullable)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise self._wrong(name, f"an integer from {least} to {most}", value)
        return value

    def number(self, name: str, default: float | None = _REQUIRED, *, nullable: bool = False) -> Any:
        """A finite positive float."""
        value = self._get(name, default, nullable)
        if value is None:
            return None
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not 1e-30 < number < 1e30:  # far inside of float32, also squared roots and their inverses
            raise self._wrong(name, "a positive number of sensible size", value)
        return number

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        value = self._get(name, default, False)
        if type(value) is not bool:
            raise self._wrong(name, "true or false", value)
        return value

    def choice(self, name: str, default: str, known: Mapping[str, Any]) -> Any:
        """What `known` holds for the text under `name`."""
        value = self._get(name, default, False)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, f"one of {', '.join(known)}", value)
        return known[value]

    def _get(self, name: str, default: Any, nullable: bool) -> Any:
        value = self._values.get(name, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self._where}: has no {name!r}")
        if value is None and not nullable and default is not None:
            raise self._wrong(name, "a value", None)
        return value

    def _wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self._where}: {name!r} must be {expected}, not {show(value)}")


MOST_LAYERS = 10_000
"""A bound on what one number in an untrusted file can make Python build."""

# Keys that say how to train, how to run, or what to print, in every family.
HARMLESS = frozenset(
    """_name_or_path _num_labels architectures attention_dropout attn_implementation _attn_implementation
    chunk_size_feed_forward dtype finetuning_task id2label initializer_range label2id output_past
    transformers.js_config name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix
    pretraining_tp problem_type return_dict sep_token_id task_specific_params tf_legacy_loss tokenizer_class
    torch_dtype torchscript transformers_version unk_token_id use_bfloat16 use_cache diversity_penalty do_sample
    early_stopping length_penalty max_length num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values return_dict_in_generate temperature top_k top_p typical_p""".split()
)
# Keys that `load` or every config map reads.
USED = frozenset(
    """bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id encoder_no_repeat_ngram_size
    encoder_repetition_penalty eos_token_id exponential_decay_length_penalty force_bos_token_to_be_generated
    forced_bos_token_id forced_eos_token_id guidance_scale min_length min_new_tokens model_type no_repeat_ngram_size
    renormalize_logits repetition_penalty sequence_bias suppress_tokens tie_word_embeddings vocab_size
    watermarking_config""".split()
)
# Keys that change what the model computes in a way that no family here implements: key -> values that change nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The three lists of one family, beside those that all families share.

    Args:
        used: keys that the config map reads.
        harmless: keys that change nothing here.
        refused: key to the values that change nothing; any other value is an error.
    """

    used: frozenset[str]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def check(self, hf: Mapping[str, Any]) -> list[str]:
        """Refuses what would change the result, and names what nobody listed.

        Args:
            hf: config.json.

        Returns:
            The keys that stand in no list.

        Raises:
            CheckpointError: a refused key with another value than its default.
        """
        refused = {**REFUSED, **self.refused}
        bad = [
            f"{key} = {show(hf[key])} (only {' or '.join(map(json.dumps, allowed))})"
            for key, allowed in refused.items()
            if key in hf and not any(type(hf[key]) is type(v) and hf[key] == v for v in allowed)
        ]
        if bad:
            raise CheckpointError(f"config.json asks for what kvjax does not compute: {'; '.join(bad)}")
        return sorted(set(hf) - USED - HARMLESS - self.used - self.harmless - refused.keys())


def report(unknown: Sequence[str], strict: bool) -> None:
    """A warning that names unknown keys, or under `strict` a CheckpointError."""
    if not unknown:
        return
    message = f"config.json: unknown keys {', '.join(map(ascii, unknown))}: they may change what the model computes"
    if strict:
        raise CheckpointError(message)
    warnings.warn(message, stacklevel=4)  # the caller of load


__all__ = ["Fields", "Keys", "MOST_LAYERS", "report"]
