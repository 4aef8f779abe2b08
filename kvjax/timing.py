"""What JAX itself reports of its compilations: how many, and how long they took; and on which processor."""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from pathlib import Path
from types import TracebackType

import jax

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_open: list[Compilations] = []


@dataclasses.dataclass(eq=False)
class Compilations:
    """Counts compilations while it is open: `with Compilations() as made: …; made.count, made.seconds`.

    Args:
        count: programs handed to the compiler (or fetched from its persistent cache).
        seconds: wall-clock time in tracing, lowering and compiling, in seconds.
    """

    count: int = 0
    _spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """See the class."""
        return sum((end - start for start, end in self._spans), 0.0)

    def _add(self, start: float, end: float) -> None:
        # JAX reports a jitted function inside another one twice: on its own, and within the outer one's time.
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    def __enter__(self) -> Compilations:
        _listen()
        _open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _open.remove(self)


_listening: list[bool] = []


def _listen() -> None:
    # JAX offers no public way to stop listening, so one listener serves all.
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_heard)
        _listening.append(True)


def _heard(event: str, duration_secs: float, **details: str | int) -> None:
    stage, now = _EVENTS.get(event), time.perf_counter()
    if stage is not None:
        for each in _open:
            each._add(now - duration_secs, now)
            each.count += stage == "compile"


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


__all__ = ["Compilations", "processor"]
