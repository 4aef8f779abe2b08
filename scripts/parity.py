"""Makes the golden files of tests/golden with whatever torch and transformers are importable, and checks kvjax on them.

    python scripts/parity.py                  # needs torch, transformers, sentencepiece: writes all files there
    python scripts/parity.py --check          # needs jax: the library against the files, one line a case
    python scripts/parity.py --only llama     # cases whose name contains the word; or `tokenizers`

A file holds config.json, the tensors' names and shapes, versions, and per seed: logits [64, V] on random tokens, the
ids of 64 greedy steps with the logits [64, V] that chose them and the smallest gap between the best two, and the last
logits of the rows of a ragged batch. Weights are made from the seed (tests/golden/cases.py), so none are stored.
"""

from __future__ import annotations

import argparse
import base64
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
MARGIN = 4e-5  # smallest gap of the best two, of max|logit|: twice what two logits within tolerance can move


def make(case: cases.Case) -> dict[str, np.ndarray]:
    """The reference's answers for one case, by Transformers in float32 with eager attention."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**copy.deepcopy(case.config))  # it writes into what it is given
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    meta = {
        "config": case.config,
        "saved_config": json.loads(config.to_json_string(use_diff=True)),
        "weights": case.made,
        "salts": case.salts,
        "shapes": stored(kind.from_config(config), case),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
    found: dict[str, np.ndarray] = {}
    for seed in cases.SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), meta, seed)
            options = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
            model, loaded = kind.from_pretrained(folder, **options)
        if any(loaded.values()):
            raise SystemExit(f"{case.name}: the reference did not load what was written: {loaded}")
        model.eval()
        random, rows = cases.tokens(case.salts[seed], case.config)
        sources = cases.sources(case.salts[seed], case.config)

        def logits(ids: np.ndarray, row: int, model: Any = model, sources: list[np.ndarray] = sources) -> np.ndarray:
            texts = {"input_ids": ids} if not sources else {"input_ids": sources[row], "decoder_input_ids": ids}
            texts = {name: torch.from_numpy(text.astype(np.int64))[None] for name, text in texts.items()}
            with torch.no_grad():
                return model(**texts, use_cache=False).logits[0].numpy()

        run = random[: cases.PROMPT]
        for _ in range(cases.STEPS):
            run = np.append(run, np.argmax(logits(run, 1)[-1]).astype(np.int32))
        chosen = logits(run[:-1], 1)[cases.PROMPT - 1 :]
        best = np.sort(chosen, axis=-1)
        margin = float((best[:, -1] - best[:, -2]).min() / np.abs(chosen).max())
        distinct = len(set(run[cases.PROMPT :].tolist()))
        print(f"{case.name:24} seed {seed}: {distinct} distinct tokens, margin {margin:.1e}", flush=True)
        if distinct < case.distinct or margin < MARGIN:
            raise SystemExit(f"{case.name}, seed {seed}: proves too little; change its gain")
        found |= {
            f"{seed}/random": logits(random, 0),
            f"{seed}/greedy_ids": run[cases.PROMPT :],
            f"{seed}/greedy": chosen,
            f"{seed}/ragged": np.stack([logits(row, 2 + i)[-1] for i, row in enumerate(rows)]),
            f"{seed}/margin": np.float32(margin),
        }
    found["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    return found


def stored(model: Any, case: cases.Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint holds: each table once, no tables of sines."""
    waves = "embed_positions" if case.config["model_type"] == "marian" else "\0"
    repeated = set(model.all_tied_weights_keys)  # an untied BART stores its table three times
    if not case.config.get("tie_word_embeddings", True):
        repeated.discard("lm_head.weight")  # version 5 of Transformers ties T5 in any case, until it loads a head
    state = {name: value for name, value in model.state_dict().items() if name not in repeated and waves not in name}
    return {name: tuple(value.shape) for name, value in state.items()}


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


ENGLISH = "the cat sat on a mat, and they were happy. who saw 12 hats? it's the dog's hat!"
GERMAN = "die katze saß auf der matte, und sie waren froh. wer sah 12 hüte? es ist der hut des hundes!"
TEXTS = [
    "the cat sat on the mat.",
    "  two  spaces, and  ",
    "<extra_id_0> saw <extra_id_1>.",
    "who</s>sat",
    ">>de<< the dog's hats",
    ">>xx<< happy?",
    "übrigens 猫",
    "<pad>the<unk> mat",
]


def make_tokenizers() -> dict[str, Any]:
    """Tiny SentencePiece models, and what the tokenizers of Transformers make of `TEXTS` with them."""
    import sentencepiece
    import transformers

    transformers.logging.set_verbosity_error()

    def train(text: str, folder: Path, name: str, **special: int) -> list[str]:
        words, rng = text.split(), random.Random(0)
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
        options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "normalization_rule_name": "identity"}
        with (folder / name).open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, character_coverage=1.0, **options, **special
            )
        found = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        return [found.id_to_piece(i) for i in range(found.get_piece_size())]

    def pack(folder: Path) -> dict[str, str]:
        return {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.iterdir())}

    made: dict[str, Any] = {"versions": {"transformers": transformers.__version__}, "texts": TEXTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(ENGLISH + " " + GERMAN, folder, "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        made["t5"] = {"files": pack(folder)}
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
        made["t5"]["ids"] = [tokenizer(text)["input_ids"] for text in TEXTS]
        made["t5"]["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made["t5"]["ids"]]
    for kind, separate in (("marian", False), ("marian_separate", True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sides = {"source": train(ENGLISH, folder, "source.spm"), "target": train(GERMAN, folder, "target.spm")}
            special = ["</s>", "<unk>", *(() if separate else (">>de<<",))]

            def vocab(*pieces: str, special: list[str] = special) -> str:
                return json.dumps({p: i for i, p in enumerate(dict.fromkeys([*special, *sorted(pieces), "<pad>"]))})

            if separate:
                (folder / "vocab.json").write_text(vocab(*sides["source"]))
                (folder / "target_vocab.json").write_text(vocab(*sides["target"][:-3]))
                (folder / "tokenizer_config.json").write_text('{"separate_vocabs": true}')
            else:
                (folder / "vocab.json").write_text(vocab(*sides["source"], *sides["target"][:-3]))
            made[kind] = {"files": pack(folder)}
            tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
            made[kind]["ids"] = [tokenizer(text)["input_ids"] for text in TEXTS]
            # without the last: there Transformers takes the padding of the sources' vocabulary
            made[kind]["target_ids"] = [tokenizer(text_target=text)["input_ids"][:-1] for text in TEXTS[:-1]]
            ids = made[kind]["target_ids"]
            made[kind]["decoded"] = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
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
    seed = meta.get("salts", cases.SEEDS)[seed]
    made = meta.get("weights") or {key: meta[key] for key in ("gain", "centre") if key in meta}  # as older files say it
    save_file(cases.weights(shapes, seed, **made), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(meta["config"]))


def batch(golden: dict[str, np.ndarray], seed: int, meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """All that a seed asks for as one ragged batch, so that one compiled function answers it.

    Returns:
        Tokens `[2 + rows, PROMPT + STEPS - 1]` int32, padded with zeros, and lengths `[2 + rows]` int32.
    """
    random, rows = texts(meta, seed)
    run = np.concatenate([random[: cases.PROMPT], golden[f"{seed}/greedy_ids"]])[:-1]
    return padded([random, run, *rows])


def texts(meta: dict[str, Any], seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """`cases.tokens` of a golden file's seed."""
    return cases.tokens(meta.get("salts", cases.SEEDS)[seed], meta["config"])


def sources(meta: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The sources `[2 + rows, S]` int32 of the rows of `batch`, and their lengths; None without an encoder."""
    found = cases.sources(meta.get("salts", cases.SEEDS)[seed], meta["config"])
    return padded(found) if found else None


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as tokens `[R, S]` int32 with zeros at the end, and lengths `[R]` int32."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, text in zip(tokens, rows, strict=True):
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

    import kvjax
    from kvjax.lm import load

    meta, golden = read(name)
    forward = jax.jit(kvjax.forward)
    answers = []
    for seed in cases.SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), meta, seed)
            model = load(folder, strict=True).model
        read_too = sources(meta, seed)
        source = None if read_too is None else kvjax.encode(model, *read_too)
        answers.append(compare(forward(model, *batch(golden, seed, meta), source=source), golden, seed))
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
    chosen = [case for case in cases.ALL if args.only in case.name]
    if args.check:
        failed = [case.name for case in chosen if not check(case.name)]
        return 1 if failed else 0
    for case in chosen:
        np.savez_compressed(GOLDEN / f"{case.name}.npz", **make(case))
    if not args.only:
        lines = ",\n".join(json.dumps(rotation) for rotation in make_rotations())
        (GOLDEN / "rotations.json").write_text(f"[\n{lines}\n]\n")
    if args.only in ("", "tokenizers"):
        (GOLDEN / "tokenizers.json").write_text(json.dumps(make_tokenizers(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
