"""Transformer decoding in JAX where the KV cache is a value."""

from importlib import import_module
from typing import Any

from kvjax import approximate, caches, donating, sampling
from kvjax.caches import codecs
from kvjax.caches.base import Cache
from kvjax.caches.cross import Source
from kvjax.caching import branched, cache_nbytes, encode, init_cache
from kvjax.config import Config
from kvjax.errors import CacheError, CheckpointError, InputError, KvjaxError
from kvjax.lm import LM, load
from kvjax.loops.beam import beam
from kvjax.loops.conversation import Conversation
from kvjax.loops.decode import decode, decode_until, prefill, step
from kvjax.loops.drafters import Drafter, Drafts, draft_model, early_exit, prompt_lookup
from kvjax.loops.edit import edit, sync
from kvjax.loops.generated import Generated
from kvjax.loops.host import generate, stream
from kvjax.loops.resume import resume
from kvjax.loops.scores import Scored, Scores, score
from kvjax.loops.scoring import Likelihood, loglikelihood
from kvjax.loops.search import Beams, beam_search
from kvjax.loops.speculative import speculate
from kvjax.loops.windows import Perplexity, perplexity
from kvjax.model import Model, attend, cross_attend, decoder, forward
from kvjax.params import init_params
from kvjax.persist import load_cache, save_cache
from kvjax.planner import estimate
from kvjax.weights import int8_weights

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `kvjax.testing` is reached by name and not imported by those who do not ask for it.
    if name == "testing":
        return import_module("kvjax.testing")
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")


__all__ = [
    "Beams",
    "Cache",
    "CacheError",
    "CheckpointError",
    "Config",
    "Conversation",
    "Drafter",
    "Drafts",
    "Generated",
    "InputError",
    "KvjaxError",
    "LM",
    "Likelihood",
    "Model",
    "Perplexity",
    "Scored",
    "Scores",
    "Source",
    "approximate",
    "attend",
    "beam",
    "beam_search",
    "branched",
    "cache_nbytes",
    "caches",
    "codecs",
    "cross_attend",
    "decode",
    "decode_until",
    "decoder",
    "donating",
    "draft_model",
    "early_exit",
    "edit",
    "encode",
    "estimate",
    "forward",
    "generate",
    "init_cache",
    "init_params",
    "int8_weights",
    "load",
    "load_cache",
    "loglikelihood",
    "perplexity",
    "prefill",
    "prompt_lookup",
    "resume",
    "sampling",
    "save_cache",
    "score",
    "speculate",
    "step",
    "stream",
    "sync",
    "testing",
]
