"""What is released is whole: a wheel with the models and nothing else, a source distribution that can be tested."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import kvjax

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCAL = ("build", "dist", "__pycache__", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"

pytestmark = pytest.mark.full


def clean(home):
    """A fresh user: nothing of this process's settings."""
    own = ("KVJAX_", "JAX_", "XLA_", "XDG_", "PYTHON", "PIP_TARGET")
    return {k: v for k, v in os.environ.items() if not k.startswith(own)} | {"HOME": str(home)}


def ran(argv, folder, home):
    made = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=clean(home))
    assert made.returncode == 0, made.stdout + made.stderr
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of a source distribution, made of what belongs to the project, and of the wheel made from that."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "kvjax"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "*.egg-info", *LOCAL))
    made = [ran([sys.executable, "-c", BUILD.format("sdist"), str(out)], tree, home)]
    (source,) = out.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(source) as archive:
        archive.extractall(unpacked, filter="data")
    (inside,) = unpacked.iterdir()
    made.append(ran([sys.executable, "-c", BUILD.format("wheel"), str(out)], inside, home))
    assert not [line for each in made for line in each.stderr.splitlines() if "absent from" in line or "rror" in line]
    return out


def test_the_wheel_holds_the_package_its_models_and_its_licence_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"kvjax-{kvjax.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [p for p in (ROOT / "kvjax").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    own = {name for name in names if name.startswith("kvjax/")}
    assert own == {p.relative_to(ROOT).as_posix() for p in package}
    assert {"kvjax/py.typed", "kvjax/bundled/shakespeare-draft/model.safetensors"} <= own
    info = f"kvjax-{kvjax.__version__}.dist-info"
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert names - own == {f"{info}/{name}" for name in files}
    assert sum(x.file_size for x in zipfile.ZipFile(wheel).infolist()) < 20 * 2**20


def test_its_metadata_are_those_of_the_project_and_no_link_of_its_page_is_relative(built):
    (wheel,) = built.glob("*.whl")
    info = f"kvjax-{kvjax.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        told = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert archive.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]",
            "kvjax",
            "=",
            "kvjax.cli:main",
        ]
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("kvjax", kvjax.__version__, "Apache-2.0")
    assert told["Requires-Python"] == PROJECT["requires-python"] and told["Summary"] == PROJECT["description"]
    assert sum("extra ==" not in each for each in told.get_all("Requires-Dist")) == len(PROJECT["dependencies"])
    assert set(told.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert {each.split(", ")[0] for each in told.get_all("Project-URL")} >= {"Source", "Documentation", "Issues"}
    assert told["Description-Content-Type"] == "text/markdown"
    text, readme = told.get_payload(), (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", readme)) > 5
    assert [a or b for a, b in links if not (a or b).startswith(("https://", "http://", "#"))] == []
    here = re.findall(r"github\.com/kvjax/kvjax/blob/main/([^)#]+)", text)
    assert here and [path for path in here if not (ROOT / path).exists()] == []


def test_the_source_distribution_can_be_tested(built):
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    needed = [*ROOT.glob("*.md"), *(p for p in ROOT.rglob("*") if p.is_file())]
    own = {p.relative_to(ROOT) for p in needed}
    folders = ("tests", "docs", "scripts", "benchmarks", "notebooks", "kvjax", ".ci")
    kept = {p.as_posix() for p in own if p.parts[0] in folders and not set(p.parts) & set(LOCAL) and p.suffix != ".pyc"}
    assert kept | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.py"} <= names


def test_what_the_wheel_installs_speaks_from_an_empty_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    ran([*pip, "--target", str(target), str(wheel)], empty, tmp_path)
    # In front of whatever else of that name is installed here; the dependencies are those of this environment.
    own = "import sys; sys.path.insert(0, sys.argv.pop(1)); import kvjax, kvjax.cli; "
    say = [
        sys.executable,
        "-I",
        "-c",
        own + "assert kvjax.__file__.startswith(sys.path[0]); sys.exit(kvjax.cli.main())",
    ]
    said = ran([*say, str(target), "generate", "ROMEO:", "--max-new-tokens", "40"], empty, tmp_path)
    assert len(said.stdout) > 60 and "40 new" in said.stderr
    assert list(empty.iterdir()) == []
