"""Makes tests/golden/beams.json: beams and scores by Transformers' `generate`, on some models of scripts/parity.py.

    python scripts/beams_golden.py            # needs torch and transformers

For every model and setting: a prompt (and a source), the texts that are returned and `sequences_scores`. The weights
are those of the model's own golden file. A plain search (tests/plain_beams.py) over the reference's logits must find
the same, with beams that cross, and with choices far enough apart that float32 cannot change one; else another prompt
is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tests")]

import parity  # noqa: E402  (the path is set above)
import plain_beams  # noqa: E402
from parity import cases  # noqa: E402

MODELS = ("gpt2", "llama_tied_theta", "t5", "bart")
WIDTH, NEW, SEED = 4, 20, 0
MARGIN = 2e-4  # of sums of log-probabilities; at most twenty, each right to about 1e-6 of logits of about ten
CROSSED = 3  # steps at which beams go on from another place, at least

FILTERS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
SETTINGS: list[dict[str, Any]] = [
    {"length_penalty": 1.0, "early_stopping": False, "every": 8},
    {"length_penalty": 0.0, "early_stopping": True, "every": 8},
    {"length_penalty": 1.5, "early_stopping": "never", "every": 4, "unlike": False},
    {"length_penalty": -0.5, "early_stopping": "never", "every": 16},
    {"length_penalty": 0.5, "early_stopping": False, "every": 24},
    {"length_penalty": 1.0, "early_stopping": True, "every": 8, "filters": FILTERS},
]
"""`every`: the ids that end a text are 3 and every so many after it. `unlike`: a rule of stopping that finds other
texts; without it one of the texts ends before its budget."""


def reference(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in Transformers, and its golden file's description."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    meta, _ = parity.read(name)
    parity.write_folder(folder, meta, SEED)
    encoder = "decoder_start_token_id" in meta["config"]
    kind = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    return model, meta


def searched(model: Any, prompt: list[int], source: list[int] | None, setting: dict[str, Any]) -> dict[str, Any] | None:
    """What the reference finds, or None where it proves too little."""
    import torch
    import transformers

    vocab = model.config.vocab_size
    stops = list(range(3, vocab, setting["every"]))
    filters = setting.get("filters", {})
    ids = torch.tensor([prompt])
    texts = {"input_ids": ids} if source is None else {"input_ids": torch.tensor([source]), "decoder_input_ids": ids}
    texts["attention_mask"] = torch.ones_like(texts["input_ids"])  # else a 0 of the prompt would be padding
    out = model.generate(
        **texts,
        num_beams=WIDTH,
        num_return_sequences=WIDTH,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
        length_penalty=setting["length_penalty"],
        early_stopping=setting["early_stopping"],
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **filters,
    )
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = row[len(prompt) : len(prompt) + NEW]
        ends = [i + 1 for i, token in enumerate(new) if token in stops]
        found.append({"tokens": new[: min(ends, default=NEW)], "score": score})
    rules = transformers.LogitsProcessorList()
    if filters:
        rules.append(transformers.RepetitionPenaltyLogitsProcessor(filters["repetition_penalty"]))
        rules.append(transformers.NoRepeatNGramLogitsProcessor(filters["no_repeat_ngram_size"]))
        least = filters["min_new_tokens"]
        rules.append(transformers.MinNewTokensLengthLogitsProcessor(len(prompt), least, stops))
    known: dict[tuple[int, ...], np.ndarray] = {}

    def score(text: tuple[int, ...]) -> np.ndarray:
        if text not in known:
            ids = torch.tensor([text])
            given = {"input_ids": ids} if source is None else {**texts, "decoder_input_ids": ids}
            with torch.no_grad():
                logits = model(**given, use_cache=False).logits[:, -1]
            known[text] = rules(ids, torch.log_softmax(logits, -1))[0].double().numpy()
        return known[text]

    gaps: list[float] = []
    how = {"penalty": setting["length_penalty"], "early": setting["early_stopping"], "stops": stops, "gaps": gaps}
    want, crossed = plain_beams.beam_search(prompt, NEW, WIDTH, score, **how)
    proves = crossed >= CROSSED and min(gaps) >= MARGIN
    if "unlike" in setting:
        other, _ = plain_beams.beam_search(prompt, NEW, WIDTH, score, **how | {"early": setting["unlike"]})
        proves &= [tokens for tokens, _ in other] != [tokens for tokens, _ in want]
    else:
        proves &= any(len(x["tokens"]) < NEW for x in found)
    if not proves:
        return None
    if [x["tokens"] for x in found] != [tokens for tokens, _ in want]:
        raise SystemExit(f"the plain search finds other texts than the reference: {setting}\n{found}\n{want}")
    return {**setting, "stops": stops, "prompt": prompt, "source": source, "crossed": crossed, "found": found}


def main() -> None:
    """Writes the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch
    import transformers

    runs: list[dict[str, Any]] = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model, meta = reference(name, Path(folder))
        start, vocab = meta["config"].get("decoder_start_token_id"), meta["config"]["vocab_size"]
        for number, setting in enumerate(SETTINGS):
            for salt in range(200):
                ids = cases._ids(1000 * number + salt, 7, 9 + number, vocab).tolist()
                prompt, source = (ids, None) if start is None else ([start], ids)
                made = searched(model, prompt, source, setting)
                if made is not None:
                    break
            else:
                raise SystemExit(f"{name}: no prompt that proves enough for {setting}")
            lengths = [len(x["tokens"]) for x in made["found"]]
            print(f"{name:20} {setting} prompt {salt}, crossed {made['crossed']}, lengths {lengths}", flush=True)
            runs.append({"model": name, **made})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"versions": versions, "width": WIDTH, "new": NEW, "seed": SEED}
    lines = ",\n".join(json.dumps(run) for run in runs)
    (parity.GOLDEN / "beams.json").write_text(f'{{"about": {json.dumps(about)}, "runs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
