"""Samplers: small pytrees whose structure is static and whose numbers are array leaves, one for all rows or one a row.

A sampler is called as `sampler(logits [B, V], keys [B], text) -> tokens [B]`, a filter as `filter(logits, text) ->
logits`; `chain` applies filters in order and draws, `greedy` takes the largest. Another number compiles nothing.
"""

from kvjax.sampling.contract import Filter, Sampler, Text
from kvjax.sampling.drawing import Chain, Greedy, chain, checked, greedy, largest, position_keys, row_keys
from kvjax.sampling.lists import banned
from kvjax.sampling.thresholds import temperature, top_k, top_p

FILTERS = (temperature, top_k, top_p, banned)
"""Every filter; the shared tests run over them."""

__all__ = [
    "FILTERS",
    "Filter",
    "Sampler",
    "Text",
    "Chain",
    "Greedy",
    "greedy",
    "chain",
    *(each.__name__ for each in FILTERS),
    "checked",
    "largest",
    "row_keys",
    "position_keys",
]
