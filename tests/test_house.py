"""The house: imports go down only, files are one idea, everything public is documented, the checkers are clean."""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvjax
from kvjax import caches, codecs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvjax"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = (
    ("types", "struct", "errors", "checks", "timing"),
    ("ops",),
    ("config", "costs"),
    ("weights",),
    ("caches",),
    ("params",),
    ("layers",),
    ("transformer",),
    ("model",),
    ("caching",),
    ("sampling", "stopping"),
    ("checkpoint", "pieces", "text", "templates"),
    ("lm", "persist"),
    ("loops",),
    ("approximate", "donating"),
    ("strategies",),
    ("planner",),
    ("",),  # kvjax/__init__.py: the public names
    ("train", "testing", "bridge"),
    ("cli",),
    ("__main__",),
)
"""Ground floor first. Who lives on one floor may import each other."""

FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
LINES = 400

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def room_of(module):
    """`kvjax.ops.attention` lives in `ops`, `kvjax` in ``."""
    return (module.split(".") + [""])[1]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    """Modules of this package that a file imports anywhere, by the name under which they are reached."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kvjax")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            if node.module == "kvjax":  # a module, or a public name of the whole
                yield from (f"kvjax.{a.name}" if room_exists(a.name) else "kvjax" for a in node.names)
            elif node.module and node.module.split(".")[0] == "kvjax":
                yield node.module


def room_exists(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def upward(module, source):
    """Imports of a file that go up."""
    own = FLOOR[room_of(module)]
    return [name for name in imports(ast.parse(source)) if FLOOR[room_of(name)] > own]


def test_every_room_has_a_floor_and_every_floor_a_room():
    rooms = {room_of(module_of(path)) for path in FILES}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_of(p))
def test_imports_go_down_only(path):
    if room_of(module_of(path)) != "":
        assert upward(module_of(path), path.read_text("utf-8")) == []


def test_an_import_that_goes_up_is_found():
    assert upward("kvjax.ops.attention", "from kvjax.caches.base import Cache") == ["kvjax.caches.base"]
    assert upward("kvjax.caches.dense", "def f():\n    import kvjax.loops.decode") == ["kvjax.loops.decode"]
    assert upward("kvjax.layers", "from kvjax import model, struct") == ["kvjax.model"]
    assert upward("kvjax.loops.host", "from kvjax import generate") == ["kvjax"]
    assert upward("kvjax.loops.host", "from kvjax import sampling\nimport jax") == []


def test_no_public_function_hides_a_module():
    hidden = []
    for path in PACKAGE.rglob("__init__.py"):
        package = importlib.import_module(module_of(path))
        for name in getattr(package, "__all__", ()):
            is_module = (path.parent / name).is_dir() or (path.parent / f"{name}.py").is_file()
            if is_module and not inspect.ismodule(getattr(package, name)):
                hidden.append(f"{package.__name__}.{name}")
    # One file a kind, and a kind is a word: caches.dense() hides its own file, on purpose; so does a codec.
    words = {f"kvjax.caches.{kind.__name__}" for kind in (*caches.KINDS, *caches.CROSS_KINDS)}
    assert set(hidden) <= words | {f"kvjax.caches.codecs.{codec.__name__}" for codec in codecs.CODECS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_of(p))
def test_a_file_is_one_idea(path):
    lines = path.read_text("utf-8").count("\n")
    assert lines <= LINES, f"{lines} lines: usually two ideas"


def public_objects():
    yield "kvjax", kvjax
    for name in kvjax.__all__:
        value = getattr(kvjax, name)
        yield f"kvjax.{name}", value
        if inspect.ismodule(value):
            yield from ((f"kvjax.{name}.{inner}", getattr(value, inner)) for inner in value.__all__)


def undocumented(name, value):
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        if not (inspect.getdoc(value) or "").strip():
            yield name
    if inspect.isclass(value) and value.__module__.startswith("kvjax"):
        for inner, member in vars(value).items():
            if not inner.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                made = isinstance(member, property) or member.__module__.startswith("kvjax")  # not by flax.struct
                if made and not (inspect.getdoc(member) or "").strip():
                    yield f"{name}.{inner}"


def test_everything_public_is_documented():
    assert [missing for name, value in public_objects() for missing in undocumented(name, value)] == []


def test_a_missing_docstring_is_found():
    def bare():
        pass

    bare.__module__ = "kvjax.loops"
    assert list(undocumented("bare", bare)) == ["bare"]
    made = type("Made", (), {"__doc__": "Has one.", "__module__": "kvjax.x", "method": bare, "_own": bare})
    assert list(undocumented("Made", made)) == ["Made.method"]


def dangerous(source):
    """What could run code that lies in a file: unpicklers, eval, exec."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in UNSAFE)
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            if called in ("eval", "exec"):
                yield called
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not allowed:
                    yield "allow_pickle"


def test_nothing_is_unpickled_or_evaluated():
    places = [*FILES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert {str(p): found for p in places if (found := list(dangerous(p.read_text("utf-8"))))} == {}


def test_an_unpickler_is_found():
    assert list(dangerous("import pickle")) == ["pickle"]
    assert list(dangerous("def f():\n    from dill import loads")) == ["dill"]
    assert list(dangerous("np.load(x, allow_pickle=flag)")) == ["allow_pickle"]
    assert list(dangerous("eval(text)")) == ["eval"]
    assert list(dangerous("np.load(x, allow_pickle=False); model.eval()")) == []


# Written so that this file does not find itself.
MACHINE = r"[/](work|root|Users)[/]|[/]home[/][a-z]|[/]tmp[/][a-z]|[/]opt[/][a-z]"
HOSTS = r"py[p]i[.]org|python[h]osted|[.]n[p]mjs[.]|deb[.]de[b]ian|conda[.]anaconda[.]"


def in_git(*argv):
    return subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True)


def test_nothing_names_a_machine_or_a_registry():
    if shutil.which("git") is None or in_git("rev-parse", "--git-dir").returncode:
        pytest.skip("not a git checkout: there is no list of what belongs to the project")
    found = in_git("grep", "-nIE", "--untracked", f"{MACHINE}|{HOSTS}", "--", ".")
    assert found.stdout == ""
    assert found.returncode == 1, found.stderr  # 1: nothing found; more: git could not look


def test_a_machine_or_a_registry_would_be_found():
    wrong = ["see /" + "root/x", "/" + "tmp/abc", "at https://py" + "pi.org/simple", "files.python" + "hosted.org"]
    for text in wrong:
        assert re.search(f"{MACHINE}|{HOSTS}", text)


def checked(module, *argv):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed here: pip install -e '.[test]'")
    return subprocess.run([sys.executable, "-m", module, *argv], cwd=ROOT, capture_output=True, text=True)


# The checkers are no promise to users, and their next version may find more: not in the default suite.
@pytest.mark.full
@pytest.mark.parametrize("argv", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_clean(argv):
    ran = checked("ruff", *argv, "--no-cache", ".")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.full
def test_mypy_is_clean(tmp_path):
    ran = checked("mypy", "--cache-dir", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
