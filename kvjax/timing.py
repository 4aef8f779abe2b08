"""What JAX itself reports of its compilations: how many, and how long they took."""

from __future__ import annotations

import dataclasses
from types import TracebackType

import jax

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_open: list[Compilations] = []


@dataclasses.dataclass
class Compilations:
    """Counts compilations while it is open: `with Compilations() as made: …; made.count, made.seconds`.

    Args:
        count: programs handed to the compiler (or fetched from its persistent cache).
        seconds: time in tracing, lowering and compiling, in seconds.
    """

    count: int = 0
    seconds: float = 0.0

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


def _heard(event: str, seconds: float, **details: object) -> None:
    stage = _EVENTS.get(event)
    for each in _open:
        if stage is not None:
            each.seconds += seconds
            each.count += stage == "compile"


__all__ = ["Compilations"]
