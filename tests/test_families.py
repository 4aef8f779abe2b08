"""Every family agrees with Hugging Face Transformers, by the golden files that scripts/parity.py wrote."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import caches, cli
from kvjax.config import NormOrder
from kvjax.lm import load
from kvjax.ops.positions import Rope

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import parity
from parity import cases

NAMES = [case.name for case in cases.CASES]
forward = jax.jit(kvjax.forward)


@functools.cache
def golden(name):
    return parity.read(name)


def model_of(name, seed, folder):
    meta, _ = golden(name)
    parity.write_folder(folder, meta, seed)
    return load(folder, strict=True).model, name


def compared(model, name, seed):
    meta, arrays = golden(name)
    return parity.compare(forward(model, *parity.batch(arrays, seed, meta)), arrays, seed)


def assert_parity(model, name, seed):
    error, same = compared(model, name, seed)
    assert error <= parity.TOLERANCE, f"max|d|/max|logit| {error:.1e}"
    assert same, "greedy ids differ"


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_ragged_batch_equal_the_reference_at_every_position(name, tmp_path):
    assert_parity(*model_of(name, 0, tmp_path), 0)


@pytest.mark.full
@pytest.mark.parametrize("seed", cases.SEEDS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference_at_the_other_seeds(name, seed, tmp_path):
    assert_parity(*model_of(name, seed, tmp_path), seed)


def greedy(model, prompts, steps, plan=None):
    """Ids of greedy steps after ragged prompts, through a cache."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = kvjax.init_cache(model, plan, batch=len(prompts), capacity=int(lengths.max()) + steps)
    logits, cache = kvjax.prefill(model, cache, tokens, lengths)
    return np.asarray(kvjax.decode(model, cache, logits, steps=steps)[0])


@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "qwen3_tied_windows", "gemma3_old_layout"])
def test_sixty_four_greedy_steps_through_the_default_cache_equal_the_reference(name, tmp_path):
    model, _ = model_of(name, 0, tmp_path)
    random, _ = cases.tokens(0)
    found = greedy(model, [random[: cases.PROMPT], random[:3]], cases.STEPS)
    np.testing.assert_array_equal(found[0], golden(name)[1]["0/greedy_ids"])


@pytest.mark.full
@pytest.mark.parametrize("plan", [caches.dense(), caches.recompute(), None], ids=["dense", "recompute", "default"])
@pytest.mark.parametrize("seed", cases.SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_steps_through_every_exact_cache_equal_the_reference(name, seed, plan, tmp_path):
    model, _ = model_of(name, seed, tmp_path)
    random, _ = cases.tokens(seed)
    found = greedy(model, [random[: cases.PROMPT]], cases.STEPS, plan)
    np.testing.assert_array_equal(found[0], golden(name)[1][f"{seed}/greedy_ids"])


def test_a_golden_file_proves_something_and_names_its_versions():
    for case in cases.ALL:
        meta, arrays = golden(case.name)
        assert meta["config"] == case.config
        assert {"torch", "transformers"} <= meta["versions"].keys()
        for seed in cases.SEEDS:
            assert len(set(arrays[f"{seed}/greedy_ids"].tolist())) >= case.distinct > 1
            assert arrays[f"{seed}/margin"] >= parity.MARGIN


def test_weights_from_a_seed_are_the_same_on_every_numpy():
    shapes = {"h.0.attn.c_attn.weight": (2, 3), "ln_f.weight": (2,), "ln_f.bias": (2,), "wte.weight": (2, 2)}
    made = cases.weights(shapes, 0, 1.0)
    flat = np.concatenate([made[name].ravel() for name in sorted(made)])
    np.testing.assert_array_equal(flat, np.array(WEIGHTS, np.float32))


WEIGHTS = [
    -0.4572412967681885,
    -0.36515572667121887,
    0.8794093728065491,
    -0.960943877696991,
    -0.7326392531394958,
    0.8271424770355225,
    0.13123875856399536,
    -0.30380141735076904,
    0.7819785475730896,
    1.1797784566879272,
    -0.07078045606613159,
    0.13829739391803741,
    0.05561484023928642,
    -0.11486108601093292,
]


def test_info_says_what_sets_gemma_apart(tmp_path, capsys):
    parity.write_folder(tmp_path, golden("gemma2")[0], 0)
    assert cli.main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "7 in 2 of 3 layers" in shown
    assert "x + norm(f(norm(x)))" in shown
    assert "3 on scores, 12 on logits" in shown


# Negative controls: details that are easy to get wrong; each must fail the check that the right one passes.
def other_theta(model):
    return changed(
        model, positions=dataclasses.replace(model.config.positions, theta=model.config.positions.theta * 1.01)
    )


def window_one_wider(model):
    return changed(model, windows=tuple(w and w + 1 for w in model.config.windows))


def window_one_narrower(model):
    return changed(model, windows=tuple(w and w - 1 for w in model.config.windows))


def window_on_the_wrong_layers(model):
    return changed(model, windows=model.config.windows[::-1])


def no_scaling(model):
    return changed(model, positions=Rope(model.config.positions.theta))


def rounded_bounds(model):
    scaling = dataclasses.replace(model.config.positions.scaling, truncate=not model.config.positions.scaling.truncate)
    return changed(model, positions=dataclasses.replace(model.config.positions, scaling=scaling))


def other_temperature(model):
    scaling = dataclasses.replace(model.config.positions.scaling, attention_factor=None)
    return changed(model, positions=dataclasses.replace(model.config.positions, scaling=scaling))


def exact_gelu(model):
    return changed(model, activation=kvjax.ops.activations.gelu)


def no_head_norm(model):
    return changed(model, qk_norm=None)


def other_eps(model):
    return changed(model, norm=dataclasses.replace(model.config.norm, eps=model.config.norm.eps * 10))


def no_attention_softcap(model):
    return changed(model, attention_softcap=None)


def no_logit_softcap(model):
    return changed(model, logit_softcap=None)


def unscaled_embedding(model):
    return changed(model, embed_scale=1.0)


def scale_of_the_head_width(model):
    return changed(model, scale=None)


def local_rotation_everywhere(model):
    return changed(model, layer_positions=(model.config.layer_positions[0],) * model.config.num_layers)


def global_rotation_everywhere(model):
    return changed(model, layer_positions=())


def norms_before_alone(model):
    return changed(model, norm_order=NormOrder.PRE)


def post_norms_swapped(model):
    def swap(layer):
        layer["attn_post_norm"], layer["ffn_norm"] = layer["ffn_norm"], layer["attn_post_norm"]

    return params_changed(model, swap)


def changed(model, **fields):
    return kvjax.decoder(dataclasses.replace(model.config, **fields), model.params)


def params_changed(model, change):
    params = jax.tree.map(lambda x: x, model.params)
    change(params["layers"]["1"])
    return kvjax.decoder(model.config, params)


def untransposed_out(model):
    return params_changed(model, lambda layer: layer["attn"]["out"].update(kernel=layer["attn"]["out"]["kernel"].T))


def gate_and_up_swapped(model):
    def swap(layer):
        layer["ffn"]["gate_up"] = jax.tree.map(lambda x: jnp.roll(x, x.shape[-1] // 2, -1), layer["ffn"]["gate_up"])

    return params_changed(model, swap)


def no_bias(model):
    return params_changed(model, lambda layer: layer["attn"]["qkv"].update(bias=layer["attn"]["qkv"]["bias"] * 0))


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("llama_tied_theta", other_theta),
        ("llama_tied_theta", untransposed_out),
        ("llama_tied_theta", gate_and_up_swapped),
        ("llama_tied_theta", other_eps),
        ("llama_linear", no_scaling),
        ("llama_llama3", no_scaling),
        ("llama_yarn", rounded_bounds),
        ("qwen2_yarn_parameters", rounded_bounds),
        ("qwen2_yarn_parameters", other_temperature),
        ("qwen2_yarn_parameters", no_bias),
        ("mistral_window", window_one_wider),
        ("mistral_window", window_one_narrower),
        ("qwen2_windows", window_on_the_wrong_layers),
        ("qwen3_bias_linear", no_head_norm),
        ("gpt2", exact_gelu),
        ("gemma2", no_attention_softcap),
        pytest.param("gemma2", no_logit_softcap, marks=pytest.mark.full),
        pytest.param("gemma2", unscaled_embedding, marks=pytest.mark.full),
        pytest.param("gemma2", scale_of_the_head_width, marks=pytest.mark.full),
        pytest.param("gemma2", window_one_wider, marks=pytest.mark.full),
        pytest.param("gemma2", exact_gelu, marks=pytest.mark.full),
        pytest.param("gemma2", norms_before_alone, marks=pytest.mark.full),
        ("gemma2", post_norms_swapped),
        pytest.param("gemma2_types_bias", window_on_the_wrong_layers, marks=pytest.mark.full),
        pytest.param("gemma3_old_layout", local_rotation_everywhere, marks=pytest.mark.full),
        ("gemma3_old_layout", global_rotation_everywhere),
        pytest.param("gemma3_old_layout", window_on_the_wrong_layers, marks=pytest.mark.full),
        pytest.param("gemma3_new_layout", no_head_norm, marks=pytest.mark.full),
    ],
)
def test_the_parity_check_fails_for_a_model_with_one_wrong_detail(name, mutant, tmp_path):
    model, _ = model_of(name, 0, tmp_path)
    error, _ = compared(mutant(model), name, 0)
    assert error > 2 * parity.TOLERANCE
