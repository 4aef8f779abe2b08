"""What the documents say is so: their code runs, their links lead somewhere, their first lines are the two commands."""

import ast
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


KINDS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/kinds.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.full
def test_the_walk_through_of_a_kind_of_ones_own_runs_in_order(capsys):
    names = {"__name__": "kinds"}
    assert len(KINDS) >= 4
    for text in KINDS:
        exec(compile(text, "kinds.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "rewind " in shown and "FAILED" in shown and "equal" in shown


def test_a_kind_of_ones_own_is_forty_lines():
    assert 20 < lines_of(KINDS[0], "Backwards", "BackwardsKind") <= 40


def lines_of(source, *classes):
    """Lines of some definitions, without blanks, comments and docstrings; all definitions if none are named."""
    kept = set()
    for node in ast.parse(source).body:
        named = getattr(node, "name", None)
        if named is None or (classes and named not in classes):
            continue
        begin = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        kept |= set(range(begin, node.end_lineno + 1))
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
                kept -= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    text = source.splitlines()
    return sum(1 for number in kept if text[number - 1].split("#")[0].strip())


def test_a_layout_is_at_most_sixty_lines():
    source = (ROOT / "kvjax/caches/dense.py").read_text("utf-8")
    assert 20 < lines_of(source) <= 60


@pytest.mark.full
@pytest.mark.parametrize("script", sorted(set(re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)", README))))
def test_a_script_that_the_readme_names_says_what_it_does(script):
    ran = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout
