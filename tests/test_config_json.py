"""config.json of every family: what is read, what is refused by name, what published files come to."""

import copy
import functools
import json
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from kvjax.checkpoint.families import FAMILIES
from kvjax.checkpoint.fields import HARMLESS, REFUSED, USED, Fields
from kvjax.errors import CheckpointError
from kvjax.lm import read_config
from kvjax.ops.positions import LinearScaling, Rope, YarnScaling
from kvjax.params import count_params

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity
from parity import cases

NAMES = [case.name for case in cases.ALL]
LLAMA = next(case.config for case in cases.CASES if case.name == "llama_linear")


@functools.cache
def golden(name):
    return parity.read(name)


@pytest.mark.parametrize("name", NAMES)
def test_config_json_as_transformers_saves_it_again_describes_the_same_model(name):
    meta, _ = golden(name)
    assert read_config(meta["saved_config"], strict=True) == read_config(meta["config"], strict=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_list_of_used_keys_is_what_the_config_map_reads(kind, monkeypatch):
    family, read = FAMILIES[kind], set()
    original = Fields.raw
    monkeypatch.setattr(Fields, "raw", lambda self, name, default=None: read.add(name) or original(self, name, default))
    get = Fields._get
    monkeypatch.setattr(Fields, "_get", lambda self, name, *rest: read.add(name) or get(self, name, *rest))
    hf = next(c.config for c in cases.ALL if c.config["model_type"] == kind)
    family.config(Fields(hf | {"rope_parameters": {}, "rope_scaling": None}, aliases=family.aliases))
    read -= {"factor", "attention_factor"}
    ends = USED - {"tie_word_embeddings", "vocab_size"}  # read by `load`
    rotary = {"layer_types", "max_window_layers"}  # either one or the other
    assert read <= family.keys.used | USED
    assert (family.keys.used | USED) - set(family.aliases) - ends - rotary <= read


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_stands_in_one_list(kind):
    keys = FAMILIES[kind].keys
    lists = [keys.used | USED, keys.harmless | HARMLESS, {*keys.refused, *REFUSED}]
    assert sum(map(len, lists)) == len(set.union(*map(set, lists)))


def config_of(name, **changes):
    hf = copy.deepcopy(next(c.config for c in cases.ALL if c.name == name))
    hf.update(changes)
    return read_config({k: v for k, v in hf.items() if v is not ...}, strict=True)[1]


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", 3, None, ["linear"]])
def test_a_rope_scaling_that_is_not_computed_is_refused_by_name(kind):
    with pytest.raises(CheckpointError, match=str(kind) if isinstance(kind, str) else "unknown RoPE"):
        config_of("llama_linear", rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_linear", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama_linear", {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial"),
        ("llama_linear", {"rope_scaling": {"type": "linear"}}, "'factor'"),
        ("llama_linear", {"rope_scaling": {"type": "linear", "factor": math.inf}}, "'factor'"),
        ("llama_linear", {"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ("llama_linear", {"rope_scaling": "linear"}, "must be an object"),
        ("llama_linear", {"rope_scaling": {"type": "linear", "factor": 2.0, "wavelength": 3}}, "wavelength"),
        ("llama_linear", {"rope_theta": 1.0}, "rope_theta"),
        ("llama_linear", {"rope_scaling": {"type": "linear", "factor": 1e20}}, "int32"),
        (
            "llama_llama3",
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "exceed",
        ),
        ("llama_linear", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama_linear", {"sliding_window": 7}, "sliding_window"),
        ("llama_linear", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("llama_linear", {"hidden_size": "48"}, "hidden_size"),
        ("llama_linear", {"hidden_size": True}, "hidden_size"),
        ("llama_linear", {"hidden_size": 10**400}, "hidden_size"),
        ("llama_linear", {"hidden_size": ...}, "hidden_size"),
        ("llama_linear", {"hidden_size": 50}, "no multiple"),
        ("llama_linear", {"num_key_value_heads": 4}, "no multiple"),
        ("llama_linear", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama_linear", {"attention_bias": None}, "attention_bias"),
        ("llama_linear", {"head_dim": 7}, "even head_dim"),
        ("llama_linear", {"brand_new_key": 1}, "brand_new_key"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("qwen2_windows", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2_windows", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "chunked_attention"),
        ("qwen2_windows", {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "sliding"),
        ("qwen2_windows", {"max_window_layers": -1}, "max_window_layers"),
        ("mistral_window", {"sliding_window": 0}, "sliding_window"),
        (
            "mistral_window",
            {"model_type": "mamba"},
            "bart, gemma2, gemma3_text, gpt2, llama, marian, mbart, mistral, qwen2, qwen3, t5",
        ),
        ("gemma2", {"model_type": "gemma3"}, "gemma3_text"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ("gemma3_old_layout", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_old_layout", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_old_layout", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_old_layout", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("gemma3_old_layout", {"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ("gemma3_old_layout", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        ("gemma3_new_layout", {"rope_parameters": {"sliding_attention": 3}}, "sliding_attention must be an object"),
        ("gemma3_new_layout", {"rope_parameters": []}, "rope_parameters must be an object"),
        ("mistral_window", {"model_type": ["llama"]}, "model_type"),
        ("mistral_window", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("t5", {"feed_forward_proj": "gated-swiglu"}, "feed_forward_proj"),
        ("t5", {"feed_forward_proj": None}, "feed_forward_proj"),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn.*relu"),
        ("t5_v11", {"dense_act_fn": "gelu"}, "dense_act_fn.*gelu_new"),
        ("t5", {"is_gated_act": True}, "is_gated_act"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder"),
        ("t5", {"is_decoder": True}, "is_decoder"),
        ("t5", {"d_kv": ...}, "d_kv"),
        ("t5", {"num_decoder_layers": 0}, "num_decoder_layers"),
        ("t5", {"relative_attention_num_buckets": 6}, "relative_attention_num_buckets 6"),
        ("t5", {"relative_attention_max_distance": 4}, "relative_attention_max_distance 4"),
        ("t5", {"relative_attention_max_distance": 2**30}, "relative_attention_max_distance"),
        ("bart", {"normalize_before": True}, "normalize_before"),
        ("bart", {"add_final_layer_norm": True}, "add_final_layer_norm"),
        ("bart", {"add_bias_logits": True}, "add_bias_logits"),
        ("bart", {"static_position_embeddings": True}, "static_position_embeddings"),
        ("bart", {"normalize_embedding": False}, "normalize_embedding"),
        ("bart", {"extra_pos_embeddings": 1}, "extra_pos_embeddings"),
        ("bart", {"is_encoder_decoder": False}, "is_encoder_decoder"),
        ("bart", {"tie_encoder_decoder": True}, "tie_encoder_decoder"),
        ("bart", {"encoder_attention_heads": 5}, "encoder_attention_heads 5"),
        ("bart", {"decoder_attention_heads": 5}, "decoder_attention_heads 5"),
        ("bart", {"activation_function": "quick_gelu"}, "activation_function"),
        ("bart", {"decoder_layers": 10**6}, "decoder_layers"),
        ("mbart", {"normalize_before": False}, "normalize_before"),
        ("mbart", {"add_final_layer_norm": False}, "add_final_layer_norm"),
        ("marian", {"normalize_before": True}, "normalize_before"),
        ("marian", {"add_bias_logits": True}, "add_bias_logits"),
        ("marian", {"normalize_embedding": True}, "normalize_embedding"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings"),
        ("marian", {"decoder_vocab_size": 60}, "vocab_size 64 and decoder_vocab_size 60"),
        ("marian", {"scale_embedding": 1}, "scale_embedding"),
    ],
)
def test_a_config_that_asks_for_something_else_is_a_checkpoint_error_that_names_it(name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_of(name, **changes)


T5 = """model_type=t5 d_kv=64 decoder_start_token_id=0 dropout_rate=0.1 eos_token_id=1 initializer_factor=1.0
    is_encoder_decoder=true layer_norm_epsilon=1e-06 n_positions=512 output_past=true pad_token_id=0
    relative_attention_num_buckets=32 use_cache=true vocab_size=32128"""
V11 = f"{T5} feed_forward_proj=gated-gelu tie_word_embeddings=false"
BART = """activation_dropout=0.1 add_bias_logits=false attention_dropout=0.1 bos_token_id=0 classif_dropout=0.1
    classifier_dropout=0.0 decoder_layerdrop=0.0 decoder_start_token_id=2 dropout=0.1 early_stopping=true
    encoder_layerdrop=0.0 eos_token_id=2 forced_bos_token_id=0 forced_eos_token_id=2 gradient_checkpointing=false
    init_std=0.02 is_encoder_decoder=true no_repeat_ngram_size=3 num_beams=4 pad_token_id=1 use_cache=true"""


def stacks(layers, width, ffn, heads):
    both = (
        f"{side}_layers={layers} {side}_ffn_dim={ffn} {side}_attention_heads={heads}" for side in ("encoder", "decoder")
    )
    return f"d_model={width} num_hidden_layers={layers} {' '.join(both)}"


def buffers(vocab, width, rows):
    """What is counted here and not there: a bias that is no parameter there, and rows that carry nothing."""
    return vocab - 2 * rows * width


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# config.json as published, and the number of parameters that the same authors publish or that their files hold
PUBLISHED = {
    "gpt2": (
        124_439_808,
        """model_type=gpt2 n_embd=768 n_head=12 n_layer=12 n_positions=1024 n_ctx=1024 vocab_size=50257
        activation_function=gelu_new attn_pdrop=0.1 embd_pdrop=0.1 resid_pdrop=0.1 initializer_range=0.02
        layer_norm_epsilon=1e-05 summary_activation=null summary_first_dropout=0.1 summary_proj_to_labels=true
        summary_type=cls_index summary_use_proj=true bos_token_id=50256 eos_token_id=50256""",
        {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    ),
    "Llama-2-7b": (
        6_738_415_616,
        """model_type=llama hidden_size=4096 intermediate_size=11008 num_hidden_layers=32 num_attention_heads=32
        num_key_value_heads=32 vocab_size=32000 max_position_embeddings=4096 rms_norm_eps=1e-05 rope_scaling=null
        hidden_act=silu pretraining_tp=1 tie_word_embeddings=false torch_dtype=float16 use_cache=true
        initializer_range=0.02 bos_token_id=1 eos_token_id=2 transformers_version=4.31.0.dev0""",
        {},
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        """model_type=llama hidden_size=4096 intermediate_size=14336 num_hidden_layers=32 num_attention_heads=32
        num_key_value_heads=8 vocab_size=128256 max_position_embeddings=131072 rms_norm_eps=1e-05 rope_theta=500000.0
        hidden_act=silu attention_bias=false attention_dropout=0.0 mlp_bias=false pretraining_tp=1
        tie_word_embeddings=false torch_dtype=bfloat16 use_cache=true bos_token_id=128000 eos_token_id=128001""",
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        """model_type=llama hidden_size=2048 intermediate_size=8192 num_hidden_layers=16 num_attention_heads=32
        num_key_value_heads=8 head_dim=64 vocab_size=128256 max_position_embeddings=131072 rms_norm_eps=1e-05
        rope_theta=500000.0 hidden_act=silu attention_bias=false mlp_bias=false tie_word_embeddings=true""",
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": 32.0}, "eos_token_id": [128001, 128008, 128009]},
    ),
    "SmolLM2-135M": (
        134_515_008,
        """model_type=llama hidden_size=576 intermediate_size=1536 num_hidden_layers=30 num_attention_heads=9
        num_key_value_heads=3 vocab_size=49152 max_position_embeddings=8192 rms_norm_eps=1e-05 rope_theta=100000
        is_llama_config=true rope_interleaved=false rope_scaling=null tie_word_embeddings=true pad_token_id=2""",
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        """model_type=mistral hidden_size=4096 intermediate_size=14336 num_hidden_layers=32 num_attention_heads=32
        num_key_value_heads=8 vocab_size=32000 max_position_embeddings=32768 rms_norm_eps=1e-05 rope_theta=10000.0
        sliding_window=4096 hidden_act=silu tie_word_embeddings=false torch_dtype=bfloat16 use_cache=true""",
        {"architectures": ["MistralForCausalLM"]},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        """model_type=qwen2 hidden_size=896 intermediate_size=4864 num_hidden_layers=24 num_attention_heads=14
        num_key_value_heads=2 vocab_size=151936 max_position_embeddings=32768 rms_norm_eps=1e-06 rope_theta=1000000.0
        max_window_layers=24 sliding_window=32768 use_sliding_window=false use_mrope=false tie_word_embeddings=true
        hidden_act=silu attention_dropout=0.0 bos_token_id=151643 eos_token_id=151643""",
        {},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        """model_type=qwen2 hidden_size=3584 intermediate_size=18944 num_hidden_layers=28 num_attention_heads=28
        num_key_value_heads=4 vocab_size=152064 max_position_embeddings=131072 rms_norm_eps=1e-06 rope_theta=1000000.0
        max_window_layers=28 sliding_window=131072 use_sliding_window=false tie_word_embeddings=false""",
        {},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        """model_type=qwen3 hidden_size=1024 intermediate_size=3072 num_hidden_layers=28 num_attention_heads=16
        num_key_value_heads=8 head_dim=128 vocab_size=151936 max_position_embeddings=40960 rms_norm_eps=1e-06
        rope_theta=1000000 rope_scaling=null max_window_layers=28 sliding_window=null use_sliding_window=false
        attention_bias=false attention_dropout=0.0 tie_word_embeddings=true""",
        {},
    ),
    "gemma-2-2b": (
        2_614_341_888,
        """model_type=gemma2 hidden_size=2304 intermediate_size=9216 num_hidden_layers=26 num_attention_heads=8
        num_key_value_heads=4 head_dim=256 vocab_size=256000 max_position_embeddings=8192 rms_norm_eps=1e-06
        rope_theta=10000.0 sliding_window=4096 attn_logit_softcapping=50.0 final_logit_softcapping=30.0
        query_pre_attn_scalar=256 hidden_act=gelu_pytorch_tanh hidden_activation=gelu_pytorch_tanh
        attention_bias=false attention_dropout=0.0 cache_implementation=hybrid use_cache=true pad_token_id=0""",
        {},
    ),
    "gemma-2-27b": (
        27_227_128_320,
        """model_type=gemma2 hidden_size=4608 intermediate_size=36864 num_hidden_layers=46 num_attention_heads=32
        num_key_value_heads=16 head_dim=128 vocab_size=256000 max_position_embeddings=8192 rms_norm_eps=1e-06
        rope_theta=10000.0 sliding_window=4096 sliding_window_size=4096 attn_logit_softcapping=50.0
        final_logit_softcapping=30.0 query_pre_attn_scalar=144 hidden_activation=gelu_pytorch_tanh""",
        {},
    ),
    "gemma-3-1b": (
        999_885_952,
        """model_type=gemma3_text hidden_size=1152 intermediate_size=6912 num_hidden_layers=26 num_attention_heads=4
        num_key_value_heads=1 head_dim=256 vocab_size=262144 max_position_embeddings=32768 rms_norm_eps=1e-06
        rope_theta=1000000 rope_local_base_freq=10000 rope_scaling=null sliding_window=512 sliding_window_pattern=6
        attn_logit_softcapping=null final_logit_softcapping=null query_pre_attn_scalar=256
        hidden_activation=gelu_pytorch_tanh attention_bias=false cache_implementation=hybrid""",
        {},
    ),
    "t5-small": (60_506_624, f"{T5} d_model=512 d_ff=2048 num_heads=8 num_layers=6", {}),
    "t5-base": (222_903_552, f"{T5} d_model=768 d_ff=3072 num_heads=12 num_layers=12", {}),
    "flan-t5-small": (76_961_152, f"{V11} d_model=512 d_ff=1024 num_heads=6 num_layers=8 num_decoder_layers=8", {}),
    "flan-t5-base": (247_577_856, f"{V11} d_model=768 d_ff=2048 num_heads=12 num_layers=12", {}),
    "bart-base": (
        139_420_416 + buffers(50265, 768, 2),
        f"""model_type=bart vocab_size=50265 {BART} {stacks(6, 768, 3072, 12)} max_position_embeddings=1024
        activation_function=gelu add_final_layer_norm=false normalize_before=false normalize_embedding=true
        scale_embedding=false""",
        {"task_specific_params": {"summarization": {"num_beams": 4}}},
    ),
    "bart-large": (
        406_291_456 + buffers(50265, 1024, 2),
        f"model_type=bart vocab_size=50265 {BART} {stacks(12, 1024, 4096, 16)} max_position_embeddings=1024",
        {},
    ),
    "mbart-large-50": (
        610_879_488 + buffers(250054, 1024, 2),
        f"""model_type=mbart vocab_size=250054 {BART} {stacks(12, 1024, 4096, 16)} max_position_embeddings=1024
        activation_function=relu add_final_layer_norm=true normalize_before=true normalize_embedding=true
        scale_embedding=true static_position_embeddings=false""",
        {},
    ),
    "opus-mt-en-de": (
        74_410_496 + buffers(58101, 512, 512),  # there tables of sines count
        f"""model_type=marian vocab_size=58101 {BART} {stacks(6, 512, 2048, 8)} max_position_embeddings=512
        activation_function=swish add_final_layer_norm=false normalize_before=false normalize_embedding=false
        scale_embedding=true static_position_embeddings=true""",
        {"bad_words_ids": [[58100]], "pad_token_id": 58100, "decoder_start_token_id": 58100, "eos_token_id": 0},
    ),
    "gemma-3-270m": (
        268_098_176,
        """model_type=gemma3_text hidden_size=640 intermediate_size=2048 num_hidden_layers=18 num_attention_heads=4
        num_key_value_heads=1 head_dim=256 vocab_size=262144 max_position_embeddings=32768 rms_norm_eps=1e-06
        rope_theta=1000000.0 rope_local_base_freq=10000.0 rope_scaling=null sliding_window=512
        _sliding_window_pattern=6 use_bidirectional_attention=false query_pre_attn_scalar=256""",
        {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_strictly_and_has_the_published_number_of_parameters(name):
    count, text, more = PUBLISHED[name]
    hf = {}
    for key, _, value in (word.partition("=") for word in text.split()):
        try:
            hf[key] = json.loads(value)
        except ValueError:
            hf[key] = value
    hf |= more
    assert count_params(read_config(hf, strict=True)[1]) == count


def test_windows_follow_the_layer_they_are_said_of():
    assert config_of("mistral_window", sliding_window=...).windows == (4096, 4096)
    assert config_of("mistral_window", sliding_window=None).windows == (None, None)
    assert config_of("qwen2_windows", max_window_layers=2).windows == (None, None, 7)
    assert config_of("qwen2_windows", max_window_layers=28).windows == (None, None, None)
    assert config_of("qwen2_windows", use_sliding_window=False).windows == (None, None, None)
    assert config_of("qwen3_tied_windows").windows == (9, None, 9)
    assert config_of("gemma2").windows == (7, None, 7)
    assert config_of("gemma3_old_layout").windows == (7, 7, None, 7)
    assert config_of("gemma3_old_layout", sliding_window_pattern=..., num_hidden_layers=7).windows[5:] == (None, 7)
    assert config_of("gemma3_new_layout").windows == (7, None, 7)


def test_rope_reads_alike_in_its_old_and_its_new_layout():
    old = config_of("llama_linear", rope_theta=300.0, rope_scaling={"type": "linear", "factor": 2})
    new = config_of(
        "llama_linear", rope_scaling=..., rope_parameters={"rope_type": "linear", "rope_theta": 300, "factor": 2.0}
    )
    assert old == new
    assert old.positions == Rope(300.0, LinearScaling(2.0))
    assert config_of("llama_linear", rope_scaling=None).positions == Rope(10_000.0)


def test_gemma3_reads_both_rotations_in_its_old_and_its_new_layout():
    local, far = Rope(100.0), Rope(50000.0, LinearScaling(8.0))
    old = config_of("gemma3_old_layout")
    assert old.positions == far
    assert old.layer_positions == (local, local, far, local)
    assert old.max_positions == 256  # the length after scaling
    layers = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    gone = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"), ...)
    assert config_of("gemma3_old_layout", **gone, rope_parameters=layers) == old
    assert config_of("gemma3_old_layout", **gone, rope_parameters={}).turns[1:3] == (Rope(10_000.0), Rope(1_000_000.0))


def test_scaling_extends_the_positions_that_a_model_was_made_for():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert config_of("llama_linear", max_position_embeddings=32768, rope_scaling=yarn).max_positions == 131072
    assert config_of("llama_linear", max_position_embeddings=131072, rope_scaling=yarn).max_positions == 131072
    assert config_of("llama_linear", max_position_embeddings=4096).max_positions == 16384


def test_yarn_takes_its_temperature_and_factor_from_where_the_file_puts_them():
    def scaling(**more):
        values = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **more}
        return config_of("llama_linear", rope_scaling=values).positions.scaling

    assert scaling() == YarnScaling(4.0, 64)
    assert scaling(attention_factor=1.5, mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.5
    assert scaling(mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.0
    assert scaling(mscale=1.0, mscale_all_dim=0).attention_factor is None
    assert scaling(factor=None) == YarnScaling(4.0, 64)  # 256 positions over 64


def test_the_rotation_of_a_hundred_random_settings_is_that_of_transformers():
    for golden in json.loads((parity.GOLDEN / "rotations.json").read_text()):
        config = read_config(golden["config"], strict=True)[1]
        frequencies = config.positions.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        frequencies, factor = config.positions.scaling(frequencies, config.positions.theta)
        # the reference computes in float32
        np.testing.assert_allclose(frequencies, golden["frequencies"], rtol=5e-6, err_msg=str(golden["config"]))
        assert factor == pytest.approx(golden["factor"], rel=1e-12)


def test_gpt2_reads_the_names_that_transformers_maps():
    hf = dict(cases.CASES[0].config)
    hf |= {
        "hidden_size": hf.pop("n_embd"),
        "num_attention_heads": hf.pop("n_head"),
        "num_hidden_layers": hf.pop("n_layer"),
    }
    assert read_config(hf, strict=True) == read_config(cases.CASES[0].config, strict=True)


def test_two_names_of_one_thing_must_agree():
    hf = golden("bart")[0]["config"]
    assert read_config(hf | {"num_attention_heads": hf["encoder_attention_heads"]})
    with pytest.raises(CheckpointError, match="'encoder_attention_heads' is .*, but 'num_attention_heads'"):
        read_config(hf | {"num_attention_heads": 2 * hf["encoder_attention_heads"]})


def test_an_unknown_key_is_a_warning_that_names_it():
    with pytest.warns(UserWarning, match="brand_new_key"):
        read_config(json.loads(json.dumps(cases.CASES[0].config)) | {"brand_new_key": 1})


@pytest.mark.parametrize("name", NAMES)
def test_no_value_in_config_json_raises_anything_but_a_checkpoint_error(name):
    rng = random.Random(0)
    config = next(case.config for case in cases.ALL if case.name == name)
    values = [
        0,
        1,
        -1,
        3,
        7,
        2**31,
        10**30,
        10**400,
        0.0,
        1.5,
        -2.5,
        1e308,
        "",
        "x",
        True,
        False,
        None,
        [],
        [1],
        {},
        {"a": 1},
    ]
    rope = ["default", "linear", "llama3", "yarn", "dynamic", 3, None]
    built = 0
    for _ in range(300):
        hf = json.loads(json.dumps(config))
        for _ in range(rng.randrange(1, 3)):
            nested = rng.choice([hf, hf, hf.setdefault("rope_scaling", {"rope_type": rng.choice(rope)})])
            if isinstance(nested, dict):
                keys = [
                    *nested,
                    "head_dim",
                    "factor",
                    "layer_types",
                    "eos_token_id",
                    "sliding_window",
                    "quantization_config",
                ]
                nested[rng.choice(keys)] = rng.choice(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                built += read_config(hf)[1] is not None
            except CheckpointError as error:
                str(error).encode()
    assert built > 10


def test_a_config_with_two_billion_layers_builds_nothing():
    for config in (LLAMA | {"num_hidden_layers": 2**31 - 1}, cases.CASES[0].config | {"n_layer": 2**31 - 1}):
        with pytest.raises(CheckpointError, match=r"layer.*to 10000"):
            read_config(config)
