"""The model families that kvjax can load: a family is a file here and an entry in the list."""

from __future__ import annotations

from kvjax.checkpoint.families import gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3

FAMILIES = {f.FAMILY.model_type: f.FAMILY for f in (gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3)}

__all__ = ["FAMILIES"]
