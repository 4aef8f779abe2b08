"""Devices as data: what they hold, read and multiply. By name from datasheets, or measured."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kvjax.errors import InputError
from kvjax.types import DType


class Rate(NamedTuple):
    """How fast matrices are read by a product with some rows, measured.

    Args:
        rows: of the other factor.
        nbytes: of all matrices that are read in turn.
        bandwidth: bytes/s of them.
    """

    rows: int
    nbytes: int
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do.

    Args:
        name: for people.
        memory: bytes.
        bandwidth: bytes/s that its memory gives.
        flops: pairs of a dtype's name and FLOP/s of dense products of matrices of it.
        host: bytes/s copied from the host's memory to its own; None where both are one.
        source: where the figures come from.
        rates: measured: products with few rows; empty: a datasheet has none.
        layer_seconds: measured: of a step that moves next to nothing, for each layer.
        logit_seconds: measured: of choosing a token, for each logit of a row.
    """

    name: str
    memory: int
    bandwidth: float
    flops: tuple[tuple[str, float], ...]
    host: float | None
    source: str
    rates: tuple[Rate, ...] = ()
    layer_seconds: float = 0.0
    logit_seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flops", tuple((str(name), float(rate)) for name, rate in self.flops))
        object.__setattr__(self, "rates", tuple(Rate(*rate) for rate in self.rates))
        for name in ("memory", "bandwidth"):
            if not getattr(self, name) > 0:
                raise InputError(f"Device {self.name}: {name} must be more than 0, not {getattr(self, name)}")

    def flops_of(self, dtype: DType) -> float:
        """FLOP/s of products in a dtype.

        Raises:
            InputError: there is no figure for it.
        """
        name = jnp.dtype(dtype).name
        if name not in dict(self.flops):
            known = ", ".join(dict(self.flops))
            raise InputError(f"estimate: dtype {name} has no rate on device {self.name}; it has {known}")
        return dict(self.flops)[name]

    def reading(self, rows: int, nbytes: float) -> float:
        """Bytes/s at which matrices of so many bytes in all are read by a product with some rows.

        Between what was measured, time per byte goes as a power of rows and of bytes; outside, as at the edge, but that
        more rows take as much longer as they are more. Without measurements: the memory's bandwidth.
        """
        if not self.rates:
            return self.bandwidth
        found = {at: [r for r in self.rates if r.rows == at] for at in sorted({r.rows for r in self.rates})}
        slowness = []
        for measured in found.values():
            measured = sorted(measured, key=lambda rate: rate.nbytes)
            x, y = zip(*((math.log(r.nbytes), -math.log(r.bandwidth)) for r in measured), strict=True)
            slowness.append(np.interp(math.log(max(nbytes, 1)), x, y))
        more = max(rows / max(found), 1)
        return math.exp(-float(np.interp(math.log(rows), [math.log(at) for at in found], slowness))) / more


GB, TB, TFLOP = 10**9, 10**12, 10**12
HOPPER = (("float32", 67 * TFLOP), ("bfloat16", 989.4 * TFLOP), ("float16", 989.4 * TFLOP))
TENSOR = "tensor cores without sparsity, float32 without tensor cores; the host's link one way"

DEVICES = (
    Device(
        "T4",
        16 * GB,
        320 * GB,
        (("float16", 65 * TFLOP), ("float32", 8.1 * TFLOP)),
        16 * GB,
        f"NVIDIA T4 datasheet and Turing whitepaper (2018): {TENSOR}; it has no bfloat16",
    ),
    Device(
        "L4",
        24 * GB,
        300 * GB,
        (("bfloat16", 121 * TFLOP), ("float16", 121 * TFLOP), ("float32", 30.3 * TFLOP)),
        32 * GB,
        f"NVIDIA L4 datasheet (2023): {TENSOR}",
    ),
    Device(
        "A100",
        80 * GB,
        2039 * GB,
        (("bfloat16", 312 * TFLOP), ("float16", 312 * TFLOP), ("float32", 19.5 * TFLOP)),
        32 * GB,
        f"NVIDIA A100 datasheet (2021), 80 GB SXM: {TENSOR}",
    ),
    Device(
        "A100-40GB",
        40 * GB,
        1555 * GB,
        (("bfloat16", 312 * TFLOP), ("float16", 312 * TFLOP), ("float32", 19.5 * TFLOP)),
        32 * GB,
        f"NVIDIA A100 datasheet (2021), 40 GB: {TENSOR}",
    ),
    Device("H100", 80 * GB, 3350 * GB, HOPPER, 64 * GB, f"NVIDIA H100 datasheet (2023), SXM: {TENSOR}"),
    Device("H200", 141 * GB, 4800 * GB, HOPPER, 64 * GB, f"NVIDIA H200 datasheet (2024), SXM: {TENSOR}"),
    Device("TPU v5e", 16 * GB, 819 * GB, (("bfloat16", 197 * TFLOP),), 15 * GB, "Google Cloud, TPU v5e, one chip"),
    Device("TPU v5p", 95 * GB, 2765 * GB, (("bfloat16", 459 * TFLOP),), 15 * GB, "Google Cloud, TPU v5p, one chip"),
    Device("TPU v6e", 32 * GB, 1638 * GB, (("bfloat16", 918 * TFLOP),), 15 * GB, "Google Cloud, TPU v6e, one chip"),
)
"""Datasheet figures of one device each, rates dense. NVIDIA: datasheets, whose rates with sparsity are halved and whose
PCIe figures for both ways together are halved. TPU: the pages "System architecture" of Google Cloud; the link to the
host is the 1.5e10 bytes/s of the JAX scaling book, chapter 2, for v6e, and assumed for the others."""


def named(name: str) -> Device:
    """The device of `DEVICES` with a name, in capitals or not, "TPU" or spaces left out or not.

    Raises:
        InputError: there is none; names those that there are.
    """

    def plain(text: str) -> str:
        return "".join(x for x in text.lower().replace("tpu", "") if x.isalnum())

    for device in DEVICES:
        if plain(name) == plain(device.name):
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise InputError(f"estimate: device {name!r} is none of {known}; or here, to measure this one")


__all__ = ["Device", "Rate", "DEVICES", "named"]
