"""The twins of the functions that take a cache, which use it up: its buffers become the result's.

`logits, cache = kvjax.donating.step(model, cache, tokens)`; the old `cache` must not be used again, nor what was made
from it, or it from, by any operation (`rewind`, `release`, `resize`, a `take` that keeps a shared prefix, …): they may
share buffers, unless copied (`jax.tree.map(jnp.copy, cache)`). `decode_until` uses up the logits too.
"""

from __future__ import annotations

import functools

from kvjax.loops import decode as _loop
from kvjax.loops import edit as _edit
from kvjax.loops import resume as _resume
from kvjax.loops import rework as _rework

prefill = functools.partial(_loop.prefill, _run=_loop.DONATING)
step = functools.partial(_loop.step, _run=_loop.DONATING)
decode = functools.partial(_loop.decode, _run=_loop.DONATING)
decode_until = functools.partial(_loop.decode_until, _run=_loop.DONATING)
resume = functools.partial(_resume.resume, _run=_resume.DONATING)
edit = functools.partial(_edit.edit, _run=_rework.DONATING)
sync = functools.partial(_edit.sync, _run=_rework.DONATING)

__all__ = ["decode", "decode_until", "edit", "prefill", "resume", "step", "sync"]
