"""The command line: what it prints, what it refuses and how, and what it leaves in the user's folders."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from safetensors.numpy import save_file

import kvjax
from kvjax import caches, cli
from kvjax.caches import KINDS
from kvjax.cli import describe_model, startup
from kvjax.cli.describe_model import describe_config
from kvjax.config import Config
from kvjax.loops.run import Run
from kvjax.params import abstract_params
from kvjax.train.package import config_json, to_hf

BOS = "<|text|>"


def write_folder(folder, *, bos=True):
    """A random model of bytes in the Hugging Face layout."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([BOS, *sorted(letters)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([BOS])
    config = Config(len(vocab), 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, max_positions=256)
    params = jax.tree.map(lambda x: x * 10, kvjax.init_params(config, jax.random.key(0)))
    folder.mkdir(parents=True)
    save_file(to_hf(params, config), folder / "model.safetensors")
    backend.save(str(folder / "tokenizer.json"))
    ends = {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config_json(config) | ends))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "add_bos_token": True} if bos else {}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")


@pytest.fixture
def command(capsys):
    """Runs the command in this process: `code, stdout, stderr`."""

    def run(*argv):
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def written(command, folder):
    """Runs `kvjax generate --json` and gives the object."""

    def run(*argv):
        code, out, err = command("generate", "--model", folder, "--max-new-tokens", 20, "--json", *argv)
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.mark.corner
def test_json_is_one_object_whose_text_is_what_the_new_ids_add(written, folder):
    made = written("ROMEO: wherefore")
    lm = kvjax.load(folder)
    assert set(made) == {"model", "prompt_ids", "seed", "new_ids", "text", "stop", "timings", "cache_bytes"}
    assert made["model"] == "tiny"
    assert made["prompt_ids"] == lm.encode("ROMEO: wherefore")
    assert made["text"] == lm.decode(made["prompt_ids"] + made["new_ids"]).removeprefix("ROMEO: wherefore")
    assert (len(made["new_ids"]), made["stop"]) == (20, "length")
    assert made["cache_bytes"] == kvjax.cache_nbytes(lm.model, None, capacity=256)
    assert made["timings"]["steps"] == 20 + made["timings"]["wasted"]


def test_stdout_is_the_same_text_in_pieces_and_stderr_one_line_of_figures(command, written, folder):
    options = ("--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--seed", 3, "Now is the winter")
    made = written(*options)
    code, out, err = command("generate", "--model", folder, "--max-new-tokens", 20, *options)
    assert code == 0
    assert out == made["text"] + "\n" * (not made["text"].endswith("\n"))
    assert err.count("\n") == 1
    for figure in (
        "18 prompt tokens",
        "20 new",
        "compile",
        "prefill",
        "tokens/s",
        f"cache {made['cache_bytes']:,} bytes",
    ):
        assert figure in err


def test_a_bar_shows_on_a_terminal_while_nothing_is_written(command, folder, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = command("generate", "ROMEO: wherefore", "--model", folder, "--max-new-tokens", 20, "--json")
    assert code == 0 and json.loads(out) and " tokens" in err and "\r" in err and "\n" not in err


def test_temperature_zero_is_greedy_and_seeds_make_texts(written, folder):
    greedy = kvjax.generate(kvjax.load(folder), "To be", max_new_tokens=20)
    assert written("To be", "--temperature", 0)["new_ids"] == greedy.tokens[0].tolist()
    assert written("To be", "--top-k", 1)["new_ids"] == greedy.tokens[0].tolist()
    assert written("To be", "--min-p", 1)["new_ids"] == greedy.tokens[0].tolist()
    less = kvjax.sampling.greedy(kvjax.sampling.repetition_penalty(1.5))
    penalised = kvjax.generate(kvjax.load(folder), "To be", max_new_tokens=20, sampler=less).tokens[0].tolist()
    assert written("To be", "--temperature", 0, "--repetition-penalty", 1.5)["new_ids"] == penalised
    one, two, again = (written("To be", "--seed", s)["new_ids"] for s in (1, 2, 1))
    assert one == again != two


def test_samples_are_those_of_their_seeds_and_a_stop_text_ends_each(written, command, folder):
    one, two = (written("To be", "--seed", s, "--temperature", 2) for s in (4, 5))
    both = written("To be", "--seed", 4, "--temperature", 2, "--samples", 2, "--logprobs", 3)
    assert [each["new_ids"] for each in both["samples"]] == [one["new_ids"], two["new_ids"]]
    assert both["new_ids"] == one["new_ids"] and len(both["logprobs"]) == len(both["top_logprobs"]) == 20
    assert all(len(best) == 3 and best[0][1] >= best[1][1] for best in both["top_logprobs"])
    stop = two["text"][4:6]
    cut = written("To be", "--seed", 5, "--temperature", 2, "--stop", stop, "--stop", "never this")
    assert (cut["text"], cut["stop"]) == (two["text"][: two["text"].find(stop)], "stop")
    options = ("To be", "--seed", 4, "--temperature", 2, "--max-new-tokens", 20)
    code, out, err = command("generate", "--model", folder, *options, "--samples", 2)
    assert code == 0 and "40 new" in err
    assert out.replace("\n", "") == f"--- seed 4 (length){one['text']}--- seed 5 (length){two['text']}".replace(
        "\n", ""
    )
    code, out, err = command("generate", "--model", folder, *options, "--logprobs", 2)
    assert (code, out) == (1, "") and "--logprobs goes with --json" in err


def test_an_empty_prompt_is_the_bos_alone(written, command, tmp_path):
    assert written("")["prompt_ids"] == written()["prompt_ids"] == [0]
    code, out, err = command("generate", "", "--model", write_folder(tmp_path / "bare", bos=False))
    assert (code, out) == (1, "")
    assert err.startswith("kvjax: error: ") and "no BOS" in err


def test_prompts_come_from_files_and_from_standard_input_exactly(written, command, folder, tmp_path, monkeypatch):
    text = "Line one\n\tβ and 語\n"
    file = tmp_path / "prompt.txt"
    file.write_text(text, "utf-8")
    expected = written(text)["prompt_ids"]
    assert written("--prompt-file", file)["prompt_ids"] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert written("-")["prompt_ids"] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff"), "utf-8"))
    file.write_bytes(b"\xff\xfe")
    for argv in (["-"], ["--prompt-file", file]):
        code, _, err = command("generate", "--model", folder, *argv)
        assert code == 1 and "not UTF-8" in err


def test_the_kind_of_cache_reads_like_python(written, folder):
    assert written("To be", "--cache", "ring(1024, sinks=4)")["new_ids"] == written("To be")["new_ids"]
    half = written("To be", "--cache", "dense(store=bfloat16)", "--max-new-tokens", 0)
    assert half["cache_bytes"] < written("To be", "--max-new-tokens", 0)["cache_bytes"]


def test_dtype_is_that_of_the_parameters_and_the_cache(written, folder):
    made = {d: written("x", "--dtype", d, "--max-new-tokens", 0) for d in ("float16", "float32", "float64")}
    assert all((one["new_ids"], one["text"]) == ([], "") for one in made.values())
    sizes = {d: one["cache_bytes"] for d, one in made.items()}
    own = 4 * 256 + 12
    assert [size - own for size in sizes.values()] == [c * (sizes["float16"] - own) for c in (1, 2, 4)]
    assert not jax.config.read("jax_enable_x64")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-p", "-0.1"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-k", "1.5"], "--top-k"),
        (["--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--dtype", "int8"], "--dtype"),
        (["--cache", "rong(3)"], "rong"),
        (["--cache", "ring(0)"], "window"),
        (["--cache", "__import__('os')"], "--cache"),
        (["--temper", "1"], "--temper"),
        (["--no-such"], "--no-such"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line_before_anything_is_loaded(command, argv, named, monkeypatch):
    monkeypatch.setattr("kvjax.cli.startup.load", lambda *a, **k: pytest.fail("loaded"))
    code, out, err = command("generate", "x", *argv)
    assert (code, out) == (2, "")
    assert err.startswith("kvjax: error: ") and err.count("\n") == 1 and named in err


def test_errors_are_exit_1_and_one_line_and_a_traceback_only_with_debug(command, folder, tmp_path):
    wrong = [
        (["generate", "x", "--model", tmp_path / "nowhere"], "is no folder"),
        (["generate", "x", "--model", folder, "--max-new-tokens", 1000], "256 positions"),
        (["generate", "x", "--model", folder, "--prompt-file", tmp_path / "y"], "--prompt-file"),
        (["generate", "--model", folder, "--prompt-file", tmp_path / "y"], "cannot read"),
        (["generate", "\udcff", "--model", folder], "surrogate"),
        (["info", tmp_path], "config.json"),
    ]
    for argv, said in wrong:
        code, out, err = command(*argv)
        assert (code, out) == (1, ""), argv
        assert err.startswith("kvjax: error: ") and err.count("\n") == 1 and said in err
        code, out, err = command(*argv, "--debug")
        assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("kvjax: error: ")


def test_unexpected_errors_are_one_line_too(command, folder, monkeypatch):
    monkeypatch.setattr("kvjax.cli.startup.load", lambda *a, **k: 1 / 0)
    assert command("generate", "x", "--model", folder) == (1, "", "kvjax: error: ZeroDivisionError: division by zero\n")


def test_an_interrupt_while_text_streams_is_exit_130_and_keeps_what_was_written(command, folder, monkeypatch):
    chunks = Run.chunks

    def interrupted(self, n):
        yield next(chunks(self, n))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "chunks", interrupted)
    code, out, err = command("generate", "x", "--model", folder)
    assert code == 130 and out
    assert err == "kvjax: interrupted\n"


def test_a_closed_output_is_told_and_a_closed_error_output_is_none(folder, monkeypatch, capsys):
    argv = ["generate", "To be", "--model", str(folder), "--max-new-tokens", "2"]
    with monkeypatch.context() as here:
        here.setattr(sys, "stdout", None)
        assert cli.main(argv) == 1
    assert capsys.readouterr().err == "kvjax: error: standard output is closed\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(argv) == 0 and capsys.readouterr().out
    sys.stderr.close()


def test_a_closed_pipe_is_quiet(command, folder, monkeypatch):
    def closed(piece, last):
        raise BrokenPipeError

    monkeypatch.setattr("kvjax.cli.write_text._put", closed)
    assert command("generate", "x", "--model", folder) == (141, "", "")


def test_unknown_keys_are_a_warning_in_one_line(command, folder, tmp_path):
    strange = tmp_path / "strange"
    write_folder(strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"flux_capacity": 1.21}))
    script = "import sys; from kvjax.cli import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", script, "info", str(strange)],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
    )
    assert ran.returncode == 0
    assert ran.stderr.startswith("kvjax: warning: ") and "flux_capacity" in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.corner
def test_info_tells_family_shapes_and_the_bytes_of_every_kind(command, folder):
    code, out, err = command("info", folder, "--json")
    assert (code, err) == (0, "")
    about, model = json.loads(out), kvjax.load(folder).model
    leaves = jax.tree.leaves(model.params)
    assert about["family"] == "llama"
    assert about["parameters"] == sum(x.size for x in leaves)
    assert about["bytes"] == sum(x.nbytes for x in leaves) == 2 * about["stored_bytes"]
    assert (about["shapes"]["num_layers"], about["shapes"]["head_dim"]) == (2, 8)
    assert [c["kind"].split("(")[0] for c in about["caches"]] == [kind.__name__ for kind in KINDS]
    dense = about["caches"][0]
    assert dense["bytes"] == kvjax.init_cache(model, kvjax.caches.dense(), capacity=256).nbytes
    assert dense["bytes_per_token"] == 2 * 2 * 2 * 8 * 4 + 4  # layers, keys and values, heads, width, float32; the id
    code, out, err = command("info", folder)
    assert (code, err) == (0, "") and f"{about['parameters']:,}" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "layer_input(): layer inputs 256 bytes a token, as large as keys and values" in " ".join(out.split())
    halved = json.loads(command("info", folder, "--json", "--dtype", "bfloat16")[1])
    assert halved["bytes"] * 2 == about["bytes"]


def test_info_tells_of_the_encoder_and_of_what_is_kept_of_a_source():
    stack = Config(96, 2, 32, query_heads=4, kv_heads=2, head_dim=8, ffn_width=48, max_positions=64)
    wide = dataclasses.replace(stack, num_layers=3, width=40, windows=(), tied=False)
    config = dataclasses.replace(stack, encoder=wide)
    about = describe_config(config, "float32")
    model = kvjax.decoder(config, abstract_params(config))
    told = about["encoder"]
    assert told["parameters"] == sum(x.size for x in jax.tree.leaves(model.params["encoder"]))
    assert (told["shapes"]["num_layers"], told["shapes"]["width"], told["context"]) == (3, 40, 64)
    kv, states = told["kept"]
    assert kv["bytes_per_token"] == 2 * 2 * 2 * 8 * 4 and states["bytes_per_token"] == 40 * 4
    assert (kv["remark"], states["remark"]) == (
        "",
        "40 numbers a source token, fewer than keys and values (64; 0.625 times)",
    )
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    source = kvjax.Source(jax.ShapeDtypeStruct((1, 64, 40), jnp.float32), row, row)
    whole = kvjax.cache_nbytes(model, caches.dense(), source=source, capacity=64)
    assert whole == about["caches"][0]["bytes"] + kv["bytes"]
    rest = {"model": "x", "family": "x", "parameters": 1, "bytes": 4, "dtype": "float32", "stored_bytes": 4}
    text = describe_model._text(about | rest)
    assert max(map(len, text.splitlines())) <= 80
    assert "encoder     3 layers, width 40" in text and "kept of one source" in text
    assert describe_config(stack, "float32")["encoder"] is None
    assert "MORE than" in caches.encoder_output().remark(model.layer_shapes(), 65)


def test_help_has_examples_and_version_names_what_runs(command):
    for argv in (["--help"], ["generate", "--help"], ["info", "--help"], ["compare", "--help"]):
        code, out, err = command(*argv)
        assert (code, err) == (0, "") and "examples:\n  kvjax " in out
    code, out, _ = command("--version")
    assert code == 0 and out.startswith(f"kvjax {kvjax.__version__} (jax {jax.__version__}")


def clean_environment(home):
    """A fresh user: nothing of this process's settings, an empty home."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVJAX_", "JAX_", "XDG_", "PYTHONWARNINGS"))}
    root = str(Path(kvjax.__file__).resolve().parent.parent)
    return kept | {"HOME": str(home), "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def test_a_process_of_its_own_streams_and_keeps_its_programs(folder, tmp_path):
    home = tmp_path / "home"
    argv = [sys.executable, "-m", "kvjax", "generate", "To be", "--model", folder, "--max-new-tokens", "20"]
    first = subprocess.run(argv, capture_output=True, text=True, env=clean_environment(home))
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("\n") == 1
    assert list((home / ".cache" / "kvjax" / "compiled").iterdir())


def test_the_cache_folder_is_the_platforms_and_the_users_choice_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert startup.cache_home({}, "linux") == tmp_path / ".cache"
    assert startup.cache_home({}, "darwin") == tmp_path / "Library" / "Caches"
    assert startup.cache_home({"LOCALAPPDATA": str(tmp_path / "l")}, "win32") == tmp_path / "l"
    assert startup.cache_home({"XDG_CACHE_HOME": str(tmp_path / "x")}, "linux") == tmp_path / "x"
    assert startup.cache_home({"XDG_CACHE_HOME": "relative"}, "linux") == tmp_path / ".cache"


def test_a_cache_folder_that_cannot_be_made_is_let_be(tmp_path, monkeypatch):
    changed = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.update({name: value}))
    (tmp_path / "file").write_text("")
    assert startup.use_compile_cache({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None
    assert startup.use_compile_cache({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}) is None
    assert "jax_compilation_cache_dir" not in changed
    own = tmp_path / "own"
    assert startup.use_compile_cache({"KVJAX_COMPILE_CACHE": str(own)}) == own
    assert changed["jax_compilation_cache_dir"] == str(own)
    assert changed["jax_persistent_cache_min_compile_time_secs"] == 0
    changed.clear()
    assert startup.use_compile_cache({"KVJAX_COMPILE_CACHE": "OFF"}) is None
    assert not changed


@pytest.mark.oracle
def test_greedy_ids_of_the_oracle_are_the_published_ones_from_the_command_line(command):
    if not os.environ.get("KVJAX_ORACLES"):
        pytest.skip("KVJAX_ORACLES is not set: the oracle models are not here")
    known = json.loads((Path(__file__).resolve().parent / "golden" / "stories260K.json").read_text())
    model = Path(os.environ["KVJAX_ORACLES"]) / "stories260K"
    greedy = known["greedy_ids"]
    for prompt, prompt_ids, ids in (
        ("", greedy[:1], greedy),
        ("Zoo", known["zoo_prompt_ids"], known["zoo_greedy_ids"]),
    ):
        n = len(ids) - len(prompt_ids)
        code, out, _ = command(
            "generate", prompt, "--model", model, "--temperature", 0, "--max-new-tokens", n, "--json"
        )
        made = json.loads(out)
        assert code == 0 and made["prompt_ids"] + made["new_ids"] == ids
        assert math.isfinite(made["timings"]["tokens_per_second"])
