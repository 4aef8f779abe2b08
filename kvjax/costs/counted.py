"""FLOPs counted in a traced program, by the named scopes that the layers carry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.costs.work import Flops
from kvjax.errors import InputError

COMPONENTS = frozenset({"projections", "scores", "ffn", "head", "norms"})
"""Names of scopes; the innermost one counts."""

ELEMENTWISE = frozenset(
    "add sub mul div neg max min pow integer_pow square rsqrt sqrt exp log tanh logistic erf abs".split()
)
SUMS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})
OPAQUE = frozenset({"pallas_call", "ffi_call", "custom_call", "pure_callback", "io_callback", "ragged_dot_general"})


def count_flops(function: Callable[..., Any], *args: Any, trips: int | None = None, within: str | None = None) -> Flops:
    """Traces `function(*args)` without running it and counts what its program contains.

    Contractions (`dot_general`) count 2 per product, whatever XLA makes of them; norms count floating elementwise
    operations and sums on what they norm, not on their parameters (one axis). Loops count as often as they run,
    branches as their dearest one.

    Args:
        function: jitted or not; its scopes name the components.
        args: arrays or `jax.ShapeDtypeStruct`.
        trips: how often a `while` loop runs; the program does not say.
        within: count only what lies in a scope of this name, as "cross_attention" or "encoder"; None: everything.

    Raises:
        InputError: a `while` loop contracts something and `trips` is None, or a call cannot be looked into.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, (), _Asked(trips, within))


class _Asked(NamedTuple):
    trips: int | None
    within: str | None


def _count(jaxpr: Any, scopes: tuple[str, ...], asked: _Asked) -> Flops:
    total = Flops()
    for eqn in jaxpr.eqns:
        inside = scopes + tuple(re.findall(r"\w+", str(eqn.source_info.name_stack)))
        total += _equation(eqn, inside, asked)
    return total


def _equation(eqn: Any, scopes: tuple[str, ...], asked: _Asked) -> Flops:
    name = eqn.primitive.name
    if name in OPAQUE:
        raise InputError(f"count_flops: {name} cannot be looked into")
    if name == "scan":
        return _count(eqn.params["jaxpr"].jaxpr, scopes, asked) * eqn.params["length"]
    if name == "while":
        return _repeated(eqn, scopes, asked)
    if name == "cond":
        branches = [_count(branch.jaxpr, scopes, asked) for branch in eqn.params["branches"]]
        return max(branches, key=lambda made: made.contractions)
    inner = list(_inner(eqn.params))
    if inner:
        return sum((_count(jaxpr, scopes, asked) for jaxpr in inner[:1]), Flops())
    if asked.within is not None and asked.within not in scopes:
        return Flops()
    found = [scope for scope in scopes if scope in COMPONENTS]
    component = found[-1] if found else "other"
    if name == "dot_general":
        return Flops(**{component: _dot(eqn)})
    made = eqn.outvars[0].aval
    if component != "norms" or made.ndim < 2 or not jnp.issubdtype(made.dtype, jnp.floating):
        return Flops()
    return Flops(norms=made.size if name in ELEMENTWISE else eqn.invars[0].aval.size if name in SUMS else 0)


def _repeated(eqn: Any, scopes: tuple[str, ...], asked: _Asked) -> Flops:
    once = _count(eqn.params["body_jaxpr"].jaxpr, scopes, asked)
    if once == Flops():
        return once
    if asked.trips is None:
        raise InputError("count_flops: a while loop contracts something, and how often it runs is not in the program")
    return once * asked.trips


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    # jit, remat, custom derivatives: the program that runs is the first one
    for value in params.values():
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


__all__ = ["count_flops", "COMPONENTS"]
