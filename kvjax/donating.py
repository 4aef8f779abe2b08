"""The twins of `prefill`, `step` and `decode` that use up the cache they are given: its buffers become the result's.

`logits, cache = kvjax.donating.step(model, cache, tokens)`; the old `cache` must not be used again.
"""

from __future__ import annotations

import functools

from kvjax.loops import decode as _loop

prefill = functools.partial(_loop.prefill, _donate=True)
step = functools.partial(_loop.step, _donate=True)
decode = functools.partial(_loop.decode, _donate=True)

__all__ = ["prefill", "step", "decode"]
