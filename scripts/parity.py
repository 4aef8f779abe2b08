"""Makes the golden files of tests/golden with whatever torch and transformers are importable, and checks kvjax on them.

    python scripts/parity.py                  # needs torch and transformers: writes *.npz and rotations.json there
    python scripts/parity.py --check          # needs jax: the library against the files, one line a case
    python scripts/parity.py --only llama     # cases whose name contains the word

A file holds config.json, the tensors' names and shapes, versions, and per seed: logits [64, V] on random tokens, the
ids of 64 greedy steps with the logits [64, V] that chose them and the smallest gap between the best two, and the last
logits of the rows of a ragged batch. Weights are made from the seed (tests/golden/cases.py), so none are stored.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
sys.path[:0] = [str(GOLDEN), str(GOLDEN.parent.parent)]

import cases  # noqa: E402  (the path is set above)

TOLERANCE = 1e-5  # of max|logit|; one float32 program is 1e-6 to 4e-6 from float64 on these models
DISTINCT = 16  # tokens that a greedy run must contain to prove anything
MARGIN = 4e-5  # smallest gap of the best two, of max|logit|: twice what two logits within tolerance can move


def make(case: cases.Case) -> dict[str, np.ndarray]:
    """The reference's answers for one case, by Transformers in float32 with eager attention."""
    import torch
    import transformers

    torch.set_num_threads(1)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(case.config))  # it writes into what it is given
    found: dict[str, np.ndarray] = {}
    for seed in cases.SEEDS:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        with torch.no_grad():
            for name, value in cases.weights(shapes, seed, case.gain, case.centre).items():
                state[name].copy_(torch.from_numpy(value))
        model.eval()

        def logits(ids: np.ndarray, model: Any = model) -> np.ndarray:
            with torch.no_grad():
                return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()

        random, rows = cases.tokens(seed)
        run = random[: cases.PROMPT]
        for _ in range(cases.STEPS):
            run = np.append(run, np.argmax(logits(run)[-1]).astype(np.int32))
        chosen = logits(run[:-1])[cases.PROMPT - 1 :]
        best = np.sort(chosen, axis=-1)
        margin = float((best[:, -1] - best[:, -2]).min() / np.abs(chosen).max())
        distinct = len(set(run[cases.PROMPT :].tolist()))
        print(f"{case.name:24} seed {seed}: {distinct} distinct tokens, margin {margin:.1e}", flush=True)
        if distinct < DISTINCT or margin < MARGIN:
            raise SystemExit(f"{case.name}, seed {seed}: proves too little; change its gain")
        found |= {
            f"{seed}/random": logits(random),
            f"{seed}/greedy_ids": run[cases.PROMPT :],
            f"{seed}/greedy": chosen,
            f"{seed}/ragged": np.stack([logits(row)[-1] for row in rows]),
            f"{seed}/margin": np.float32(margin),
        }
    meta = {
        "config": case.config,
        "saved_config": json.loads(config.to_json_string(use_diff=True)),
        "gain": case.gain,
        "centre": case.centre,
        "shapes": shapes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
    found["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    return found


def make_rotations(count: int = 100) -> list[dict[str, Any]]:
    """Rotary frequencies `[D/2]` and factor on cosines and sines, by Transformers, for random rotary settings."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    transformers.logging.set_verbosity_error()
    made: list[dict[str, Any]] = []
    rng = random.Random(0)
    while len(made) < count:
        kind, original = rng.choice(["linear", "llama3", "yarn", "yarn", "yarn"]), rng.choice([4, 8, 24, 64, 512, 4096])
        rope: dict[str, Any] = {rng.choice(["type", "rope_type"]): kind, "factor": rng.choice([1.0, 1.5, 2, 8, 40.0])}
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
        if kind != "linear" and rng.random() < 0.8:
            rope["original_max_position_embeddings"] = original
        if kind == "yarn":
            options: dict[str, list[Any]] = {
                "beta_fast": [1, 2, 8, 64],
                "beta_slow": [0.1, 0.5, 4, 64],
                "attention_factor": [0.5, 1.3, None],
                "mscale": [0, 0.707, 1.0],
                "mscale_all_dim": [0, 0.5, 1.0],
                "truncate": [True, False],
            }
            rope |= {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.4}
        if rng.random() < 0.3:
            rope["rope_theta"] = rng.choice([100.0, 1e6])
        config = {key: value for key, value in cases.CASES[2].config.items() if key != "rope_theta"}
        config |= {rng.choice(["rope_scaling", "rope_parameters"]): rope, "head_dim": rng.choice([4, 8, 16])}
        if rng.random() < 0.7:
            config["rope_theta"] = rng.choice([1000.0, 10000.0, 5e5])
        config["max_position_embeddings"] = rng.choice([64, 4096, 131072])
        rotation = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(config)))
        found = {"frequencies": rotation.inv_freq.tolist(), "factor": float(rotation.attention_scaling)}
        made.append({"config": config, **found})
    return made


def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A golden file's description and its arrays."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(arrays.pop("meta").tobytes()), arrays


def write_folder(folder: Path, meta: dict[str, Any], seed: int) -> None:
    """The case's checkpoint in the Hugging Face layout."""
    from safetensors.numpy import save_file

    shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(cases.weights(shapes, seed, meta["gain"], meta.get("centre", 1.0)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(meta["config"]))


def batch(golden: dict[str, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All that a seed asks for as one ragged batch, so that one compiled function answers it.

    Returns:
        Tokens `[2 + rows, PROMPT + STEPS - 1]` int32, padded with zeros, and lengths `[2 + rows]` int32.
    """
    random, rows = cases.tokens(seed)
    run = np.concatenate([random[: cases.PROMPT], golden[f"{seed}/greedy_ids"]])[:-1]
    texts = [random, run, *rows]
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths


def compare(logits: Any, golden: dict[str, np.ndarray], seed: int) -> tuple[float, bool]:
    """Logits of `batch` against the reference.

    Args:
        logits: `[2 + rows, PROMPT + STEPS - 1, V]`.
        golden: from `read`.
        seed: which model.

    Returns:
        The largest difference at any position over the largest logit of that position, and whether greedy ids agree.
    """
    logits = np.asarray(logits)
    chosen = logits[1, cases.PROMPT - 1 :]
    last = np.stack([row[length - 1] for row, length in zip(logits[2:], cases.RAGGED, strict=True)])
    found = np.concatenate([logits[0, : cases.RANDOM], chosen, last])
    expected = np.concatenate([golden[f"{seed}/{name}"] for name in ("random", "greedy", "ragged")])
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    worst = float(error.max()) if np.isfinite(error).all() else float("inf")
    return worst, bool((chosen.argmax(-1) == golden[f"{seed}/greedy_ids"]).all())


def check(name: str) -> bool:
    """kvjax against one golden file, through the whole loader."""
    import jax

    from kvjax.lm import load
    from kvjax.model import forward

    meta, golden = read(name)
    forward = jax.jit(forward)
    answers = []
    for seed in cases.SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), meta, seed)
            model = load(folder, strict=True).model
        answers.append(compare(forward(model, *batch(golden, seed)), golden, seed))
    worst, same = max(error for error, _ in answers), all(agree for _, agree in answers)
    good = worst <= TOLERANCE and same
    verdict = "ok" if good else "FAILS"
    print(f"{name:24} max|d|/max|logit| {worst:.1e}  greedy {'same' if same else 'DIFFERENT'}  {verdict}", flush=True)
    return good


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare kvjax with the files instead of making them")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    chosen = [case for case in cases.CASES if args.only in case.name]
    if args.check:
        failed = [case.name for case in chosen if not check(case.name)]
        return 1 if failed else 0
    for case in chosen:
        np.savez_compressed(GOLDEN / f"{case.name}.npz", **make(case))
    if not args.only:
        lines = ",\n".join(json.dumps(rotation) for rotation in make_rotations())
        (GOLDEN / "rotations.json").write_text(f"[\n{lines}\n]\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
