"""Transformers' worker of `peers.py`: `generate` on PyTorch, float32, its defaults.

dynamic   the usual cache, which grows
static    `cache_implementation="static"`
compiled  the same with `torch.compile` around the forward pass of a step
"""

from __future__ import annotations

from typing import Any

import peers_worker
import torch
import transformers
from transformers.generation import CompileConfig


def compiled() -> dict[str, Any]:
    """Arguments that make `generate` compile on a processor too, which it otherwise leaves."""
    chosen = CompileConfig()
    chosen._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": chosen}


WAYS = {"dynamic": dict, "static": lambda: {"cache_implementation": "static"}, "compiled": compiled}


class Peer:
    """One model."""

    def load(self, folder: str, rows: int, longest: int, threads: int) -> None:
        """A decoder from a folder in the Hugging Face layout."""
        torch.set_num_threads(threads)
        torch.compiler.reset()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def versions(self) -> dict[str, str]:
        """Of what ran."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int, way: str) -> dict[str, Any]:
        """Greedy."""
        ids = torch.tensor(prompts)
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new, **WAYS[way]()}
        seconds, made = peers_worker.timed(lambda: self.model.generate(ids, **given))
        return {"seconds": seconds, "tokens": made[:, ids.shape[1] :].tolist()}

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        """The next token of each row, and a cache."""
        ids = torch.tensor(prompts)
        seconds, made = peers_worker.timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1))
        return {"seconds": seconds, "tokens": made.logits.argmax(-1).tolist()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    peers_worker.serve(Peer())
