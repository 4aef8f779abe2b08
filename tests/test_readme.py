"""What the documents say is so: their code runs, their links lead somewhere, their first lines are the two commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_lines_are_the_two_commands_of_a_new_user():
    kind, text = BLOCKS[0]
    assert README.startswith("```sh\n")
    assert text.splitlines() == ['pip install -e . && kvjax generate "ROMEO:"', "pip install -e '.[test]' && pytest"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.full
def test_the_code_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    python = [text for kind, text in BLOCKS if kind == "python"]
    assert len(python) >= 4
    for text in python:
        exec(compile(text, "README.md", "exec"), names)


@pytest.mark.full
@pytest.mark.parametrize("script", sorted(set(re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)", README))))
def test_a_script_that_the_readme_names_says_what_it_does(script):
    ran = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout
