"""Makes the golden files that hold published things: text of a published model, and pairs of a published data set.

    python scripts/published.py --stories stories260K     # tests/golden/stories260K.json; needs torch, transformers
    python scripts/published.py --pairs ar2en-train.txt   # tests/golden/ar2en-heldout.txt

The first is a Hugging Face folder of karpathy/tinyllamas stories260K, whose text without a prompt llama2.c publishes;
its greedy tokens are Transformers'. Of the pairs every fourth is kept of those that chose the checkpoint of `ar2en`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PROMPT, POSITIONS, NEW = "Zoo", 257, 61
HELDOUT, EVERY = 500, 4


def stories(folder: Path) -> dict[str, Any]:
    """The golden file's contents."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    begin, prompt = [tokenizer.bos_token_id], tokenizer(PROMPT)["input_ids"]

    def greedy(ids: list[int], new: int) -> list[int]:
        found = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=new, do_sample=False
        )
        return found[0].tolist()

    version = ".".join(transformers.__version__.split(".")[:2])
    return {
        "what": "greedy ids of karpathy/tinyllamas stories260K in float32, as published (llama2.c) and reproduced by "
        f"Transformers {version}",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "greedy_ids": greedy(begin, POSITIONS - 1),
        "zoo_prompt": PROMPT,
        "zoo_prompt_ids": prompt,
        "zoo_greedy_ids": greedy(prompt, NEW),
    }


def heldout(path: Path) -> str:
    """The golden file's text: source, tab, target."""
    sys.path.insert(0, str(ROOT))
    from kvjax.train import pairs

    kept = pairs.split_pairs(path, HELDOUT).heldout[::EVERY]
    return "".join(f"{source}\t{target}\n" for source, target in kept)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, metavar="FOLDER", help="of the published model")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="that `ar2en` was trained on")
    args = parser.parse_args()
    if args.stories:
        (GOLDEN / "stories260K.json").write_text(json.dumps(stories(args.stories)) + "\n", "utf-8")
    if args.pairs:
        (GOLDEN / "ar2en-heldout.txt").write_text(heldout(args.pairs), "utf-8")


if __name__ == "__main__":
    main()
