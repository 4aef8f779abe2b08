"""Writes tests/public_api.txt: every public name with its parameters, so that a change of them shows in a diff.

python scripts/public_api.py
python scripts/public_api.py --check        (only whether the list is that of the code)
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIST = Path(__file__).resolve().parent.parent / "tests" / "public_api.txt"
MODULES = (
    "kvjax",
    "kvjax.approximate",
    "kvjax.bridge.linen",
    "kvjax.bridge.nnx",
    "kvjax.caches",
    "kvjax.codecs",
    "kvjax.costs",
    "kvjax.donating",
    "kvjax.planner",
    "kvjax.sampling",
    "kvjax.testing",
)
"""As a user reaches them; what else there is may change at any time."""


def module(name: str) -> Any:
    """The module of that public name; `kvjax.codecs` is no module by itself."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, last = name.rpartition(".")
        return getattr(importlib.import_module(package), last)


def listed(names: tuple[str, ...] = MODULES) -> str:
    """A line for each public name of some modules, and for each public member of a class where it is named first."""
    told: set[Any] = set()
    return "".join(f"{line}\n" for name in names for line in _lines(name, module(name), told))


def _lines(where: str, package: Any, told: set[Any]) -> Iterator[str]:
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.ismodule(value):
            yield f"{where}.{name}: module"
        elif inspect.isclass(value):
            yield f"{where}.{name}{_parameters(value)}: class"
            if value not in told:
                yield from (f"{where}.{name}.{each}" for each in _members(value))
            told.add(value)
        elif callable(value):
            yield f"{where}.{name}{_parameters(value)}"
        else:
            yield f"{where}.{name}: {type(value).__name__}"


def _members(value: type) -> Iterator[str]:
    """Methods and properties that a class of ours has itself; fields are parameters."""
    fields = getattr(value, "__dataclass_fields__", ())
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, property):
            yield name
        elif isinstance(member, classmethod | staticmethod):
            yield f"{name}{_parameters(member.__func__)}"
        elif inspect.isfunction(member) and member.__module__.startswith("kvjax"):
            yield f"{name}{_parameters(member)}"


def _parameters(function: Any) -> str:
    """`(model, tokens, valid=, *, plan=)`: names, and whether there is a default; private ones are left out."""
    found, keywords = [], False
    try:
        parameters = inspect.signature(function).parameters.values()
        if inspect.isclass(function) and [each.name for each in parameters] == ["args", "kwargs"]:
            parameters = inspect.signature(function.__init__).parameters.values()  # nnx takes any, and passes them on
    except ValueError:  # what is made elsewhere does not tell
        return "(…)"
    for each in parameters:
        if each.name.startswith("_") or each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not keywords:
            found, keywords = [*found, "*"], True
        keywords = keywords or each.kind is each.VAR_POSITIONAL
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        found.append(f"{stars}{each.name}" + "=" * (each.default is not each.empty))
    return f"({', '.join(found)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    check, made = parser.parse_args().check, listed()
    if not check:
        LIST.write_text(made, "utf-8")
        return 0
    differ = list(
        difflib.unified_diff(LIST.read_text("utf-8").splitlines(), made.splitlines(), "list", "code", lineterm="")
    )
    print("\n".join(differ) or "the list is that of the code", file=sys.stderr if differ else sys.stdout)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
