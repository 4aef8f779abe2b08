"""Run with JAX_ENABLE_X64=1 by test_float64.py: every kind against its reference, position by position, in float64."""

from __future__ import annotations

import sys

import jax
import kinds

from kvjax.testing import promises


def main(full: bool) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.config.jax_enable_x64
    for case in (*kinds.cases(), *(kinds.of_sources() if full else ())):
        if case.exact and (full or not case.full):
            print(f"{case.name}: {promises.same_logits(case):.1e}")


main("full" in sys.argv[1:])
