"""Samplers: small pytrees whose structure is static and whose numbers are array leaves, one for all rows or one a row.

A sampler is called as `sampler(logits [B, V], keys [B], text) -> tokens [B]`, a filter as `filter(logits, text) ->
logits`; `chain` applies filters in order and draws, `greedy` takes the largest. Another number compiles nothing, nor
does another list of ids in the same bucket.
"""

from kvjax.sampling.contract import Filter, Sampler, Text
from kvjax.sampling.drawing import Chain, Greedy, chain, checked, greedy, largest, position_keys, row_keys
from kvjax.sampling.lengths import banned_first, forced_first, forced_last, min_length, min_new_tokens
from kvjax.sampling.lists import allowed, banned, logit_bias
from kvjax.sampling.penalties import frequency_penalty, no_repeat_ngram, presence_penalty, repetition_penalty
from kvjax.sampling.sequences import bad_words, sequence_bias
from kvjax.sampling.thresholds import min_p, temperature, top_k, top_p, typical

FILTERS = (
    temperature,
    top_k,
    top_p,
    min_p,
    typical,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    no_repeat_ngram,
    logit_bias,
    allowed,
    banned,
    banned_first,
    bad_words,
    sequence_bias,
    min_length,
    min_new_tokens,
    forced_first,
    forced_last,
)
"""Every filter; the shared tests run over them."""

__all__ = [
    "Chain",
    "FILTERS",
    "Filter",
    "Greedy",
    "Sampler",
    "Text",
    "allowed",
    "bad_words",
    "banned",
    "banned_first",
    "chain",
    "checked",
    "forced_first",
    "forced_last",
    "frequency_penalty",
    "greedy",
    "largest",
    "logit_bias",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram",
    "position_keys",
    "presence_penalty",
    "repetition_penalty",
    "row_keys",
    "sequence_bias",
    "temperature",
    "top_k",
    "top_p",
    "typical",
]
