"""One virtual environment for each peer of `peers.py`, in a folder: what each needs and nothing of the others.

llama       llama.cpp through `llama-cpp-python`, compiled here for this processor (a compiler, 5 to 25 minutes), and
            `gguf`, which writes the weights
ctranslate  CTranslate2 and the parts of Transformers that its converters read, with PyTorch
torch       Transformers on PyTorch

The registry's usual build of PyTorch brings gigabytes of CUDA. On a machine without a card, name an index of builds
for the processor with `--torch-index`, or a folder of wheels with `--wheels`. What is made already is left alone.

python benchmarks/peers_environments.py
python benchmarks/peers_environments.py /data/peers --only llama
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvjax-peers"

TORCH = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.4.6")
PACKAGES = {
    "llama": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
    "ctranslate": ("ctranslate2==4.8.5", *TORCH),
    "torch": TORCH,
}


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of an environment."""
    return folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(folder: Path, name: str, extra: list[str]) -> None:
    """One of them; a half-made one is finished by the next call."""
    done, python = folder / name / "made", python_of(folder, name)
    if done.exists():
        return print(f"{name}: stands already")
    print(f"{name}: {' '.join(PACKAGES[name])}", flush=True)
    venv.create(folder / name, with_pip=True)
    native = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF " + os.environ.get("CMAKE_ARGS", "")}
    compiled = ["--no-binary", "llama-cpp-python"] if name == "llama" else []
    subprocess.run([python, "-m", "pip", "install", "-q", *compiled, *extra, *PACKAGES[name]], env=native, check=True)
    done.touch()


def main() -> None:
    """Makes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default {FOLDER}")
    parser.add_argument("--only", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help="default all")
    parser.add_argument("--torch-index", help="an index of PyTorch builds, put beside the registry")
    parser.add_argument("--wheels", help="a folder of wheels to look into as well")
    a = parser.parse_args()
    extra = [*(["--extra-index-url", a.torch_index] if a.torch_index else [])]
    extra += ["--find-links", a.wheels] if a.wheels else []
    a.folder.mkdir(parents=True, exist_ok=True)
    for name in a.only:
        try:
            make(a.folder, name, extra)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: not made, pip ended with {error.returncode}")


if __name__ == "__main__":
    main()
