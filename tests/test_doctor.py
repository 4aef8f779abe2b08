"""`kvjax doctor`: it names what is there, says what to do, and fails when something is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import pytest
from test_no_copy import CopyingKind

from kvjax import caches, cli
from kvjax.cli import check_machine
from kvjax.cli.check_machine import BAD, EXTRAS, LEAST, PYTHON, SETTINGS
from kvjax.testing import mutants, quick

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
QUICK = quick.quick


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs the command in a clean environment: `code, stdout, stderr`; without the promises."""
    for name in (*SETTINGS, "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", str(tmp_path / "compiled"))
    monkeypatch.setattr(quick, "quick", [])

    def run(*argv):
        code = cli.main(["doctor", *argv])
        return code, *capsys.readouterr()

    return run


def states(out):
    """State, what was found and advice, by name."""
    return {each["name"]: (each["state"], each["found"], each["advice"]) for each in json.loads(out)["findings"]}


def test_a_sound_machine_is_told_in_80_columns_and_the_exit_code_is_0(command, tmp_path):
    code, out, err = command()
    assert (code, err) == (0, "") and "FAILED" not in out and out.rstrip().endswith("ok")
    assert max(map(len, out.splitlines())) <= 80
    for name in (*LEAST, *EXTRAS, "Python", str(jax.devices()[0]), metadata.version("jax"), "writable"):
        assert name in out
    code, out, err = command("--json")
    assert (code, err, out.count("\n")) == (0, "", 1) and json.loads(out)["ok"] is True
    assert states(out)["folder"][:2] == ("ok", f"{tmp_path / 'compiled'}, writable; 0 files, 0.0 MiB")


def test_a_version_that_is_known_to_be_bad_too_old_or_missing_fails_with_what_to_install(command, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("optax", "jinja2"):
            raise metadata.PackageNotFoundError(name)
        return {"jax": "0.11.1", "flax": "0.10.7", "numpy": "2.0.0rc1"}.get(name) or real(name)

    monkeypatch.setattr(check_machine.metadata, "version", version)
    code, out, err = command("--json")
    found = states(out)
    assert (code, err) == (1, "") and json.loads(out)["ok"] is False
    assert found["jax"] == ("FAILED", f"0.11.1 {BAD['jax', '0.11.1']}", "pip install -U 'jax!=0.11.1'")
    assert found["flax"] == ("FAILED", f"0.10.7 is older than {LEAST['flax']}", "pip install -U 'flax>=0.11.2'")
    assert found["optax"][0] == "FAILED" and "pip install" in found["optax"][2]
    assert found["numpy"][0] == "ok"
    assert found["chat"][:2] == ("ok", "not installed; chat templates: pip install 'kvjax[chat]'")
    code, out, _ = command()
    assert code == 1 and "FAILED  jax              0.11.1 copies the whole cache" in out and "3 failed" in out
    assert max(map(len, out.splitlines())) <= 80


def test_no_device_fails_and_the_promises_are_left_out(command, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno such device")

    monkeypatch.setattr(check_machine.jax, "devices", none)
    monkeypatch.setattr(quick, "quick", [lambda case: pytest.fail("ran")])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code, out, _ = command("--json")
    said = "finds none: Unable to initialize backend 'cuda': no such device"
    assert code == 1 and states(out)["JAX"] == ("FAILED", said, "unset JAX_PLATFORMS")


def test_a_backend_that_there_is_not_is_found_and_not_a_traceback():
    environ = os.environ | {"JAX_PLATFORMS": "nonsense"}
    made = subprocess.run([sys.executable, "-m", "kvjax", "doctor", "--json"], capture_output=True, env=environ)
    state, _, advice = states(made.stdout)["JAX"]
    assert (made.returncode, made.stderr, state, advice) == (1, b"", "FAILED", "unset JAX_PLATFORMS")


def test_settings_and_a_folder_that_cannot_be_written_are_warnings(command, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", str(tmp_path / "file" / "x"))
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")
    code, out, _ = command("--json")
    found = states(out)
    assert code == 0 and found["folder"][0] == found["JAX_DEFAULT_MATMUL_PRECISION"][0] == "warning"
    assert "KVJAX_COMPILE_CACHE" in found["folder"][2] and "variables" not in found
    code, out, _ = command()
    assert "2 warnings" in out and max(map(len, out.splitlines())) <= 80


def two_is_three(case):
    """Two is three."""
    raise AssertionError("two is 2")


def test_a_promise_that_is_broken_fails(command, monkeypatch):
    monkeypatch.setattr(quick, "quick", [two_is_three])
    code, out, _ = command("--json")
    state, found, advice = states(out)["two is three"]
    assert (code, state, found) == (1, "FAILED", "two is 2; promised: Two is three.") and "report" in advice
    monkeypatch.setattr(quick, "quick", [lambda case: 1 / 0])
    code, _, err = command("--json")
    assert code == 1 and "ZeroDivisionError" in err, "what is no answer of a check is an error"


@pytest.mark.full
def test_a_cache_of_other_bytes_than_predicted_fails(command, monkeypatch):
    monkeypatch.setattr(quick, "quick", [quick.predicted_bytes])
    assert states(command("--json")[1])["predicted bytes"][0] == "ok"
    monkeypatch.setattr(quick, "CASE", quick.CASE.but(caches.dense(store="float16")))
    code, out, _ = command("--json")
    state, found, advice = states(out)["predicted bytes"]
    assert (code, state) == (1, "FAILED") and re.search(r"\d+ bytes of arrays.*predicted", found) and advice


@pytest.mark.full
def test_the_promises_hold_here_and_a_mutant_and_a_copy_are_found(command, monkeypatch):
    monkeypatch.setattr(quick, "quick", QUICK)
    jax.config.update("jax_debug_nans", True)  # with it nothing is donated, which is no fault of the machine
    try:
        code, out, _ = command("--json")
        assert jax.config.values["jax_debug_nans"]
    finally:
        jax.config.update("jax_debug_nans", False)
    names = {check.__name__.replace("_", " ") for check in QUICK}
    assert code == 0 and {states(out)[name][0] for name in names} == {"ok"}
    (mutant,) = (each for each in mutants.MUTANTS if each.name == "rewind a no-op")
    monkeypatch.setattr(quick, "CASE", mutant.of(quick.CASE))
    code, out, _ = command("--json")
    assert code == 1 and states(out)["rewind"][0] == "FAILED"
    monkeypatch.setattr(quick, "CASE", quick.CASE.but(CopyingKind("cast")))
    monkeypatch.setattr(quick, "quick", [quick.in_place])
    code, out, _ = command("--json")
    assert code == 1 and "it is copied" in states(out)["in place"][1]
    jax.clear_caches()


def test_versions_and_extras_are_those_of_the_project():
    parts = dict(re.match(r"([\w-]+)(.*)", each).groups() for each in PROJECT["dependencies"])
    least = {name: re.search(r">=([\d.]+)", rest).group(1) for name, rest in parts.items()}
    assert least | {"jaxlib": least["jax"]} == LEAST and f">={PYTHON}" == PROJECT["requires-python"]
    assert {(name, bad) for name, rest in parts.items() for bad in re.findall(r"!=([\d.]+)", rest)} == set(BAD)
    for extra, (package, least, _) in EXTRAS.items():
        assert PROJECT["optional-dependencies"][extra] == [f"{package}>={least}"]
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"test", "notebooks"}
