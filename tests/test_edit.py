"""Promise: an edit in the middle of a cache gives what prefilling the whole new text gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import CacheError, InputError, caches
from kvjax.caches.flags import CAPACITY, COUNT, REWIND
from kvjax.loops import rework
from kvjax.testing import edits
from kvjax.testing.cases import prompt_ids

CASES = {case.name: case for case in (*kinds.cases(), *kinds.of_sources())}
SCRIPTED = [CASES[name] for name in ("dense", "ring", "paged and shared")]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(SCRIPTED))
def test_any_script_of_edits_leaves_the_cache_of_the_new_text(data, case):
    edits.edits(case, lambda low, high: data.draw(st.integers(low, high)), count=2)


@pytest.mark.full
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.parametrize("case", list(CASES.values()), ids=str)
def test_any_script_of_edits_leaves_the_cache_of_the_new_text_in_every_kind(data, case):
    edits.edits(case, lambda low, high: data.draw(st.integers(low, high)), count=2)
