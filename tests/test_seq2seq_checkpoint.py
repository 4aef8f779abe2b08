"""Checkpoints of models with an encoder: one table under many names, rows that carry nothing, how targets begin."""

import base64
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import kvjax
from kvjax.errors import CheckpointError
from kvjax.lm import load
from kvjax.params import declare

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity
from parity import cases

NAMES = [case.name for case in cases.SEQ2SEQ]
SIDES = ("encoder", "decoder")


@functools.cache
def golden(name):
    return parity.read(name)[0]


def tensors_of(name):
    meta = golden(name)
    shapes = {key: tuple(shape) for key, shape in meta["shapes"].items()}
    return cases.weights(shapes, meta["salts"][0], **meta["weights"])


def write(folder, name, tensors, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {key: value for key, value in (golden(name)["config"] | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_parameter_of_bart_is_the_right_tensor_turned_the_right_way(tmp_path):
    tensors = tensors_of("bart")
    lm = load(write(tmp_path, "bart", tensors), strict=True)
    params = lm.model.params
    assert jax.tree.map(lambda x: x.shape, params) == declare(lm.model.config)
    for ours, theirs in ((params, "decoder"), (params["encoder"], "encoder")):
        prefix, layer = f"model.{theirs}.layers.1", ours["layers"]["1"]
        q, k, v = (tensors[f"{prefix}.self_attn.{x}_proj.weight"].T for x in "qkv")
        np.testing.assert_array_equal(layer["attn"]["qkv"]["kernel"], np.concatenate([q, k, v], axis=1))
        np.testing.assert_array_equal(layer["ffn_norm"]["bias"], tensors[f"{prefix}.final_layer_norm.bias"])
        np.testing.assert_array_equal(ours["positions"]["table"], tensors[f"model.{theirs}.embed_positions.weight"][2:])
    k, v = (tensors[f"model.decoder.layers.2.encoder_attn.{x}_proj.weight"].T for x in "kv")
    np.testing.assert_array_equal(params["layers"]["2"]["cross"]["kv"]["kernel"], np.concatenate([k, v], axis=1))
    np.testing.assert_array_equal(params["head"]["bias"], tensors["final_logits_bias"][0])


def test_the_bias_of_t5_is_that_of_each_stacks_first_layer(tmp_path):
    tensors = tensors_of("t5")
    params = load(write(tmp_path, "t5", tensors), strict=True).model.params
    for ours, theirs in ((params, "decoder"), (params["encoder"], "encoder")):
        name = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        np.testing.assert_array_equal(ours["positions"]["table"], tensors[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_an_unexpected_and_a_misshapen_tensor_of_each_stack_are_named_in_one_error(name, tmp_path):
    tensors, wrong = tensors_of(name), []
    for side in SIDES:
        gone, other = sorted(key for key in tensors if f"{side}." in key and ("v_proj.weight" in key or ".v." in key))[
            :2
        ]
        del tensors[gone]
        tensors[other] = np.ones((3, 4), np.float32)
        more = gone.replace("1", "7").replace("0", "7")
        tensors[more] = np.ones((2, 2), np.float32)
        wrong += [f"missing: {gone.removeprefix('model.')}", f"shape: {other}", f"unexpected: {more}"]
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, name, tensors))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(lines) == 6 and all(any(line.startswith(text) for line in lines) for text in wrong)


TABLES = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_a_table_may_be_stored_under_any_of_its_names_but_only_once_in_effect(name, tmp_path):
    tensors = tensors_of(name)
    prefix = "" if name == "t5" else "model."
    names = [key if key == "lm_head.weight" else prefix + key for key in TABLES]
    table = tensors.pop(names[0])
    plain = load(write(tmp_path / "plain", name, tensors | {names[0]: table}), strict=True)
    for key in names[1:]:
        same(load(write(tmp_path / key, name, tensors | {key: table})).model.params, plain.model.params)
    every = tensors | {key: table.copy() for key in names}
    same(load(write(tmp_path / "every", name, every)).model.params, plain.model.params)
    every[names[2]][-1, -1] += 1
    with pytest.raises(CheckpointError, match=rf"differs: {names[2]} from {names[0]}"):
        load(write(tmp_path / "every", name, every))
    with pytest.raises(CheckpointError, match=" or ".join(["missing: shared.weight", *TABLES[1:]])):
        load(write(tmp_path / "none", name, tensors))


def test_separate_tables_are_not_each_others(tmp_path):
    tensors = tensors_of("marian_separate")
    params = load(write(tmp_path, "marian_separate", tensors), strict=True).model.params
    np.testing.assert_array_equal(params["encoder"]["embed"]["table"], tensors["model.encoder.embed_tokens.weight"])
    np.testing.assert_array_equal(params["embed"]["table"], tensors["model.decoder.embed_tokens.weight"])
    del tensors["model.encoder.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"missing: encoder\.embed_tokens\.weight \[80, 32\]"):
        load(write(tmp_path, "marian_separate", tensors))


def test_an_untied_head_of_t5_is_its_own_tensor_or_where_there_is_none_the_table(tmp_path):
    tensors = tensors_of("t5_v11")
    own = load(write(tmp_path, "t5_v11", tensors), strict=True).model
    np.testing.assert_array_equal(own.params["head"]["kernel"], tensors.pop("lm_head.weight").T)
    table = load(write(tmp_path, "t5_v11", tensors), strict=True).model
    np.testing.assert_array_equal(table.params["head"]["kernel"], tensors["shared.weight"].T)
    assert own.config == table.config and own.config.logit_scale == 1.0


def test_a_head_without_a_stored_bias_has_none_in_effect(tmp_path):
    tensors = tensors_of("bart")
    del tensors["final_logits_bias"]
    assert not load(write(tmp_path, "bart", tensors), strict=True).model.params["head"]["bias"].any()


def test_what_carries_no_parameter_is_ignored(tmp_path):
    tensors = tensors_of("t5")
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)
    load(write(tmp_path / "t5", "t5", tensors), strict=True)
    tensors = tensors_of("bart") | {"model.encoder.version": np.ones(1, np.float32)}
    load(write(tmp_path / "bart", "bart", tensors), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_stored_table_of_waves_must_be_the_one_that_is_computed(tmp_path, dtype):
    m = np.arange(32) // 2 * 2 / 32
    angles = np.arange(96)[:, None] / 10000.0**m
    waves = np.concatenate([np.sin(angles[:, ::2]), np.cos(angles[:, 1::2])], axis=1).astype(dtype)
    tensors = tensors_of("marian")
    plain = load(write(tmp_path, "marian", tensors)).model
    tensors["model.encoder.embed_positions.weight"] = waves
    same(load(write(tmp_path, "marian", tensors), strict=True).model.params, plain.params)
    for wrong in (np.roll(waves, 1, axis=0), waves[:, ::-1].copy(), waves[:, :-1].copy()):
        tensors["model.encoder.embed_positions.weight"] = wrong
        with pytest.raises(CheckpointError, match=r"differs: model\.encoder\.embed_positions\.weight"):
            load(write(tmp_path, "marian", tensors))


@pytest.mark.parametrize(
    ("config", "generation", "start"),
    [
        ({}, None, (2, 0)),
        ({"forced_bos_token_id": None}, None, (2,)),
        ({"forced_bos_token_id": ...}, {"forced_bos_token_id": 7}, (2, 7)),
        ({}, {"decoder_start_token_id": 9}, (9, 0)),
        ({"decoder_start_token_id": ..., "forced_bos_token_id": ...}, None, (0,)),  # the BOS, as Transformers does
        ({"forced_bos_token_id": ..., "force_bos_token_to_be_generated": True}, None, (2, 0)),
        ({"forced_bos_token_id": ..., "force_bos_token_to_be_generated": False}, None, (2,)),
        (dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id", "bos_token_id"), ...), None, ()),
    ],
)
def test_targets_begin_as_the_folder_says(tmp_path, config, generation, start):
    folder = write(tmp_path, "bart", tensors_of("bart"), **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).start_ids == start


@pytest.mark.parametrize("value", ["x", 64, [1.5]])
def test_a_beginning_that_is_no_id_of_the_vocabulary_is_an_error(tmp_path, value):
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        load(write(tmp_path, "bart", tensors_of("bart"), decoder_start_token_id=value))


@pytest.mark.full
def test_a_folder_of_marian_translates_text_and_takes_the_beginning_of_a_target(tmp_path):
    pytest.importorskip("sentencepiece")
    files = json.loads((parity.GOLDEN / "tokenizers.json").read_text())["marian"]["files"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    shapes = {key: tuple(size if n == 64 else n for n in shape) for key, shape in golden("marian")["shapes"].items()}
    ids = {"vocab_size": size, "decoder_start_token_id": size - 1, "bad_words_ids": [[size - 1]], "eos_token_id": 0}
    write(tmp_path, "marian", cases.weights(shapes, 0, **golden("marian")["weights"]), **ids)
    lm = load(tmp_path, strict=True)
    begin = lm.tokenizer.encode_target("die")
    out = kvjax.generate(lm, ["the cat sat", "who?"], target=["die", ""], max_new_tokens=8)
    assert out.prompts == [[size - 1, *begin], [size - 1]] and out.text[1]
    ids = [lm.encode(text) for text in ("the cat sat", "who?")]
    same = kvjax.generate(lm, ids, target=[begin, []], max_new_tokens=8)
    np.testing.assert_array_equal(same.tokens, out.tokens)
    assert "die" + out.text[0] == lm.decode([*begin, *out.tokens[0]])
    assert size - 1 not in out.tokens
