"""Notebooks: each `notebooks/NAME.py`, which people read and change, gives `NAME.ipynb`, which Colab opens, executed.

    python scripts/notebooks.py --write 1_quickstart     # without a name: all
    python scripts/notebooks.py --check                  # whether sources agree; runs nothing

Needs `pip install -e '.[notebooks,plots]'`. What changes with every run (times, versions) is left out of the file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SECONDS = 240
"""A notebook takes less than 60 on two quiet cores."""


def texts() -> list[Path]:
    """The text of each notebook."""
    return sorted(FOLDER.glob("*.py"))


def notebook(text: str) -> Any:
    """The notebook of a text in percent format, not executed: nothing in it but the text decides what it is."""
    found = jupytext.reads(text, fmt="py:percent")
    seen: set[str] = set()
    for cell in found.cells:
        name = hashlib.sha1(cell.source.encode()).hexdigest()[:8]
        while name in seen:
            name = hashlib.sha1(name.encode()).hexdigest()[:8]
        seen.add(name)
        cell.id, cell.metadata = name, nbformat.NotebookNode()
    found.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    found.nbformat, found.nbformat_minor = 4, 5
    return found


def executed(text: str, folder: Path, environment: Mapping[str, str] = os.environ, seconds: int = SECONDS) -> Any:
    """The notebook of a text with its outputs.

    Args:
        text: in percent format.
        folder: the notebook runs here.
        environment: that the kernel sees.
        seconds: that each cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    found = notebook(text)
    client = nbclient.NotebookClient(
        found,
        timeout=seconds,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=dict(environment))
    found.metadata.language_info = nbformat.NotebookNode(name="python")
    return found


def at_home(home: Path) -> dict[str, str]:
    """An environment in which the notebook finds this checkout, and no settings of whoever runs it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVJAX_", "XDG_"))}
    # A list of fonts that has to be made first would be announced in the output.
    fonts = {"MPLCONFIGDIR": matplotlib.get_cachedir()}
    return {**kept, **fonts, "HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}


def differences(text: Path) -> Iterator[str]:
    """How the pair of a text differs from it, in words."""
    pair = text.with_suffix(".ipynb")
    if not pair.is_file():
        yield f"{pair.name} is not there: python scripts/notebooks.py --write {text.stem}"
        return
    want, have = notebook(text.read_text("utf-8")), nbformat.read(pair, as_version=4)
    sources = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (want, have)]
    if sources[0] != sources[1]:
        at = next((i for i, (x, y) in enumerate(zip(*sources, strict=False)) if x != y), min(map(len, sources)))
        yield f"{pair.name}, cell {at}: not as in {text.name}; python scripts/notebooks.py --write {text.stem}"


def shrink(found: Any) -> None:
    """Pictures with 256 colours: a third of the bytes, and nobody sees it."""
    for output in (output for cell in found.cells for output in cell.get("outputs", ())):
        if picture := output.get("data", {}).get("image/png"):
            small = io.BytesIO()
            image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
            image.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def write(text: Path) -> None:
    """Executes a notebook in an empty folder and writes it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
        found = executed(text.read_text("utf-8"), Path(folder), at_home(Path(home)))
    shrink(found)
    pair = text.with_suffix(".ipynb")
    pair.write_text(nbformat.writes(found) + "\n", "utf-8")
    print(f"{pair.name}: {time.perf_counter() - began:.0f} s, {pair.stat().st_size / 1e3:.0f} kB")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", nargs="*", metavar="NAME", help="execute these, or all, and write their .ipynb")
    parser.add_argument("--check", action="store_true", help="compare sources; 1 if they differ")
    args = parser.parse_args()
    if args.write is None and not args.check:
        parser.error("give --write or --check")
    names = {text.stem: text for text in texts()}
    if unknown := set(args.write or ()) - set(names):
        parser.error(f"--write: no notebook {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.write is not None:
        for name in args.write or names:
            write(names[name])
    found = [line for text in texts() for line in differences(text)] if args.check else []
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
