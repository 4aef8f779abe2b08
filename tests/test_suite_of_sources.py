"""Promise: whatever is kept of a source, the contract suite of `kvjax.testing` holds beside it."""

from __future__ import annotations

import kinds
import pytest


@pytest.mark.parametrize(("check", "case"), list(kinds.each_check(kinds.of_sources())))
def test_what_is_kept_of_a_source_keeps_the_promise(check, case):
    check(case)
