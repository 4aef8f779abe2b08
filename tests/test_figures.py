"""Every table, picture and file of results has a command in docs/figures.md, and what is cheap is made again."""

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
import pages  # noqa: E402  (the path is set above)

PAGE = ROOT / "docs" / "figures.md"
LINE = re.compile(r"^\| `([^`]+)` \| `(python [^`]+)` \| (.*) \| (.*) \|$", re.MULTILINE)
NUMBER = re.compile(r"[-−~<>]?\d[\d,.]*(e[-+]?\d+)?( ?(%|[kMG]i?B|[mnµ]?s|×|x|tokens/s))?")


def lines():
    """What the page says: pattern of files, command, needs, and what is the same."""
    return LINE.findall(PAGE.read_text("utf-8"))


def shown(text):
    """Whether a page shows a picture, or a table of numbers: a row with two cells that are nothing else."""
    cells = [
        [cell.strip(" `*") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    numbers = any(sum(bool(NUMBER.fullmatch(cell)) for cell in row) >= 2 for row in cells)
    return numbers or re.search(r"!\[[^]]*\]\((?!\w+:)", text) is not None


def by_script(text):
    """Whether a page shows figures, or says that a script writes it."""
    return shown(text) or re.search(r"(?i)\bwritten by `python ", text[:600]) is not None


def made():
    """All that the page must account for."""
    documents = [*ROOT.glob("docs/**/*")]
    found = [path for path in documents if path.is_file() and path.suffix != ".md"]
    found += [
        path for path in documents if path.suffix == ".md" and path != PAGE and by_script(path.read_text("utf-8"))
    ]
    found += [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("tests/*.txt")]
    found += [path for path in ROOT.glob("benchmarks/results/**/*") if path.is_file()]
    found += [path for path in ROOT.glob("tests/golden/*") if path.is_file() and path.suffix != ".py"]
    found += [path.parent for path in ROOT.glob("kvjax/bundled/*/config.json")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def line_of(name, patterns):
    """The pattern that names a file: itself, or the one glob that it fits."""
    fitting = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
    return name if name in fitting else fitting[0] if len(fitting) == 1 else None


def test_every_figure_table_golden_file_and_model_has_a_line_and_every_line_has_a_file():
    patterns = [pattern for pattern, *_ in lines()]
    assert len(patterns) == len(set(patterns)) > 25
    assert [name for name in made() if line_of(name, patterns) is None] == []
    assert set(patterns) - {line_of(name, patterns) for name in made()} == set()
    assert line_of("docs/another.svg", patterns) is None


def test_a_page_with_numbers_and_a_file_of_results_name_the_command_that_the_page_of_figures_names():
    patterns = {pattern: command for pattern, command, *_ in lines()}
    for name in made():
        script = patterns[line_of(name, patterns)].split(" --")[0].split(" DIR")[0]
        if name.endswith(".md"):
            text = (ROOT / name).read_text("utf-8")
            assert re.search(r"`(python|kvjax) [^`]+`", text) and script in text, f"{name} does not say {script}"
        elif name.startswith("benchmarks/results/"):
            command = json.loads((ROOT / name).read_text("utf-8")).get("command", script)
            assert command.startswith(script), f"{name} was made by {command}"


def test_every_script_is_named_in_a_document():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    said = "".join(path.read_text("utf-8") for path in documents)
    scripts = [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
    run = [path.name for path in scripts if "__main__" in path.read_text("utf-8")]
    assert len(run) > 30 and [name for name in run if not re.search(rf"\b{name}\b", said)] == []


def test_the_front_page_names_a_command_if_it_shows_figures():
    text = (ROOT / "README.md").read_text("utf-8")
    assert not shown(text) or re.search(r"python (benchmarks|scripts)/\w+\.py", text)


def test_a_table_of_numbers_is_told_from_a_table_of_words():
    assert shown("| a | b | c |\n|---|---|---|\n| dense | 12.5 | 1,050 |") and shown("![errors](drift.svg)")
    assert not shown("| GPT-2 | learned positions, 2 of them |\n| B | batch (rows) |")


def test_a_page_is_compared_in_order_and_numbers_only_as_near_as_they_are():
    page = "a\n| K/V | 1,050,648 | 2.7e-02 |\nb\n"
    assert pages.missing(page, ["a", "b"]) == [] and pages.missing(page, ["b", "a"]) == ["a"]
    assert pages.missing(page, ["| K/V | 1,050,648 | 2.8e-02 |"]) != []
    assert pages.missing(page, ["| K/V | 1,050,648 | 2.8e-02 |"], 0.15) == []
    assert pages.missing(page, ["| K/V | 1,050,648 | 3.8e-02 |"], 0.15) != []
    assert pages.missing(page, ["| X | 1,050,648 | 2.7e-02 |"], 0.15) != []


CHECKED = sorted({command.split()[1] for _, command, _, same in lines() if re.search(r"\bchecked\b", same)})


def test_what_is_said_to_be_checked_is_more_than_one_page_and_has_the_option():
    assert len(CHECKED) >= 6
    texts = [(ROOT / script).read_text("utf-8") for script in CHECKED]
    assert all('"--check"' in text or "pages.keep(" in text for text in texts)  # `keep` adds the option


@pytest.mark.full
@pytest.mark.parametrize("script", CHECKED)
def test_what_is_the_same_on_every_machine_is_made_again_and_stands_in_its_page(script):
    ran = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
