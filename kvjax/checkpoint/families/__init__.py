"""The model families that kvjax can load: a family is a file here and an entry in the list."""

from __future__ import annotations

from kvjax.checkpoint.families import bart, gemma2, gemma3, gpt2, llama, marian, mbart, mistral, qwen2, qwen3, t5

FAMILIES = {
    f.FAMILY.model_type: f.FAMILY for f in (bart, gemma2, gemma3, gpt2, llama, marian, mbart, mistral, qwen2, qwen3, t5)
}

__all__ = ["FAMILIES"]
