"""`kvjax.load`: from a name, a folder or the hub to a model, in little memory, with errors that say everything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kvjax.checkpoint import rules, source
from kvjax.errors import CheckpointError, InputError
from kvjax.lm import LM, load
from kvjax.params import declare

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.append(str(GOLDEN))
import cases  # noqa: E402


def shapes_of(config):
    """HF names and shapes of a tiny llama-like config."""
    m, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim", m // heads)
    shapes = {"model.embed_tokens.weight": (v, m), "model.norm.weight": (m,), "lm_head.weight": (v, m)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{x}_layernorm.weight": (m,) for x in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (kv * d, m) for x in "kv"}
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (heads * d, m),
            f"{layer}.self_attn.o_proj.weight": (m, heads * d),
        }
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (f, m) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (m, f)}
    return shapes


CONFIG = next(case.config for case in cases.CASES if case.name == "llama_linear")


@pytest.fixture
def tensors():
    return cases.weights(shapes_of(CONFIG), 0, 1.0)


def write(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_parameter_is_the_right_tensor_turned_the_right_way(tmp_path, tensors):
    lm = load(write(tmp_path, tensors), strict=True)
    assert isinstance(lm, LM) and lm.tokenizer is None and lm.name == tmp_path.name
    assert jax.tree.map(lambda x: x.shape, lm.model.params) == declare(lm.model.config)
    layer, prefix = lm.model.params["layers"]["1"], "model.layers.1"
    q, k, v = (tensors[f"{prefix}.self_attn.{x}_proj.weight"].T for x in "qkv")
    np.testing.assert_array_equal(layer["attn"]["qkv"]["kernel"], np.concatenate([q, k, v], axis=1))
    gate, up = (tensors[f"{prefix}.mlp.{x}_proj.weight"].T for x in ("gate", "up"))
    np.testing.assert_array_equal(layer["ffn"]["gate_up"]["kernel"], np.concatenate([gate, up], axis=1))
    np.testing.assert_array_equal(layer["attn"]["out"]["kernel"], tensors[f"{prefix}.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(lm.model.params["head"]["kernel"], tensors["lm_head.weight"].T)


def test_every_missing_unexpected_and_misshapen_tensor_is_named_in_one_error(tmp_path, tensors):
    del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.ones((3, 4), np.float32)
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(48, np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((128, 48), np.int32)
    tensors["norm.weight"], tensors["model.layers.1.input_layernorm.weight"] = (
        np.ones(48, np.float32),
        np.ones(47, np.float32),
    )
    tensors["layers.1.post_attention_layernorm.weight"] = np.ones(48, np.float32)
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors))
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(
        ["missing", "shape", "shape", "unexpected", "unexpected", "dtype", "twice"]
    )
    for name in (
        "self_attn.k_proj",
        "layers.0.mlp.gate_proj",
        "q_proj.bias",
        "layers.7.mlp",
        "embed_tokens",
        "input_layernorm",
    ):
        assert name in str(caught.value)
    assert "[3, 4]" in str(caught.value) and "[80, 48]" in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_with_and_without_their_prefix_load_alike(tmp_path, family):
    name = {"llama": "llama_linear", "gpt2": "gpt2"}[family]
    config = next(case.config for case in cases.CASES if case.name == name)
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
    full = cases.weights({k: tuple(v) for k, v in meta["shapes"].items()}, 0, 1.0)
    bare = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in full.items()}
    assert bare.keys() != full.keys()
    one, two = (load(write(tmp_path / str(i), t, config)) for i, t in enumerate((full, bare)))
    same(one.model.params, two.model.params)


def test_tensors_that_carry_no_parameter_are_ignored(tmp_path, tensors):
    plain = load(write(tmp_path / "plain", tensors))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    same(load(write(tmp_path / "more", tensors)).model.params, plain.model.params)
    tied = {**CONFIG, "tie_word_embeddings": True}
    assert "head" not in load(write(tmp_path / "tied", tensors, tied)).model.params


def test_many_files_load_like_one(tmp_path, tensors):
    one = load(write(tmp_path / "one", tensors))
    folder, names = tmp_path / "many", sorted(tensors)
    folder.mkdir()
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    same(load(folder).model.params, one.model.params)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, jnp.float16, jnp.bfloat16, "float32"])
def test_parameters_have_the_asked_dtype_and_float32_on_a_cpu_by_default(tmp_path, tensors, stored, wanted):
    stored_tensors = {name: value.astype(stored) for name, value in tensors.items()}
    lm = load(write(tmp_path, stored_tensors), dtype=wanted)
    expected = jnp.dtype(wanted or jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(lm.model.params)} == {expected}
    table = stored_tensors["model.embed_tokens.weight"].astype(expected)
    np.testing.assert_array_equal(np.asarray(lm.model.params["embed"]["table"]), table)


@pytest.mark.parametrize(
    ("platform", "kind", "stored", "expected"),
    [
        ("cpu", "cpu", ml_dtypes.bfloat16, jnp.float32),
        ("gpu", "Tesla T4", ml_dtypes.bfloat16, jnp.float16),
        ("gpu", "NVIDIA A100", ml_dtypes.bfloat16, jnp.bfloat16),
        ("gpu", "NVIDIA A100", np.float16, jnp.float16),
        ("tpu", "TPU v5 lite", np.float32, jnp.float32),
        ("tpu", "TPU v5 lite", np.float64, jnp.float32),
    ],
)
def test_the_default_dtype_fits_the_device(tmp_path, tensors, monkeypatch, platform, kind, stored, expected):
    write(tmp_path, {name: value.astype(stored) for name, value in tensors.items()})
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, device_kind=kind)])
    assert {x.dtype for x in jax.tree.leaves(load(tmp_path).model.params)} == {jnp.dtype(expected)}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float64])
def test_a_dtype_that_parameters_cannot_have_is_refused_before_anything_is_read(dtype):
    with pytest.raises(InputError, match="dtype"):
        load("./nowhere", dtype=dtype)


def test_a_number_too_large_for_the_asked_dtype_is_an_error_that_names_the_tensor(tmp_path, tensors):
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 2] = 7e4
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj.*float16"):
        load(write(tmp_path, tensors), dtype=jnp.float16)
    load(tmp_path, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', "damaged JSON"),
        ("[1]", "no JSON object"),
        ('{"model_type": "llama", "model_type": "llama"}', "stands twice"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "NaN"),
        ("{" * 100_000, "damaged JSON"),
        ('{"a": ' * 100_000, "too deep|damaged"),
        ("{}", "model_type"),
        (
            '{"model_type": "rwkv"}',
            "known are bart, gemma2, gemma3_text, gpt2, llama, marian, mbart, mistral, qwen2, qwen3, t5",
        ),
    ],
)
def test_a_damaged_config_is_a_checkpoint_error(tmp_path, tensors, text, message):
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_folder_without_config_json_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_a_progress_bar_shows_on_a_terminal_when_loading_takes_long(tmp_path, tensors, monkeypatch, capsys):
    load(write(tmp_path, tensors))
    monkeypatch.setattr(rules, "PATIENCE", 0)
    load(tmp_path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(tmp_path)
    shown = capsys.readouterr()
    assert "loading" in shown.err and not shown.out


def test_a_model_prints_as_one_line(tmp_path, tensors):
    lm = load(write(tmp_path / "toy", tensors))
    assert repr(lm) == f"LM('toy', {sum(x.size for x in tensors.values()):,} parameters, float32)"


def test_an_unknown_key_is_a_warning_that_points_at_the_call_or_an_error(tmp_path, tensors):
    write(tmp_path, tensors, {**CONFIG, "brand_new_key": 1})
    with pytest.warns(UserWarning, match="brand_new_key") as caught:
        load(tmp_path)
    assert caught[0].filename == __file__
    with pytest.raises(CheckpointError, match="brand_new_key"):
        load(tmp_path, strict=True)


def test_ends_come_from_generation_config_then_config_then_the_tokenizer(tmp_path, tensors):
    write(tmp_path, tensors, {**CONFIG, "bos_token_id": 5, "eos_token_id": 6})
    assert (load(tmp_path).bos_id, load(tmp_path).eos_ids) == (5, (6,))
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": [8, 9]}')
    assert (load(tmp_path).bos_id, load(tmp_path).eos_ids) == (7, (8, 9))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load(tmp_path)


def test_text_for_a_model_without_a_tokenizer_is_a_clear_error(tmp_path, tensors):
    lm = load(write(tmp_path, tensors))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        lm.encode("hello")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        lm.decode([1])


def test_a_bundled_name_a_path_and_a_path_object_all_load(tmp_path, tensors, monkeypatch):
    folder = write(tmp_path / "toy", tensors)
    monkeypatch.setattr(source, "BUNDLED", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "./toy", folder, str(folder), str(folder) + os.sep):
        assert load(name).name == "toy"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no folder"),
        ("a/b/c", "no folder"),
        ("", "empty"),
        (Path("gone"), "no folder"),
        (__file__, "is a file"),
    ],
)
def test_a_path_that_is_no_folder_says_so(name, message):
    with pytest.raises(CheckpointError, match=message):
        load(name)


def test_without_the_hub_client_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=re.escape("pip install 'kvjax[hub]'")):
        load("someone/something")


def offline(monkeypatch, cache):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_hub_id_loads_from_the_offline_cache_at_the_asked_revision(tmp_path, tensors, monkeypatch):
    offline(monkeypatch, tmp_path)
    home = tmp_path / "models--someone--something"
    (home / "refs").mkdir(parents=True)
    for sha, ref, scale in (("a" * 40, "main", 1), ("b" * 40, "v2", 2)):
        (home / "refs" / ref).write_text(sha)
        write(home / "snapshots" / sha, {name: value * np.float32(scale) for name, value in tensors.items()})
    main, v2 = load("someone/something"), load("someone/something", revision="v2")
    assert main.name == "someone/something"
    same(jax.tree.map(lambda x: x * 2, main.model.params), v2.model.params)
    with pytest.raises(CheckpointError, match="someone/something"):
        load("someone/something", revision="v3")


@pytest.mark.parametrize("name", ["someone/unknown", "unknown", "bad name!", "someone//x"])
def test_what_the_hub_refuses_is_a_checkpoint_error(name, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError):
        load(name)


def test_only_files_that_are_read_are_fetched(monkeypatch, tmp_path, tensors):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    folder = write(tmp_path, tensors)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(folder))
    load("someone/something", revision="abc")
    assert asked["name"] == "someone/something" and asked["revision"] == "abc"
    assert all(p.endswith((".json", ".safetensors", ".spm", ".model", ".jinja")) for p in asked["allow_patterns"])


BIG = """
import json, sys, numpy as np
from pathlib import Path
import jax, jax.numpy as jnp
from kvjax.lm import load

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load(sys.argv[1])  # what is loaded and compiled once is no cost of the big one
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
params = load(sys.argv[2], dtype=sys.argv[3]).model.params
grown = status("VmHWM") - before
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(json.dumps({"grown": grown, "params": sum(sizes), "largest": int(sys.argv[4])}))
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("stored", "wanted"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "float32"), (np.float32, "float16")]
)
def test_loading_needs_little_more_memory_than_the_parameters(tmp_path, tensors, stored, wanted):
    config = {**CONFIG, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 16000, "num_attention_heads": 12,
              "num_hidden_layers": 4 if stored is np.float32 else 10}  # fmt: skip
    rng = np.random.default_rng(0)
    big = {
        k: rng.standard_normal(s, np.float32).astype(stored)
        for k, s in shapes_of({**config, "num_key_value_heads": 2}).items()
    }
    write(tmp_path / "big", big, {**config, "num_key_value_heads": 2})
    write(tmp_path / "small", tensors)
    size, largest = (tmp_path / "big" / "model.safetensors").stat().st_size, max(x.nbytes for x in big.values())
    assert 150e6 < size < 250e6
    arguments = [str(tmp_path / "small"), str(tmp_path / "big"), wanted, str(largest)]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", BIG, *arguments], capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    ratio = found["grown"] / found["params"]
    print(f"{size / 1e6:.0f} MB as {np.dtype(stored)} to {wanted}: peak / parameters {ratio:.3f}")
    assert found["grown"] <= 1.1 * found["params"] + found["largest"]
