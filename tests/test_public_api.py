"""The public API in one list: what changes in it shows in a diff of tests/public_api.txt."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "public_api.py"
public_api = importlib.util.module_from_spec(importlib.util.spec_from_file_location("public_api", SCRIPT))
public_api.__spec__.loader.exec_module(public_api)


def test_the_list_is_that_of_the_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["public_api.py", "--check"])
    assert public_api.main() == 0, f"meant? then: python scripts/public_api.py\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", public_api.MODULES)
def test_what_a_module_offers_is_in_its_list_in_order(name):
    module = public_api.module(name)
    assert module.__all__ == sorted(set(module.__all__))
    for public in module.__all__:
        assert getattr(module, public) is not None
    unlisted = {
        public
        for public, value in vars(module).items()
        if not (public.startswith("_") or public.isupper())
        and (inspect.isclass(value) or inspect.isroutine(value))
        # what a file imports for itself is not offered; what a package imports is
        and str(value.__module__).startswith("kvjax" if hasattr(module, "__path__") else module.__name__)
    }
    assert unlisted <= set(module.__all__)


def test_another_parameter_name_or_member_shows(monkeypatch):
    def before(model, *, plan=None, _run=None):
        pass

    def after(model, *, kind=None, _run=None):
        pass

    class Made:
        def method(self, x, *rest):
            pass

        _own = method
        size = property(lambda self: 1)

    Made.method.__module__ = "kvjax.x"
    lines = {}
    for which in (before, after):
        made = SimpleNamespace(__all__=["f", "Made", "K"], f=which, Made=Made, K=(1, 2))
        monkeypatch.setattr(public_api, "module", lambda name, made=made: made)
        lines[which] = public_api.listed(("x",)).splitlines()
    assert lines[before] == [
        "x.f(model, *, plan=)",
        "x.Made(): class",
        "x.Made.method(x, *rest)",
        "x.Made.size",
        "x.K: tuple",
    ]
    assert lines[after] == ["x.f(model, *, kind=)", *lines[before][1:]]
