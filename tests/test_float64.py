"""Promise: in float64 every exact kind gives the logits of recomputing to 1e-12 of the largest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("which", ["main", pytest.param("full", marks=pytest.mark.full)])
def test_float64_logits_equal_recomputed_ones_to_twelve_digits(which):
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", str(HERE / "in_float64.py"), which]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("e-1") >= 3
