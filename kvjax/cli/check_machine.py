"""`kvjax doctor`: versions, devices, settings and the promises on this machine, a line each, with what to do."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

import kvjax
from kvjax.cli import startup
from kvjax.timing import processor

OK, WARNING, FAILED = "ok", "warning", "FAILED"

PYTHON = "3.11"
LEAST = {
    "jax": "0.7.2",
    "jaxlib": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.4",
    "numpy": "2.0",
    "safetensors": "0.4.5",
    "tokenizers": "0.20.3",
    "tqdm": "4.66",
}
"""Oldest versions that work, as pyproject.toml has them."""

BAD = {("jax", "0.11.1"): "copies the whole cache on each update in a loop on a CPU (jax-ml/jax#40101)"}
"""Versions that pyproject.toml excludes, and why. This copy happens inside a kernel: no temporary tells of it, and so
the promises below hold there."""

EXTRAS = {
    "hub": ("huggingface_hub", "0.26", "models by their hub id"),
    "sentencepiece": ("sentencepiece", "0.2", "tokenizers of folders without a tokenizer.json"),
    "chat": ("jinja2", "3.1.6", "chat templates"),
    "plots": ("matplotlib", "3.8", "kvjax estimate --plot"),
}
"""Of each extra of pyproject.toml: its package, the oldest version that works, and what it is for."""

SETTINGS = {
    "JAX_DEBUG_NANS": "looks at every result and donates nothing: slow",
    "JAX_DEFAULT_DTYPE_BITS": "changes the precision of results",
    "JAX_DEFAULT_MATMUL_PRECISION": "changes results and speed of every product",
    "JAX_DEFAULT_PRNG_IMPL": "draws other tokens from the same seed",
    "JAX_DISABLE_JIT": "runs operation by operation: hundreds of times slower",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "compiles fast, runs slowly",
    "JAX_ENABLE_X64": "float64 where Python numbers meet arrays: slower, other last digits",
    "JAX_NUMPY_DTYPE_PROMOTION": "may refuse mixed dtypes",
    "JAX_NUMPY_RANK_PROMOTION": "may refuse or warn of promoted ranks",
    "JAX_PLATFORMS": "chooses the device",
    "JAX_THREEFRY_PARTITIONABLE": "draws other tokens from the same seed",
    "NVIDIA_TF32_OVERRIDE": "changes results of every product on a GPU",
    "XLA_FLAGS": "changes what the compiler makes",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "limits the memory of a GPU",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "changes how memory of a GPU is taken",
}
"""Environment variables that change results or speed."""

GPU = Path("/dev/nvidiactl")


class Finding(NamedTuple):
    """One line.

    Args:
        about: which part of the check.
        name: of what was looked at.
        state: "ok", "warning" or "FAILED".
        found: what there is.
        advice: what to do, or nothing.
    """

    about: str
    name: str
    state: str
    found: str
    advice: str = ""


def run(args: argparse.Namespace) -> int:
    """Prints a line as each is found, or one JSON object; 1 if something failed."""
    found: list[Finding] = []
    for each in findings(os.environ):
        if not args.json:
            if not found or found[-1].about != each.about:
                print(("\n" if found else "") + each.about)
            print(line_of(each), flush=True)
        found.append(each)
    failed, warned = (sum(each.state == state for each in found) for state in (FAILED, WARNING))
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [each._asdict() for each in found]}))
    else:
        print(f"\n{failed} failed, {warned} warning{'s' * (warned != 1)}, {len(found) - failed - warned} ok")
    return int(failed > 0)


def line_of(each: Finding) -> str:
    """A finding in lines of at most 80 columns."""
    text = textwrap.fill(
        each.found, 80, initial_indent=f"  {each.state:<8}{each.name:<16} ", subsequent_indent=" " * 27
    )
    if each.advice:
        text += "\n" + textwrap.fill(each.advice, 80, initial_indent=" " * 10 + "-> ", subsequent_indent=" " * 13)
    return text


def findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Everything, in order; the promises last, for they take seconds."""
    yield from versions()
    usable = True
    for each in devices(environ):
        usable = usable and each.state != FAILED
        yield each
    yield from settings(environ)
    yield compiled(environ)
    yield from extras()
    if usable:
        yield from promised()


def versions() -> Iterator[Finding]:
    """Of kvjax, Python, the system, and what kvjax needs."""
    about = "versions"
    yield Finding(about, "kvjax", OK, kvjax.__version__)
    old = older(platform.python_version(), PYTHON)
    advice = f"kvjax needs Python {PYTHON} or later" if old else ""
    yield Finding(about, "Python", FAILED if old else OK, f"{platform.python_version()}, {sys.executable}", advice)
    yield Finding(about, "system", OK, f"{platform.system()} {platform.release()}, {platform.machine()}")
    for package, least in LEAST.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(about, package, FAILED, "not installed", f"pip install '{package}>={least}'")
            continue
        if reason := BAD.get((package, version)):
            others = ",".join(f"!={bad}" for name, bad in BAD if name == package)
            yield Finding(about, package, FAILED, f"{version} {reason}", f"pip install -U '{package}{others}'")
        elif older(version, least):
            found = f"{version} is older than {least}"
            yield Finding(about, package, FAILED, found, f"pip install -U '{package}>={least}'")
        else:
            yield Finding(about, package, OK, version)


def older(version: str, least: str) -> bool:
    """Whether the numbers of a version are less."""
    mine, theirs = ([int(x) for x in re.findall(r"\d+", text)[:3]] for text in (version, least))
    return mine < theirs


def devices(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What JAX computes on, and its memory."""
    about = "devices"
    try:
        found = jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError without a word
        chosen = environ.get("JAX_PLATFORMS")
        advice = "unset JAX_PLATFORMS" if chosen else "set JAX_PLATFORMS=cpu, or reinstall jax for this device"
        yield Finding(about, "JAX", FAILED, f"finds none: {startup.one_line(str(error) or repr(error))}", advice)
        return
    for device in found:
        cores = f", {os.cpu_count()} cores" * (device.platform == "cpu")
        kind = device.device_kind if device.platform != "cpu" else processor()
        size = memory(device)
        told = "memory unknown" if size is None else f"{size / 2**30:.1f} GiB"
        yield Finding(about, str(device), OK, f"{kind}{cores}, {told}")
    if GPU.exists() and found[0].platform == "cpu" and not environ.get("JAX_PLATFORMS"):
        advice = "pip install 'jax[cuda12]', or another build that jax's installation page names"
        yield Finding(about, "NVIDIA GPU", WARNING, "is there, but this jax has no CUDA build", advice)


def memory(device: jax.Device) -> int | None:
    """Bytes that it has; None where nobody tells."""
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not on this system
            return None
    with contextlib.suppress(Exception):  # a backend that does not tell raises what it likes
        return (device.memory_stats() or {}).get("bytes_limit")
    return None


def settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that change results or speed."""
    about = "environment"
    chosen = [name for name in SETTINGS if environ.get(name)]
    for name in chosen:
        advice = "" if name == "JAX_PLATFORMS" else f"unset {name} unless this is meant"
        state = WARNING if advice else OK
        yield Finding(about, name, state, f"{environ[name]!r}: {SETTINGS[name]}", advice)
    if not chosen:
        yield Finding(about, "variables", OK, "none is set that changes results or speed")


def compiled(environ: Mapping[str, str]) -> Finding:
    """Where compiled programs are kept."""
    about, name = "compiled programs", "folder"
    if environ.get(startup.SWITCH, "").lower() in startup.OFF:
        return Finding(about, name, OK, f"none, as {startup.SWITCH} says: every start compiles anew")
    own = environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in own:
        return Finding(about, name, OK, f"{own}, by JAX_COMPILATION_CACHE_DIR; not looked at")
    try:
        folder = startup.writable(Path(own) if own else startup.compile_folder(environ))
    except (OSError, RuntimeError) as error:
        advice = f"set {startup.SWITCH} to a folder of yours; until then every start compiles anew"
        return Finding(about, name, WARNING, f"nothing can be written: {error}", advice)
    files = [x.stat().st_size for x in folder.iterdir() if x.is_file()]
    return Finding(about, name, OK, f"{folder}, writable; {len(files):,} files, {sum(files) / 2**20:,.1f} MiB")


def extras() -> Iterator[Finding]:
    """What is optional, present or not."""
    for extra, (package, least, what) in EXTRAS.items():
        get = f"pip install 'kvjax[{extra}]'"
        try:
            version = metadata.version(package)  # a folder of that name can be imported as well
        except metadata.PackageNotFoundError:
            yield Finding("extras", extra, OK, f"not installed; {what}: {get}")
            continue
        if older(version, least):
            yield Finding("extras", extra, WARNING, f"{package} {version} is older than {least}; {what}", f"{get} -U")
        else:
            yield Finding("extras", extra, OK, f"{package} {version}; {what}")


def promised() -> Iterator[Finding]:
    """The promises on a tiny model, compiled anew."""
    from kvjax.testing import quick, run_suite  # importing these computes: without a device that fails

    advice = "this jax or this device computes wrongly: try another version of jax, and report this output"
    # A stored program does not tell what it aliases; where NaNs are looked for, nothing is donated.
    before = {name: jax.config.values[name] for name in ("jax_enable_compilation_cache", "jax_debug_nans")}
    for name in before:
        jax.config.update(name, False)
    try:
        for check in quick.quick:
            (line,) = run_suite(quick.CASE, [check]).lines
            promise = startup.one_line((check.__doc__ or "").split("\n\n")[0])
            found = f"{line.error}; promised: {promise}" if line.error else f"{promise} ({line.seconds:.1f} s)"
            state, wrong = (FAILED, advice) if line.error else (OK, "")
            yield Finding("promises, on a tiny model", line.check.replace("_", " "), state, found, wrong)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


__all__ = ["run", "findings", "Finding", "line_of"]
