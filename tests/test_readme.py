"""What the documents say is so: code runs, commands exist, links lead somewhere, the first lines are two commands."""

import ast
import json
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from kvjax import cli, sampling
from kvjax.checkpoint.families import FAMILIES
from kvjax.cli.options import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its word, its text, and the line of the page on which the text begins."""

    word: str
    text: str
    line: int


def blocks(page, word=None):
    """Those of a page's text, all or of one word."""
    found = [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(page)]
    return [block for block in found if word in (None, block.word)]


def run(page, name):
    """Runs a page's Python in order, in one namespace; a traceback names the page and its line."""
    names = {"__name__": name.replace(".", "_")}
    for block in blocks(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), names)


def printed(page):
    """What a page's Python says that it prints, behind `# ->`."""
    return [line for block in blocks(page, "python") for line in re.findall(r"# -> (.*)", block.text)]


def untold(page, shown):
    """The first of those lines that was not printed in its turn, or None."""
    lines = iter(shown.splitlines())
    return next((wanted for wanted in printed(page) if wanted not in lines), None)


PYTHON = [path for path in DOCUMENTS if blocks(path.read_text("utf-8"), "python")]
PRINTED = {"kinds.md": ("rewind ", "FAILED", "equal")}
"""What a page's code must show, besides that it runs."""


def test_the_first_lines_are_the_two_commands_of_a_new_user():
    assert README.startswith("```sh\n")
    first, second = blocks(README)[0].text.splitlines()
    assert first == 'pip install -e . && kvjax generate "ROMEO:"'
    assert second == "pip install -e '.[test]' && pytest"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_index_of_docs_names_every_page_once():
    index = re.findall(r"\]\(([^)#]+\.md)\)", (ROOT / "docs/README.md").read_text("utf-8"))
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
    assert sorted(index) == [page for page in pages if page != "README.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_a_block_of_a_document_is_run_or_is_no_code(path):
    text = path.read_text("utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(text)), "a block that is not closed"
    assert {block.word for block in blocks(text)} <= {"python", "sh", "text", "json", ""}


@pytest.mark.full
@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.name)
def test_the_code_of_a_document_runs_in_order(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(text := path.read_text("utf-8"), path.name)
    shown = capsys.readouterr().out
    assert untold(text, shown) is None, shown
    assert all(piece in shown for piece in PRINTED.get(path.name, ()))


def test_the_documents_have_code_and_a_block_that_is_broken_is_found_at_its_line():
    assert len(PYTHON) >= 4 and sum(len(blocks(path.read_text("utf-8"), "python")) for path in PYTHON) >= 20
    assert set(PRINTED) <= {path.name for path in PYTHON}
    page = "# A page\n\n```python\none = 1\n```\n\n```sh\nls\n```\n\n```python\nassert one == 2\n```\n"
    with pytest.raises(AssertionError) as failed:
        run(page, "page.md")
    where = traceback.extract_tb(failed.tb)[-1]
    assert (where.filename, where.lineno) == ("page.md", 12)
    run(page.replace("== 2", "== 1"), "page.md")
    told = "```python\nprint(1)  # -> 1\nprint(2)  # -> 2\n```\n"
    assert untold(told, "1\n2\n") is None and untold(told, "2\n1\n") == "2" and untold(told, "1\n") == "2"


# Commands

OTHERS = {
    "pip": "installs, as .ci/run does in an empty place",
    "pytest": "runs these tests",
    "ruff": "is a stage of the work, not of the tests",
    "mypy": "is a stage of the work, not of the tests",
    ".ci/run": "runs these tests",
}
"""Commands that are neither ours nor Python's, and why they are not run."""

NOT_RUN = {
    r"kvjax .*\./": "the reader's own folder",
    r"kvjax .*--draft": "compiles four programs; tests/test_draft.py",
    r"kvjax estimate (?!.*--device)": "measures the machine; tests/test_estimate.py",
    r"kvjax chat": "talks with a person; tests/test_chat.py",
    r"kvjax compare": "minutes; docs/costs.md has what it prints, and a check of it",
}
"""Commands of ours that are only parsed, and why."""


def blocked(page):
    """The lines of a page's sh blocks."""
    return [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]


def mentioned(page):
    """What a page shows of commands of ours and Python's as code in its text."""
    return re.findall(r"(?<!`)`((?:python|kvjax) [^`\n]*)`(?!`)", page)


def commands(lines):
    """The commands in some lines of a shell, each a list of words."""
    found = []
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split, one = True, []
        for word in [*words, ";"]:
            if not re.fullmatch(r"[&|;<>]+", word):
                one.append(word)
                continue
            while one and re.fullmatch(r"[A-Z_]+=.*", one[0]):
                one = one[1:]
            found, one = [*found, *[one] * bool(one)], [">"] if ">" in word else []
    return [one for one in found if one[0] != ">"]


def everywhere(what):
    """Commands of all documents by their text; none with a gap, nor of the list of changes, nor of the page made of
    the parser, whose own test runs them."""
    pages = (path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "command_line.md"))
    lines = [line for path in pages for line in what(path.read_text("utf-8"))]
    return {shlex.join(one): one for one in commands(lines) if not {"…", "..."} & set(one)}


SHOWN = everywhere(blocked)
COMMANDS = SHOWN | everywhere(mentioned)
OURS = {text: one[1:] for text, one in COMMANDS.items() if one[0] == "kvjax"}
RUN = {text: words for text, words in OURS.items() if text in SHOWN}


def reason(text):
    """Why a command of ours is only parsed, or None."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def test_every_command_in_the_documents_is_one_that_is_run_or_looked_at():
    unknown = {one[0] for one in COMMANDS.values()} - {"kvjax", "python", *OTHERS}
    assert unknown == set(), "say in OTHERS why it is not run"
    assert len(OURS) >= 10 and len(COMMANDS) >= 40


def test_the_list_of_what_is_not_run_has_nothing_that_is_not_in_the_documents():
    assert all(any(re.search(pattern, text) for text in OURS) for pattern in NOT_RUN)
    assert all(any(one[0] == name for one in COMMANDS.values()) for name in OTHERS)
    assert sum(reason(text) is None for text in RUN) >= 5


@pytest.mark.parametrize("text", OURS)
def test_a_command_of_ours_has_the_options_that_it_is_shown_with(text):
    try:
        build_parser().parse_args(OURS[text])
    except SystemExit as stop:  # --help
        assert stop.code == 0


def test_a_command_that_does_not_exist_is_found(capsys):
    page = "`kvjax generate x --no-such-option` and\n```sh\nA=1 kvjax no-such-command  # a comment\n```\n"
    found = commands(blocked(page)) + commands(mentioned(page))
    assert found == [["kvjax", "no-such-command"], ["kvjax", "generate", "x", "--no-such-option"]]
    for one in found:
        with pytest.raises(SystemExit):
            build_parser().parse_args(one[1:])


@pytest.mark.full
def test_commands_of_ours_that_are_shown_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")
    (tmp_path / "names.txt").write_text("محمد\n", "utf-8")
    (tmp_path / "scene.txt").write_text("ROMEO:", "utf-8")
    for text, words in RUN.items():
        if reason(text) is None:
            assert cli.main(words) == 0, (text, capsys.readouterr().err)


LOOK = """
import contextlib, io, json, runpy, sys
sys.path[:0] = ["benchmarks", "scripts", "."]
found = {}
for words in json.loads(sys.argv[1]):
    sys.argv, made = [words[0], *words[1:], "--help"], io.StringIO()
    with contextlib.redirect_stdout(made), contextlib.suppress(SystemExit):
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    found[" ".join(words)] = made.getvalue()
print(json.dumps(found))
"""


def programs():
    """Scripts and modules that the documents run with Python, with their subcommand: the options that are shown."""
    found = {}
    for one in COMMANDS.values():
        if one[0] == "python" and len(one) > 1 and one[1] != "-c":
            words = one[2:] if one[1] == "-m" else one[1:]
            said = [word for word in words[1:2] if one[1] == "-m" and re.fullmatch("[a-z0-9]+", word)]
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            found.setdefault((words[0], *said), set()).update(options - {"--help"})
    return {words: options for words, options in found.items() if words[0] not in OTHERS}


@pytest.mark.full
def test_a_script_that_a_document_names_says_what_it_does_and_has_the_options_that_are_shown():
    wanted = programs()
    given = json.dumps([list(words) for words in wanted])
    ran = subprocess.run([sys.executable, "-c", LOOK, given], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert len(wanted) >= 20
    for words, options in wanted.items():
        shown = told[" ".join(words)]
        assert "usage:" in shown, words
        assert {option for option in options if option not in shown} == set(), words


# Sizes

KINDS = [block.text for block in blocks((ROOT / "docs/kinds.md").read_text("utf-8"), "python")]


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


def test_the_first_page_counts_families_and_filters_as_they_are():
    numbers = {19: "nineteen"}
    assert f"\n| families of checkpoints | {len(FAMILIES)} |" in README
    assert f"\n{numbers[len(sampling.FILTERS)]} filters, " in README


def test_the_page_of_speed_is_that_of_the_results():
    ran = subprocess.run([sys.executable, "scripts/speed_page.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
