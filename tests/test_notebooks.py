"""Notebooks: the text that people read is what Colab opens; each runs anywhere, quietly, and installs no other jax."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_house import HOSTS, MACHINE

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import notebooks

TEXTS = notebooks.texts()
each_notebook = pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/kvjax/kvjax/blob/main/notebooks/{}.ipynb)"
)
STYLE = (
    'plt.style.use(["tableau-colorblind10", {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False}])'
)
INSTALL = notebooks.notebook(TEXTS[0].read_text("utf-8")).cells[1].source
SITE = "https://github.com/kvjax/kvjax"

OFFLINE = """
import socket

def refuse(connect):
    def only_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(101, f"no network in this test: {address}")
        return connect(self, address)
    return only_here

def nowhere(host, *args, _known=socket.getaddrinfo, **options):
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        raise socket.gaierror(-2, f"no network in this test: {host}")
    return _known(host, *args, **options)

socket.socket.connect, socket.socket.connect_ex = map(refuse, (socket.socket.connect, socket.socket.connect_ex))
socket.getaddrinfo = nowhere
"""
"""What Python reads as it starts: nothing is reached but the kernel's own sockets."""


def outputs(found):
    for i, cell in enumerate(found.cells):
        yield from ((i, output) for output in cell.get("outputs", ()))


def shown(output):
    """All text of an output, whatever its form."""
    texts = [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join([*texts, output.get("text", ""), *output.get("traceback", ())])


def unwelcome(found, *places):
    """What no reader should see in outputs: errors, warnings, names of the machine that it ran on."""
    for i, output in outputs(found):
        text = shown(output)
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"cell {i}: {text}"
        if re.search(rf"{MACHINE}|{HOSTS}|Warning\b", text) or any(place in text for place in places):
            yield f"cell {i} shows {text}"


@each_notebook
def test_what_colab_opens_is_made_of_the_text_and_was_executed(text):
    assert list(notebooks.differences(text)) == []
    pair = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(pair)
    assert list(unwelcome(pair)) == []
    counts = [cell.execution_count for cell in pair.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run once, from the top"
    assert text.with_suffix(".ipynb").stat().st_size < 400_000


@each_notebook
def test_nothing_that_changes_with_every_run_is_kept(text):
    pair = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    assert [cell.metadata for cell in pair.cells] == [{}] * len(pair.cells)
    assert pair.metadata == notebooks.notebook("").metadata
    assert [cell.id for cell in pair.cells] == [cell.id for cell in notebooks.notebook(text.read_text("utf-8")).cells]


@each_notebook
def test_the_front_has_the_badge_the_one_install_cell_and_the_colours(text):
    cells = notebooks.notebook(text.read_text("utf-8")).cells
    assert cells[0].source.startswith(BADGE.format(text.stem))
    assert cells[1].source == INSTALL
    assert STYLE in cells[2].source
    rest = "\n".join(cell.source for cell in cells[2:] if cell.cell_type == "code")
    assert not re.search(r"\bpip\b|^\s*[%!]", rest, re.MULTILINE), "nothing else installs, and all of it is Python"


def test_differences_errors_warnings_and_places_are_found(tmp_path):
    text = tmp_path / "x.py"
    text.write_text("# %%\nprint(1)\n")
    assert "is not there" in next(notebooks.differences(text))
    pair = notebooks.notebook("# %%\nprint(2)\n")
    nbformat.write(pair, tmp_path / "x.ipynb")
    assert "cell 0" in next(notebooks.differences(text))
    made = nbformat.v4.new_output
    for output in (
        made("error", ename="E", evalue="", traceback=["E"]),
        made("stream", name="stderr", text="hm"),
        made("stream", name="stdout", text="x.py:1: UserWarning: hm"),
        made("execute_result", data={"text/plain": "'/" + "tmp/abc'"}),
        made("display_data", data={"text/html": "<b>here</b>"}),
    ):
        pair.cells[0].outputs = [output]
        assert list(unwelcome(pair, "here")) != []
    pair.cells[0].outputs = [made("stream", name="stdout", text="2")]
    assert list(unwelcome(pair, "here")) == []


@pytest.mark.parametrize("place", ["installed", "clone", "nowhere"])
def test_the_install_cell_uses_what_is_there_and_asks_for_no_other_jax(place, tmp_path, monkeypatch):
    ran, root = [], tmp_path / "checkout"
    (root / "kvjax" / "bundled").mkdir(parents=True)
    (root / "notebooks").mkdir()
    monkeypatch.setattr(subprocess, "run", lambda argv, check: ran.append((argv, check)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path if place == "nowhere" else root / "notebooks")
    if place != "installed":
        monkeypatch.setitem(sys.modules, "kvjax", None)  # its import fails, as where jax is missing
    exec(INSTALL, {})
    wanted = {"clone": f"{root}[plots]", "nowhere": f"kvjax[plots] @ git+{SITE}"}.get(place)
    assert ran == ([([sys.executable, "-m", "pip", "install", "-q", wanted], True)] if wanted else [])
    assert (str(root) in sys.path) == (place != "nowhere")


@pytest.mark.full
@each_notebook
def test_a_notebook_runs_in_an_empty_folder_and_home_without_a_network(text, tmp_path):
    home, folder, start = (tmp_path / name for name in ("home", "folder", "start"))
    for each in (home, folder, start):
        each.mkdir()
    (start / "sitecustomize.py").write_text(OFFLINE)
    environment = notebooks.at_home(home)
    environment["PYTHONPATH"] = f"{start}:{environment['PYTHONPATH']}"
    began = time.perf_counter()
    found = notebooks.executed(text.read_text("utf-8"), folder, environment)
    seconds = time.perf_counter() - began
    assert list(unwelcome(found, str(tmp_path))) == []
    assert seconds < notebooks.SECONDS, "60 s on two quiet cores; machines are noisy"


def test_a_notebook_in_a_test_reaches_no_network(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    code = "import socket; socket.create_connection(('{}', 443), 1)"
    for host in ("example.org", "192.0.2.1"):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(host)], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
        )
        assert "no network in this test" in ran.stderr
