"""`kvjax compare`: what it says of bytes, FLOPs and tokens is so; what does not hold shows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FULL, ONE_LAYER, tiny
from test_cli import write_folder

import kvjax
from kvjax import caches, cli, costs, strategies
from kvjax.cli.compare_strategies import textbook_table
from kvjax.errors import InputError
from kvjax.ops.norms import RMSNorm
from kvjax.ops.positions import Learned
from kvjax.strategies import ABSORBED, OPERATIONS, STRATEGIES, WITH_SOURCE

NAMES = [strategy.name for strategy in STRATEGIES]
NONE, KV = STRATEGIES[:2]
TRANSLATOR = dataclasses.replace(ONE_LAYER, encoder=ONE_LAYER)
SHAPE = {"batch": 2, "context": 14, "new": 6, "edited": 3, "rounds": 2}
ARGV = ["--batch", "2", "--context", "14", "--tokens", "6", "--edit", "3", "--rounds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("compare") / "tiny")


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")

    def run(*argv):
        code = cli.main(["compare", *argv])
        return code, *capsys.readouterr()

    return run


def check(row, batch):
    """What must hold of every strategy that is not refused."""
    assert row["predicted_nbytes"] == row["nbytes"]
    assert row["predicted"] == row["counted"], "norms included"
    assert row["tokens"] == "equal" or row["tokens"].startswith("tie")
    cannot = {"resume"} if row["name"] == "none" or row["name"].startswith("K/V") else set()
    assert set(row["seconds"]) == set(OPERATIONS) - cannot
    assert all(took > 0 for rounds in row["seconds"].values() for took in rounds)


@pytest.mark.full
def test_every_strategy_on_a_model_without_rotation(command, folder):
    code, out, err = command(folder, *ARGV, "--no-rotation", "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    made = json.loads(out)
    assert [row["name"] for row in made["strategies"]] == NAMES
    for row in made["strategies"]:
        assert row["refused"] is None
        check(row, 2)
        assert all(len(rounds) == 2 for rounds in row["seconds"].values())
    assert {"device", "cores", "jax", "python", "kvjax", "day"} <= set(made)
    assert (made["batch"], made["context"], made["new_tokens"], made["capacity"]) == (2, 14, 6, 20)


@pytest.mark.full
def test_every_strategy_on_a_model_with_an_encoder(command, folder, monkeypatch):
    made = strategies.compare(strategies.with_encoder(ONE_LAYER, 64), **SHAPE, source=11)
    assert [row.name for row in made.rows] == [strategy.name for strategy in WITH_SOURCE]
    for row in made.rows:
        check(dataclasses.asdict(row), 2)
    assert made.source == strategies.SourceShape(2, 11, 16)
    monkeypatch.setattr("kvjax.cli.compare_strategies.compare", lambda *args, **kwargs: made)
    code, out, err = command(folder, "--encoder", "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    told = json.loads(out)
    assert [line["float32"] for line in told["textbook"]][:2] == [19_660_800, 4_915_200]
    assert len(told["sentences"]) == 5
    code, out, err = command(folder, "--encoder")
    assert (code, err) == (0, "") and "2 sources of 11 tokens in 16 slots" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    code, marked, err = command(folder, "--encoder", "--markdown")
    assert (
        marked.count("\n|---") == 4 and "| K/V of text and source | 19,660,800 | 9,830,400 | 24 MB | 4.88 |" in marked
    )


def test_a_model_with_an_encoder_is_asked_for_and_sources_too(command, folder, monkeypatch):
    asked = []

    def noted(model, **kwargs):
        asked.append((model.config, kwargs["source"], kwargs["sources"]))
        raise InputError("enough")

    monkeypatch.setattr("kvjax.cli.compare_strategies.compare", noted)
    assert command(folder, "--encoder", "--source", "300", "--sources", "1")[0] == 1
    ((config, *source),) = asked
    assert source == [300, 1] and config.encoder.max_positions == config.max_positions == 300
    assert config.encoder.num_layers == config.num_layers == 2


def test_a_model_of_few_positions_needs_no_arguments(command, monkeypatch):
    def noted(model, **kwargs):
        raise InputError(f"{kwargs['context']} and {kwargs['new']} of {model.max_positions}")

    monkeypatch.setattr("kvjax.cli.compare_strategies.compare", noted)
    code, _, err = command("ar2en")
    assert code == 1 and "10 and 10 of 20" in err


def test_a_source_is_predicted_too_and_a_wrong_formula_for_it_shows():
    known = {strategy.name: strategy for strategy in WITH_SOURCE}
    none, absorbed = known["none"], known["K/V, source absorbed"]
    wrong = dataclasses.replace(absorbed, source=dataclasses.replace(absorbed.source, flops=none.source.flops))
    model = strategies.with_encoder(ONE_LAYER, 64)
    assert model.config.encoder.positions == Learned(64) and "embed" not in model.params["encoder"]
    shape = SHAPE | {"batch": 4, "rounds": 1}
    made = strategies.compare(model, **shape, source=9, sources=2, strategies=(none, wrong))
    assert made.source == strategies.SourceShape(2, 9, 16)
    right, wrong = made.rows
    check(dataclasses.asdict(right), 4)
    assert wrong.predicted != wrong.counted and wrong.nbytes == wrong.predicted_nbytes
    assert wrong.tokens == "equal" or wrong.tokens.startswith("tie"), "rows that share a source exchanged places"


def test_the_textbook_table_fits_80_columns_and_no_figure_in_it_is_typed():
    title, table, said = textbook_table()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 80
    assert table[1] == ("K/V of text and source", "19,660,800", "9,830,400", "24 MB", "4.88")
    assert "100 source and 100 target" in title and "4 times" in said and "24.0 MiB" in said


@pytest.mark.full
def test_tables_fit_80_columns_and_say_what_is_refused(command, folder):
    code, out, err = command(folder, *ARGV)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    tables = "\n".join(out.split("\n\n")[1:4])
    for name in NAMES:
        lines = [line for line in tables.splitlines() if line.startswith(name + " ")]
        assert len(lines) == (0 if name == ABSORBED else 3), name
    assert f"{ABSORBED}: " in out and "rotation" in out
    code, marked, err = command(folder, *ARGV, "--markdown")
    assert (code, err) == (0, "")
    assert marked.count("\n|---") == 3 and "| K/V |" in marked


@pytest.mark.full
def test_the_bundled_model_decodes_alike_whatever_is_kept():
    made = strategies.compare(kvjax.load("shakespeare").model, batch=2, context=100, new=28, rounds=1)
    for row in made.rows:
        if row.name == ABSORBED:
            assert "rotation" in row.refused
        else:
            check(dataclasses.asdict(row), 2)
            assert row.tokens == "equal"


def test_a_wrong_formula_and_wrong_tokens_show():
    wrong = dataclasses.replace(KV, nbytes=NONE.nbytes, flops=costs.recompute_flops, plan=caches.ring(4, slack=6))
    none, wrong = strategies.compare(tiny(ONE_LAYER), **SHAPE, strategies=(NONE, wrong)).rows
    assert none.predicted == none.counted and none.nbytes == none.predicted_nbytes and none.tokens == "equal"
    assert wrong.predicted != wrong.counted and wrong.nbytes != wrong.predicted_nbytes
    assert wrong.tokens.startswith("differ at ")


def test_what_rounding_decides_is_a_tie_and_nothing_else_is():
    model = tiny(FULL)
    twins = jax.tree.map(lambda x: x, model.params)
    twins["head"] = {"kernel": model.params["head"]["kernel"].at[:, 7].set(model.params["head"]["kernel"][:, 8])}
    model = kvjax.decoder(FULL, twins)
    ids, known = np.zeros((1, 4), np.int32), np.array([[1, 7]])
    agreement = strategies.runs._agreement
    assert agreement(model, ids, known, known) == "equal"
    assert agreement(model, ids, known, np.array([[1, 8]])) == "tie at 1"
    assert agreement(model, ids, known, np.array([[1, 9]])) == "differ at 1"
    assert agreement(model, ids, known, np.array([[3, 7]])) == "differ at 0"


def test_a_model_without_rotation_has_the_same_shape():
    model = strategies.without_rotation(dataclasses.replace(FULL, qk_norm=RMSNorm()), 64, jnp.bfloat16)
    assert model.config == dataclasses.replace(FULL, positions=Learned(64), max_positions=64)
    assert model.params["positions"]["table"].shape == (64, FULL.width)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.full
def test_and_it_does_not_repeat_itself():
    model = strategies.without_rotation(FULL, 64)
    made = kvjax.generate(model, [[1, 2, 3]], max_new_tokens=40)
    assert len(set(made.tokens[0].tolist())) >= 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"new": 0}, "new"),
        ({"rounds": 0}, "rounds"),
        ({"edited": 15}, "context 14"),
        ({"context": 0}, "context 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        strategies.compare(tiny(FULL), **SHAPE | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": 0}, "source must be at least 1"),
        ({"sources": 0}, "sources must be at least 1"),
        ({"sources": 3}, "batch 2 is no multiple of 3 sources"),
    ],
)
def test_sources_that_do_not_fit_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        strategies.compare(tiny(TRANSLATOR), **SHAPE | change)
    with pytest.raises(InputError, match="no encoder"):
        strategies.compare(tiny(ONE_LAYER), **SHAPE | change)
    with pytest.raises(InputError, match="has an encoder already"):
        strategies.with_encoder(TRANSLATOR, 64)


def test_what_has_no_configuration_or_no_room_is_refused(command, folder):
    with pytest.raises(InputError, match="Config"):
        strategies.compare(kvjax.Model({}, None, lambda *a: None), **SHAPE)
    code, out, err = command(folder, "--context", "250", "--tokens", "7")
    assert (code, out) == (1, "") and "256 positions" in err and err.count("\n") == 1
    code, out, err = command(folder, "--tokens", "256")
    assert (code, out) == (1, "") and "--tokens" in err
    for argv in (["--tokens", "0"], ["--batch", "x"], ["--json", "--markdown"], ["--encoder", "--no-rotation"]):
        code, out, err = command(folder, *argv)
        assert (code, out) == (2, "") and err.count("\n") == 1
