"""`kvjax estimate`: its bytes are those of arrays, what it says fits does and one more does not, thresholds are where
costs cross, and its table and its JSON hold the same numbers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from models import FULL, LEARNED, MIXED, tiny

import kvjax
from kvjax import caches, cli, codecs, costs
from kvjax.errors import CheckpointError, InputError
from kvjax.loops import decode as loop
from kvjax.planner import DEVICES, Device, Rate, named
from kvjax.planner.crossings import first
from kvjax.planner.drawn import points
from kvjax.planner.estimates import nbytes
from kvjax.planner.models import Planned
from kvjax.train.package import config_json

SMALL = Device("small", 600_000, 1e9, (("float32", 20e9),), 1e8, "made up")
TIED = dataclasses.replace(FULL, tied=True)
TRANSLATOR = dataclasses.replace(TIED, encoder=FULL)
MHA = dataclasses.replace(TIED, kv_heads=FULL.query_heads, ffn_width=4 * FULL.width, gated=False)
PLANS = {
    "dense": (FULL, caches.dense(), {}),
    "default plan": (MIXED, None, {}),
    "int8": (FULL, caches.dense(store=codecs.int8()), {}),
    "pages": (FULL, caches.paged(16), {}),
    "absorbed": (LEARNED, caches.layer_input(absorb=True), {}),
    "hybrid": (FULL, caches.hybrid(), {}),
    "source": (TRANSLATOR, None, {"source": 20}),
    "source, absorbed": (TRANSLATOR, None, {"source": 20, "cross": caches.encoder_output(absorb=True)}),
}
RARE = ("pages", "hybrid", "source, absorbed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config.json and nothing else."""
    made = tmp_path_factory.mktemp("estimate") / "tiny"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config_json(dataclasses.replace(TIED, max_positions=256))))
    return made


def arrays(model, plan, batch, capacity, source=None, cross=None):
    given = None if source is None else kvjax.encode(model, jnp.ones((batch, source), jnp.int32))
    return kvjax.init_cache(model, plan, batch=batch, capacity=capacity, source=given, cross=cross)


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.full) if x in RARE else x for x in PLANS])
def test_bytes_are_those_of_the_arrays(name):
    config, plan, more = PLANS[name]
    model = tiny(config)
    made = kvjax.estimate(model, batch=3, context=40, plan=plan, device=SMALL, **more)
    assert made.weights == nbytes(model.params)
    assert made.cache == arrays(model, plan, 3, 40, **more).nbytes
    assert made.parameters == sum(x.size for x in jax.tree.leaves(model.params))
    assert made.nbytes == made.weights + made.cache + made.temporaries


def test_bytes_of_a_config_json_are_those_of_the_model_and_of_int8_those_of_its_codes(folder):
    model = tiny(TIED)
    for where in (folder, str(folder / "config.json")):
        made = kvjax.estimate(where, context=64, device="A100", dtype="float32")
        assert (made.model, made.weights, made.context) == ("tiny", nbytes(model.params), 64)
    assert kvjax.estimate(folder, device="A100").context == 256, "as many as it has positions"
    half = kvjax.estimate(folder, device="A100", dtype="bfloat16", weights="int8")
    maps = [x for path, x in jax.tree_util.tree_leaves_with_path(model.params) if path[-1].key == "kernel"]
    table = model.params["embed"]["table"]
    others = sum(x.size for x in jax.tree.leaves(model.params)) - sum(x.size for x in (*maps, table))
    assert half.weights == sum(x.size + 4 * x.shape[1] for x in maps) + table.size + 4 * len(table) + 2 * others
    coded = kvjax.estimate(kvjax.int8_weights(model), device="A100", context=64)
    assert (coded.weights, coded.int8) == (nbytes(kvjax.int8_weights(model).params), True)
    assert coded.parameters == kvjax.estimate(model, device="A100", context=64).parameters, "scales are none"


@pytest.mark.parametrize("name", ["dense", "default plan"])
def test_temporaries_are_at_least_what_a_compiled_step_takes(name):
    config, plan, _ = PLANS[name]
    model, tokens = tiny(config), jax.ShapeDtypeStruct((3,), jnp.int32)
    cache = jax.eval_shape(lambda: kvjax.init_cache(model, plan, batch=3, capacity=96))
    taken = loop.DONATING.step.lower(model, cache, tokens).compile().memory_analysis().temp_size_in_bytes
    bound = kvjax.estimate(model, batch=3, context=96, plan=plan, device=SMALL).temporaries
    assert taken <= bound <= 4 * taken


def test_at_hand_the_compiler_says_what_a_step_takes(monkeypatch):
    measured = dataclasses.replace(SMALL, rates=(Rate(1, 1 << 20, 1e9),), layer_seconds=1e-3)
    monkeypatch.setattr("kvjax.planner.estimates.measured_device", lambda dtype: measured)
    model = tiny(FULL)
    made = kvjax.estimate(model, batch=2, context=48)
    cache = jax.eval_shape(lambda: kvjax.init_cache(model, batch=2, capacity=48))
    taken = loop.DONATING.step.lower(model, cache, jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
    assert made.temporaries == taken.memory_analysis().temp_size_in_bytes
    assert made.step.expected > FULL.num_layers * 1e-3 and "to be expected" in str(made)


@pytest.mark.parametrize("name", ["dense", pytest.param("int8", marks=pytest.mark.full), "source"])
def test_the_largest_batch_and_context_fit_and_one_more_does_not(name):
    config, plan, more = PLANS[name]
    config = dataclasses.replace(config, max_positions=None)
    made = kvjax.estimate(config, batch=2, context=32, plan=plan, device=SMALL, **more)
    slots = {} if made.source is None else {"source": made.source}  # stays, whatever the context

    def fits(batch, context):
        return kvjax.estimate(config, batch=batch, context=context, plan=plan, device=SMALL, **slots).fits

    assert made.fits and made.largest_batch > 2 and made.largest_context > 32
    assert fits(made.largest_batch, 32) and not fits(made.largest_batch + 1, 32)
    assert fits(2, made.largest_context) and not fits(2, made.largest_context + 1)


def test_what_does_not_fit_is_said_and_positions_are_a_limit_too():
    little = dataclasses.replace(SMALL, memory=1000)
    made = kvjax.estimate(FULL, context=32, device=little)
    assert (made.fits, made.largest_batch, made.largest_context) == (False, 0, 0)
    assert "does not fit" in str(made)
    short = dataclasses.replace(FULL, max_positions=64)
    assert kvjax.estimate(short, device=named("H200")).largest_context == 64


def test_a_step_counts_what_the_formulas_say_and_reads_weights_and_cache_once():
    model, made = tiny(TIED), kvjax.estimate(tiny(TIED), batch=3, context=40, plan=caches.dense(), device=SMALL)
    assert made.step.flops == costs.kv_flops(TIED, slots=40, batch=3)
    assert made.step.cache == made.cache - costs.container_nbytes(3, 40)
    assert made.step.weights == nbytes(model.params), "the head reads the table"
    seconds = max(made.step.flops.contractions / 20e9, (made.step.weights + made.step.cache) / 1e9)
    assert made.step.limit == seconds and made.as_dict()["tokens_per_second"]["limit"] == 3 / seconds


def test_a_step_does_not_read_what_it_does_not_need():
    made = kvjax.estimate(LEARNED, batch=3, context=40, device=SMALL)
    tables = 4 * 32 * (LEARNED.vocab_size + LEARNED.positions.size)
    assert made.step.weights == made.weights - tables + 2 * 3 * 4 * 32, "a row of each table for a row of the batch"
    traced = kvjax.estimate(FULL, batch=3, context=40, plan=caches.hybrid(), device=SMALL)
    plain = kvjax.estimate(FULL, batch=3, context=40, plan=caches.dense(), device=SMALL)
    assert traced.cache > plain.cache and traced.step.cache == plain.step.cache
    params, kept = tiny(TRANSLATOR).params, {"source": 20, "device": SMALL, "context": 40}
    maps = nbytes([layer["cross"]["kv"] for layer in params["layers"].values()])
    reads = kvjax.estimate(TRANSLATOR, **kept).step.weights
    assert reads == nbytes(params) - nbytes(params["encoder"]) - maps
    assert kvjax.estimate(TRANSLATOR, cross=caches.encoder_output(), **kept).step.weights == reads + maps


@pytest.mark.parametrize("bandwidth", [1e8, 1e9, 1e11])
def test_the_bound_is_what_takes_longest(bandwidth):
    device = dataclasses.replace(SMALL, bandwidth=bandwidth)
    for context in (8, 4096):
        step = kvjax.estimate(FULL, batch=4, context=context, device=device).step
        work = step.flops.contractions / 20e9
        reading = {"weights": step.weights / bandwidth, "cache": step.cache / bandwidth}
        assert step.limit == pytest.approx(max(work, sum(reading.values())))
        assert step.bound == ("FLOPs" if work > sum(reading.values()) else max(reading, key=reading.get))


def crossing(made, what):
    (found,) = [each for each in made.crossings if what in each.what]
    return found


@pytest.mark.parametrize("config", [TIED, MHA], ids=["grouped", "as many heads"])
def test_crossovers_are_where_costs_cross(config):
    made = kvjax.estimate(config, batch=3, context=64, plan=caches.dense(), device=SMALL)

    def step(context, batch=3):
        return kvjax.estimate(config, batch=batch, context=context, plan=caches.dense(), device=SMALL).step

    at = crossing(made, "cache reads").at
    assert step(at).cache >= step(at).weights > 0 and step(at - 1).cache < step(at - 1).weights
    at = math.ceil(crossing(made, "scores").at)
    cost = [costs.layer_flops(config, t) for t in (at - 1, at)]
    assert [one.scores >= one.projections + one.ffn for one in cost] == [False, True]
    at = math.ceil(crossing(made, "maps are bound").at)

    def slow(batch):
        one = step(8, batch)
        return (one.flops.contractions - one.flops.scores) / 20e9 >= one.weights / 1e9

    assert [slow(at - 1), slow(at)] == [False, True]


def seconds_a_slot(config, balance, kept):
    """Of one slot of one layer, in units of bytes: keys and values read; or the input, and what it needs besides."""
    width, keys = 4 * config.width, 4 * 2 * config.kv_heads * config.head_dim
    if kept == "K/V":
        return keys
    if kept == "projected":  # reading and projecting overlap
        return max(width, 4 * config.width * config.kv_heads * config.head_dim / balance)
    return width + 4 * config.query_heads * config.width / balance


@pytest.mark.parametrize("balance", [8, 60])
@pytest.mark.parametrize("heads", [(4, 4), (8, 4), (4, 1)])
def test_a_layers_input_pays_where_its_seconds_are_fewer(balance, heads):
    config = dataclasses.replace(LEARNED, query_heads=heads[0], kv_heads=heads[1])
    device = dataclasses.replace(SMALL, flops=(("float32", balance * 1e9),))
    made = kvjax.estimate(config, context=32, device=device)
    kv = seconds_a_slot(config, balance, "K/V")
    assert crossing(made, "no more bytes").holds == (config.width <= 2 * config.kv_heads * config.head_dim)
    assert crossing(made, "projected again").holds == (seconds_a_slot(config, balance, "projected") <= kv)
    assert crossing(made, "absorbed").holds == (seconds_a_slot(config, balance, "absorbed") <= kv)
    assert crossing(kvjax.estimate(FULL, device=device), "absorbed").at is None, "a rotation stands between"


def test_storage_pays_where_its_seconds_are_fewer():
    for config in (FULL, MHA, LEARNED):
        for host in (1e5, 1e7, 1e9):
            made = kvjax.estimate(config, context=32, device=dataclasses.replace(SMALL, host=host))
            one, keys = costs.layer_flops(config, 0), 2 * config.kv_heads * config.head_dim
            again = (one.projections + one.ffn) / 20e9
            assert crossing(made, "prefilling").holds == (4 * keys / host <= again)
            width = max(4 * config.width / host, 2 * config.width * keys / 20e9)
            better = width <= 4 * keys / host and config.width < keys
            assert crossing(made, "loading X").holds == better
    nowhere = kvjax.estimate(FULL, context=32, device=dataclasses.replace(SMALL, host=None))
    assert crossing(nowhere, "prefilling").holds is None


def test_formulas_of_any_shape_are_the_known_ones_where_heads_are_many_and_width_is_four():
    assert costs.storage_for_kv(MHA, 2, 1e12) == costs.least_storage_for_kv(MHA.width, 2, 1e12)
    assert costs.absorbed_heads(MHA, 200, 2) == costs.largest_absorbed_heads(200, 2)
    assert costs.storage_for_kv(FULL, 2, 1e12) != costs.least_storage_for_kv(FULL.width, 2, 1e12)


def test_the_first_number_is_found_and_none_where_there_is_none():
    for at in range(1, 40):
        assert first(lambda n, at=at: n >= at, 40) == at
    assert first(lambda n: n >= 41, 40) is None


@pytest.mark.parametrize("config", [FULL, LEARNED, TRANSLATOR], ids=["rotary", "learned", "source"])
def test_strategies_have_the_bytes_of_their_arrays_and_say_why_one_is_refused(config):
    known = kvjax.strategies.STRATEGIES if config.encoder is None else kvjax.strategies.WITH_SOURCE
    more = {} if config.encoder is None else {"source": 20}
    made = kvjax.estimate(config, batch=2, context=40, device=SMALL, **more)
    assert [kept.name for kept in made.strategies] == [strategy.name for strategy in known]
    for kept, strategy in zip(made.strategies, known, strict=True):
        if kept.refused:
            assert (
                kept.name == "input, absorbed" and config is not LEARNED and kept.refused in " ".join(str(made).split())
            )
            continue
        cross = {} if strategy.source is None else {"cross": strategy.source.cross}
        assert kept.nbytes == arrays(tiny(config), strategy.plan, 2, 40, **more, **cross).nbytes
        assert kept.step.flops.contractions > 0 and kept.step.limit > 0


def test_time_goes_by_what_was_measured():
    rates = (Rate(1, 1 << 20, 8e9), Rate(1, 1 << 22, 2e9), Rate(8, 1 << 20, 2e9), Rate(8, 1 << 22, 1e9))
    device = dataclasses.replace(SMALL, rates=rates, layer_seconds=1e-3, logit_seconds=1e-6)
    for rate in rates:
        assert device.reading(rate.rows, rate.nbytes) == pytest.approx(rate.bandwidth)
    assert device.reading(1, 1 << 21) == pytest.approx(4e9), "halfway, in powers"
    assert device.reading(1, 1 << 30) == pytest.approx(2e9) and device.reading(1, 1) == pytest.approx(8e9)
    assert device.reading(16, 1 << 20) == pytest.approx(1e9), "twice the rows, twice the time"
    made = kvjax.estimate(FULL, batch=8, context=64, device=device)
    read = made.step.weights / 2e9 + made.step.cache / 8e9
    assert made.step.expected == pytest.approx(read + 2 * 1e-3 + 8 * FULL.vocab_size * 1e-6)
    assert kvjax.estimate(FULL, batch=8, context=64, device=SMALL).step.expected is None
    assert Device(**json.loads(json.dumps(dataclasses.asdict(device)))) == device


def test_devices_are_datasheets_one_finds_by_name():
    wanted = {"T4", "L4", "A100", "H100", "H200", "TPU v5e", "TPU v5p", "TPU v6e"}
    assert wanted <= {device.name for device in DEVICES}
    for device in DEVICES:
        assert named(device.name.lower().replace(" ", "-")) is device
        assert 16e9 <= device.memory <= 141e9 and 300e9 <= device.bandwidth <= 4800e9 and device.host < device.bandwidth
        rates = dict(device.flops)
        best = max(rates.values())
        assert 100 < best / device.bandwidth < 600 and rates.get("float32", 0) < best
        assert not device.rates and device.source
    assert "bfloat16" not in dict(named("T4").flops)
    assert named("v5e") is named("TPU v5e")


def test_the_half_precision_of_a_file_becomes_the_one_that_a_device_has(folder, tmp_path):
    said = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    said.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(said))
    dtypes = {name: kvjax.estimate(tmp_path, device=name).dtype for name in ("T4", "A100")}
    assert dtypes == {"T4": "float16", "A100": "bfloat16"}
    assert kvjax.estimate(tmp_path, device=SMALL).dtype == "float32"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "T5"}, "device 'T5' is none of T4, L4"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 has no rate on device small; it has float32"),
        ({"dtype": "int8"}, "dtype must be a floating one, not int8"),
        ({"context": 300}, "context 300 passes the 256 positions"),
        ({"batch": 0}, "batch must be from 1 to"),
        ({"source": 4}, "source is 4, cross None, but the model has no encoder"),
        ({"weights": "int4"}, "weights must be int8 or None, not 'int4'"),
        ({"plan": (caches.dense(),)}, "1 kinds for 2 layers"),
    ],
)
def test_what_cannot_be_estimated_is_an_error_that_names_it(folder, more, said):
    with pytest.raises(InputError, match=said):
        kvjax.estimate(folder, **({"device": SMALL} | more))


def test_models_that_have_no_configuration_or_no_file_are_errors(tmp_path):
    own = kvjax.Model({}, None, lambda *_: None)
    with pytest.raises(InputError, match="this model has none"):
        kvjax.estimate(own, device="T4")
    with pytest.raises(CheckpointError, match="has no config.json"):
        kvjax.estimate(tmp_path, device="T4")
    with pytest.raises(InputError, match="memory must be more than 0, not 0"):
        Device("none", 0, 1.0, (), None, "")


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")

    def run(*argv):
        code = cli.main(["estimate", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_table_and_json_hold_the_same_numbers(command, folder):
    argv = (folder / "config.json", "--device", "T4", "--batch", 3, "--cache", "dense(store=int8())", "--context", 40)
    code, out, err = command(*argv, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    made = json.loads(out)
    direct = kvjax.estimate(folder, device="T4", batch=3, plan=caches.dense(store=codecs.int8()), context=40)
    assert made == json.loads(json.dumps(direct.as_dict()))
    code, out, err = command(*argv)
    assert (code, err, out) == (0, "", f"{direct}\n") and repr(direct) == str(direct)
    assert all(len(line) <= 80 for line in out.splitlines())
    for name in ("weights", "cache", "temporaries", "nbytes", "largest_batch"):
        assert f" {made[name]:,}\n" in out
    assert made["fits"] and made["strategies"][3]["refused"] and made["strategies"][1]["tokens_per_second"]["limit"] > 0
    assert {each["holds"] for each in made["crossings"]} <= {True, False}


def test_the_command_says_what_is_wrong_in_one_line(command, folder):
    code, out, err = command(folder, "--device", "T5")
    assert (code, out) == (1, "") and err.startswith("kvjax: error: estimate: device 'T5'") and err.count("\n") == 1
    assert command(folder, "--batch", 0)[0] == 2


def test_a_plot_has_a_line_for_each_strategy_and_needs_an_extra(command, folder, tmp_path, monkeypatch):
    made = kvjax.estimate(folder, device=SMALL, dtype="float32", context=128)
    found = points(made, lambda context: kvjax.estimate(folder, device=SMALL, dtype="float32", context=context))
    assert [context for context, _ in found] == [16, 32, 64, 128]
    names = [kept.name for kept in made.strategies if not kept.refused]
    for context, speeds in found:
        assert list(speeds) == names and all(speed > 0 for speed, _ in speeds.values())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, out, err = command(folder, "--device", "A100", "--plot", tmp_path / "x.svg")
    assert code == 1 and "pip install 'kvjax[plots]'" in err


def test_a_wrong_formula_would_be_seen(monkeypatch):
    """The checks above, on reads that forget the scales of codes and on weights that forget their biases."""
    plan = caches.dense(store=codecs.int8())
    monkeypatch.setattr(
        Planned, "nbytes", lambda self: sum(4 * x.size for x in jax.tree.leaves(self.model.params) if x.ndim > 1)
    )
    made = kvjax.estimate(FULL, batch=3, context=40, plan=plan, device=SMALL)
    assert made.weights != nbytes(tiny(FULL).params)
    codes = 3 * 40 * 2 * FULL.num_layers * FULL.kv_heads * FULL.head_dim
    assert made.step.cache == codes * (1 + 4 / FULL.head_dim) != codes
