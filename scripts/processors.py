"""Makes tests/golden/processors.npz: what the logits processors of Transformers do, and what `generate` does with them.

    python scripts/processors.py        # needs torch and transformers

A group is a chain of filters with their settings, and the logits that Transformers makes of a pool of rows, each with
the text so far, one row at a time. A run is a tiny model of tests/golden/cases.py with a generation_config.json, and
the tokens of `generate` by greedy search, each key of the file changes them, and by beams.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import parity
from parity import cases

ROWS, V, T = 24, 40, 14
STOPS = [5, 11]
CLEAR = 1e-4
"""A sum of probabilities nearer than this to its bound proves nothing: float32 may put it on either side."""
STEPS = 24
BEAMS = 3

SETTINGS: dict[str, list[Any]] = {
    "temperature": [0.3, 1.0, 2.5],
    "top_k": [1, 7, 100],
    "top_p": [0.15, 0.6, 0.95],
    "min_p": [0.02, 0.3, 1.0],
    "typical": [0.2, 0.6, 0.95],
    "repetition_penalty": [1.2, 3.0, 0.6],
    "no_repeat_ngram": [1, 2, 3],
    "bad_words": [[[1, 2], [7], [3, 1, 2]], [[0, 1, 2, 0, 1]], [[2, 2], [0, 1], [1, 0], [9, 5]]],
    "sequence_bias": [
        [[[1, 2], 2.5], [[7], -1.25], [[3, 1, 2], -4.0]],
        [[[0, 1, 2, 0, 1], -9.0], [[2], float("-inf")]],
        [[[2, 2], 1.5], [[0, 2], -2.0], [[1, 2], 3.0], [[2], 0.25]],
    ],
    "min_length": [4, 7, 20],
    "min_new_tokens": [1, 4, 20],
    "forced_first": [[3], [0], [39]],
    "forced_last": [[3], [5], [39]],
    "banned": [[3], [5, 11, 0, 1], list(range(0, 40, 3))],
    "banned_first": [[3], [5, 11, 0, 1], list(range(0, 40, 3))],
}
CHAINS: list[list[tuple[str, Any]]] = [
    [
        ("repetition_penalty", 1.3),
        ("no_repeat_ngram", 2),
        ("min_new_tokens", 3),
        ("forced_last", [5]),
        ("banned", [1, 2]),
    ],
    [
        ("sequence_bias", [[[1, 2], 2.0], [[2], -1.0]]),
        ("bad_words", [[0, 1], [8]]),
        ("min_length", 9),
        ("temperature", 0.7),
        ("top_k", 12),
        ("top_p", 0.9),
    ],
    [("temperature", 1.5), ("min_p", 0.05), ("typical", 0.9)],
    [("top_p", 0.8), ("temperature", 2.0), ("repetition_penalty", 1.7)],
]


def pool() -> dict[str, np.ndarray]:
    """Logits `[ROWS, V]`, plain ones, with ties and with -inf, and the text so far of each row, often repetitive."""
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(ROWS, V)) * 3).astype(np.float16).astype(np.float32)
    logits[1::3] = np.round(logits[1::3])
    logits[2::3][rng.random(logits[2::3].shape) < 0.3] = -np.inf
    lengths = rng.integers(2, T + 1, ROWS)
    lengths[[0, 7, 11]] = 1
    tokens = np.where(rng.random((ROWS, 1)) < 0.7, rng.integers(0, 3, (ROWS, T)), rng.integers(0, V, (ROWS, T)))
    starts = np.maximum(lengths - rng.integers(0, 6, ROWS), 1)
    limits = lengths + np.where(rng.random(ROWS) < 0.4, 1, rng.integers(2, 9, ROWS))
    whole = {"tokens": tokens, "lengths": lengths, "starts": starts, "limits": limits}
    return {"logits": logits} | {name: x.astype(np.int32) for name, x in whole.items()}


def processor(name: str, value: Any, start: int, limit: int) -> Any:
    """What Transformers calls a filter."""
    from transformers.generation import logits_process as lp

    made: dict[str, Any] = {
        "temperature": lambda: lp.TemperatureLogitsWarper(value),
        "top_k": lambda: lp.TopKLogitsWarper(value),
        "top_p": lambda: lp.TopPLogitsWarper(value),
        "min_p": lambda: lp.MinPLogitsWarper(value),
        "typical": lambda: lp.TypicalLogitsWarper(value),
        "repetition_penalty": lambda: lp.RepetitionPenaltyLogitsProcessor(value),
        "no_repeat_ngram": lambda: lp.NoRepeatNGramLogitsProcessor(value),
        "bad_words": lambda: lp.NoBadWordsLogitsProcessor(value),
        "sequence_bias": lambda: lp.SequenceBiasLogitsProcessor(value),
        "min_length": lambda: lp.MinLengthLogitsProcessor(value, STOPS),
        "min_new_tokens": lambda: lp.MinNewTokensLengthLogitsProcessor(start, value, STOPS),
        "forced_first": lambda: lp.ForcedBOSTokenLogitsProcessor(*value),
        "forced_last": lambda: lp.ForcedEOSTokenLogitsProcessor(limit, value),
        "banned": lambda: lp.SuppressTokensLogitsProcessor(value),
        "banned_first": lambda: lp.SuppressTokensAtBeginLogitsProcessor(value, start),
    }
    return made[name]()


def unclear(name: str, value: Any, before: np.ndarray, after: np.ndarray, start: int, length: int) -> bool:
    """Whether a row is left out: a difference on purpose, or a bound that rounding decides."""
    if name == "forced_first":  # Transformers means the token after the first of a text, kvjax the first new one
        return start == length > 1
    kept, real = np.isfinite(after), np.isfinite(before)
    if name == "top_p" and set(before[kept]) & set(before[real & ~kept]):
        return True  # of equal tokens at the bound Transformers keeps some, kvjax all
    if name not in ("top_p", "typical", "min_p"):
        return False
    p = np.exp(before.astype(np.float64) - before.max())
    p /= p.sum()
    if name == "min_p":
        return bool((np.abs(p / p.max() - value)[p < p.max()] < CLEAR * value).any())
    rank = -p
    if name == "typical":
        surprise = -np.log(p[real])
        rank = np.full(p.shape, np.inf)
        rank[real] = np.abs(surprise - (p[real] * surprise).sum())
    sums = np.cumsum(p[np.argsort(rank, kind="stable")])
    dropped = rank[real & ~kept]
    near = dropped.size and dropped.min() - rank[kept].max() < CLEAR and name == "typical"
    return bool(near or np.abs(sums - value).min() < CLEAR)


def groups(rows: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Every chain with the rows on which it is compared, and what Transformers makes of these."""
    import torch

    chains = [[(name, value)] for name, values in SETTINGS.items() for value in values] + CHAINS
    about, found = [], {}
    for chain in chains:
        kept, made = [], []
        for row, logits in enumerate(rows["logits"]):
            length, start, limit = (int(rows[key][row]) for key in ("lengths", "starts", "limits"))
            text = torch.from_numpy(rows["tokens"][row, :length].astype(np.int64))[None]
            x, good = torch.from_numpy(logits)[None], True
            for name, value in chain:
                y = processor(name, value, start, limit)(text, x.clone())
                good &= not unclear(name, value, x[0].numpy(), y[0].numpy(), start, length)
                x = y
            if good:
                kept.append(row)
                made.append(x[0].numpy())
        print(f"{chain!r:.90} {len(kept)} of {ROWS} rows")
        found[f"group/{len(about)}"] = np.stack(made)
        about.append({"chain": chain, "rows": kept})
    return about, found


RUNS: dict[str, dict[str, Any]] = {
    "bart": {"decoder_start_token_id": 2, "forced_bos_token_id": 0, "pad_token_id": 1},
    "llama_bias_wide_heads": {"pad_token_id": 0, "bos_token_id": 1},
}


def generated(model: Any, texts: list[np.ndarray], config: dict[str, Any]) -> tuple[list[list[int]], float]:
    """Greedy tokens of each text, new ones alone, and the smallest gap between the best two, of the largest score."""
    import torch
    import transformers

    model.generation_config = transformers.GenerationConfig(**json.loads(json.dumps(config)))
    rows, margin = [], np.inf
    for text in texts:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        options = {"max_new_tokens": STEPS, "output_scores": True, "return_dict_in_generate": True}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        given = 1 if model.config.is_encoder_decoder else len(text)
        rows.append(out.sequences[0, given:].tolist())
        for scores in out.scores:
            best = np.sort(scores[0].numpy()[np.isfinite(scores[0].numpy())])
            if len(best) > 1:
                margin = min(margin, float((best[-1] - best[-2]) / np.abs(best).max()))
    return rows, margin


def searched(model: Any, texts: list[np.ndarray], config: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    """New tokens of the best of `BEAMS` beams, without padding, and its score."""
    import torch
    import transformers

    model.generation_config = transformers.GenerationConfig(**json.loads(json.dumps(config)))
    rows, scores = [], []
    for text in texts:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        options = {"max_new_tokens": STEPS, "num_beams": BEAMS, "output_scores": True, "return_dict_in_generate": True}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        new = out.sequences[0, 1 if model.config.is_encoder_decoder else len(text) :].tolist()
        ends = [i + 1 for i, token in enumerate(new) if token in config["eos_token_id"]]
        rows.append(new[: ends[0]] if ends else new)
        scores.append(float(out.sequences_scores[0]))
    return rows, scores


def asked(model: Any, texts: list[np.ndarray], config: dict[str, Any], forced: int) -> Iterator[dict[str, Any]]:
    """Variants of a generation_config.json, made step by step of what the model would write, so that keys matter."""

    def now() -> list[list[int]]:
        return generated(model, texts, config)[0]

    config |= {"repetition_penalty": 1.15, "no_repeat_ngram_size": 2}
    config["suppress_tokens"] = [now()[0][forced + 5], now()[1][forced + 7]]
    config["begin_suppress_tokens"] = [row[forced] for row in now()]
    config["bad_words_ids"] = [now()[1][forced + 8 : forced + 10], [now()[1][forced + 4]]]
    a, b = now()[2][forced + 2 : forced + 4], now()[0][forced + 6]
    config["sequence_bias"] = [[a, -6.0], [[b], -5.0]]
    least = {"min_length": 14} if forced else {"min_new_tokens": 12}
    for end in dict.fromkeys(sum(now(), [])):
        yield config | least | {"eos_token_id": [end], "forced_eos_token_id": end}


def runs() -> dict[str, dict[str, Any]]:
    """Each model with what it is asked, of which every key matters, and what it then writes without near ties."""
    import torch
    import transformers

    made = {}
    for name, config in RUNS.items():
        meta, _ = parity.read(name)
        kind = transformers.AutoModelForSeq2SeqLM if name == "bart" else transformers.AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            parity.write_folder(Path(folder), meta, 0)
            model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        found = cases.sources(meta.get("salts", cases.SEEDS)[0], meta["config"]) or parity.texts(meta, 0)[1]
        texts = [row[:n] for row, n in zip(found, (9, 14, 5), strict=False)]
        for each in asked(model, texts, dict(config), int(name == "bart")):
            tokens, margin = generated(model, texts, each)
            keys = each.keys() - RUNS[name].keys() | {"forced_bos_token_id"} & each.keys()
            if margin >= parity.MARGIN and all(matters(model, texts, each, key, tokens) for key in keys):
                break
        else:
            raise SystemExit(f"{name}: in no variant every key matters")
        print(f"{name}: margin {margin:.1e}, {[len(row) for row in tokens]} tokens, {each}")
        made[name] = {"config": each, "texts": [text.tolist() for text in texts], "tokens": tokens}
        for renormalized in (False, True):
            best, scores = searched(model, texts, each | {"renormalize_logits": renormalized})
            print([len(row) for row in best], scores)
            made[name][f"beams/{renormalized}"] = {"tokens": best, "scores": scores}
    return made


def matters(model: Any, texts: list[np.ndarray], config: dict[str, Any], key: str, tokens: list[list[int]]) -> bool:
    """Whether other tokens are written without a key."""
    less = {other: value for other, value in config.items() if other != key}
    return generated(model, texts, less)[0] != tokens


def main() -> int:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = pool()
    about, found = groups(rows)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    meta = {"versions": versions, "stops": STOPS, "groups": about, "runs": runs()}
    arrays = rows | found | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    np.savez_compressed(parity.GOLDEN / "processors.npz", **arrays)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
