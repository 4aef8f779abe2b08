"""llama.cpp's worker of `peers.py`: float32 weights; the largest logit is the next token.

default   a float16 cache, and an attention in one operation, which rounds to float16 too
float32   neither

Rows are sequences of one batch. The weights are written as GGUF beside the folder's safetensors.
"""

from __future__ import annotations

import ctypes
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as cpp
import numpy as np
import peers_worker
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys so that the two of a rotated pair lie next to each other."""
    return np.ascontiguousarray(x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape))


def write(folder: Path) -> Path:
    """The folder's weights as GGUF, float32, without a tokenizer."""
    path, hf = folder / "model.gguf", json.loads((folder / "config.json").read_text())
    if path.exists():
        return path
    heads, kv = hf["num_attention_heads"], hf["num_key_value_heads"]
    out = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    out.add_context_length(hf["max_position_embeddings"])
    out.add_embedding_length(hf["hidden_size"])
    out.add_block_count(hf["num_hidden_layers"])
    out.add_feed_forward_length(hf["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_key_length(hf["head_dim"])
    out.add_value_length(hf["head_dim"])
    out.add_rope_dimension_count(hf["head_dim"])
    out.add_rope_freq_base(hf["rope_theta"])
    out.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    out.add_vocab_size(hf["vocab_size"])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("none")
    stored = load_file(folder / "model.safetensors")
    out.add_tensor("token_embd.weight", stored["model.embed_tokens.weight"])
    out.add_tensor("output_norm.weight", stored["model.norm.weight"])
    for i in range(hf["num_hidden_layers"]):
        for theirs, ours in NAMES.items():
            x = stored[f"model.layers.{i}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                x = interleaved(x, heads if ours == "attn_q" else kv)
            out.add_tensor(f"blk.{i}.{ours}.weight", x)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path.with_suffix(".part").rename(path)


class Peer:
    """One model, and a context of each way for as many rows and tokens as were asked for."""

    model: Any = None
    batch: Any = None
    contexts: dict[str, Any] = {}

    def load(self, folder: str, rows: int, longest: int, threads: int) -> None:
        """A model and its context; `longest` is tokens a row."""
        for context in self.contexts.values():
            cpp.llama_free(context)
        if self.model is not None:
            cpp.llama_batch_free(self.batch)
            cpp.llama_model_free(self.model)
        path = str(write(Path(folder))).encode()
        self.model = cpp.llama_model_load_from_file(path, cpp.llama_model_default_params())
        self.vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.batch = cpp.llama_batch_init(rows * longest, 0, 1)
        self.contexts = {}
        for way in ("float32", "default"):
            chosen = cpp.llama_context_default_params()
            chosen.n_ctx, chosen.n_seq_max = rows * longest, rows
            chosen.n_threads = chosen.n_threads_batch = threads
            if way == "float32":
                chosen.type_k = chosen.type_v = int(gguf.GGMLQuantizationType.F32)
                chosen.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.contexts[way] = cpp.llama_init_from_model(self.model, chosen)

    def versions(self) -> dict[str, str]:
        """Of what ran, and which instructions it was compiled for."""
        system = cpp.llama_print_system_info().decode().strip()
        return {"llama-cpp-python": metadata.version("llama-cpp-python"), "system": system}

    def put(self, rows: Any, start: int) -> None:
        """Tokens `[B, S]` into the batch, from position `start` on; the last of each row gives logits."""
        batch, n = self.batch, 0
        for row, tokens in enumerate(rows):
            for i, token in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, start + i, 1
                batch.seq_id[n][0], batch.logits[n] = row, i + 1 == len(tokens)
                n += 1
        batch.n_tokens = n

    def next(self, context: Any, rows: int) -> np.ndarray:
        """Feeds the batch; the next token of each row, `[B]`."""
        if cpp.llama_decode(context, self.batch):
            raise RuntimeError("llama_decode failed")
        logits = ctypes.cast(cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (rows, self.vocab)).argmax(axis=1)

    def generate(self, prompts: list[list[int]], new: int, way: str) -> dict[str, Any]:
        """Greedy; the last token is not fed. The prompts are laid into the batch before the clock starts."""
        context = self.contexts[way]
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        self.put(prompts, 0)

        def run() -> list[np.ndarray]:
            made = [self.next(context, len(prompts))]
            for at in range(len(prompts[0]), len(prompts[0]) + new - 1):
                self.put(made[-1][:, None].tolist(), at)
                made.append(self.next(context, len(prompts)))
            return made

        seconds, made = peers_worker.timed(run)
        return {"seconds": seconds, "tokens": np.stack(made, 1).tolist()}

    def prefill(self, prompts: list[list[int]], way: str) -> dict[str, Any]:
        """The next token of each row, and a cache."""
        return self.generate(prompts, 1, way)


@cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """Of what it would tell."""


if __name__ == "__main__":
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    peers_worker.serve(Peer())
