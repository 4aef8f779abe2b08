"""What every benchmark here shares: which machine and versions, medians, and one JSON file a device and a question."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import kvjax

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def median(values: Sequence[float]) -> float:
    """The middle one; the mean of the two middle ones."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def facts(cores: int | None = None) -> dict[str, Any]:
    """Machine, versions and day; `cores` where a benchmark used fewer than there are."""
    return {
        "processor": processor(),
        "cores": cores or os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "kvjax": kvjax.__version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device_name() -> str:
    """A folder's name for the device that JAX chooses: `cpu`, `nvidia-h200`, `tpu-v5-lite`."""
    import jax

    device = jax.devices()[0]
    return re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")


def save(name: str, result: dict[str, Any], device: str | None = None) -> Path:
    """Writes `results/<device>/<name>.json`."""
    path = RESULTS / (device or device_name()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return path
