"""Array aliases and the one table of axis letters that shape comments use.

==  =================================  ==  =================================
B   batch (rows)                       K   key-value heads
S   new tokens in one call             G   query heads per key-value head
T   cache slots                        H   query heads, H = K * G
L   layers                             D   head width
M   model width                        F   feed-forward width
V   vocabulary                         R   rows of a view: 1, B or a divisor
N   B * K, the packed leading axis     P   pages
W   rows that may read one page
==  =================================  ==  =================================
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
DType: TypeAlias = Any
Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays with stable names, see `kvjax.params.declare`."""

__all__ = ["Array", "DType", "Params"]
