"""Promise: a loop stays on the device. It asks the host for nothing, and a generation is a few programs, however many
tokens it makes."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ONE_LAYER, prompt_ids, tiny

import kvjax
from kvjax import caches, sampling
from kvjax.loops import beam, speculative
from kvjax.loops import decode as loop

HOST = re.compile(
    r"\b(infeed|outfeed|send|recv)(?:-start|-done)?\(|custom_call_target=\"[^\"]*(callback|python|host)", re.I
)
"""How compiled text speaks of the host: queues to and from it, and calls of Python."""

CHAIN = sampling.chain(sampling.temperature(0.8), sampling.top_k(10), sampling.top_p(0.9))


class Apart:
    """Stands in for a jitted loop: keeps its compiled text, and runs it where nothing may come from the host."""

    def __init__(self, jitted):
        self.jitted, self.texts = jitted, []

    def __call__(self, *args, **static):
        compiled = self.jitted.lower(*args, **static).compile()
        self.texts.append(compiled.as_text())
        args = jax.device_put(args)
        with jax.transfer_guard("disallow"):
            return jax.block_until_ready(compiled(*args))

    @property
    def asked(self):
        """What of the host is in the texts."""
        assert self.texts and all("HloModule" in text for text in self.texts)
        return [found.group(0) for text in self.texts for found in HOST.finditer(text)]


@pytest.fixture
def apart(monkeypatch):
    """The loops of `generate`, one of which runs."""
    both = [Apart(loop.DONATING.until), Apart(beam.DONATING), Apart(speculative.DONATING)]
    monkeypatch.setattr(loop, "DONATING", loop.DONATING._replace(until=both[0]))
    monkeypatch.setattr(beam, "DONATING", both[1])
    monkeypatch.setattr(speculative, "DONATING", both[2])
    return lambda: next(each for each in both if each.texts)


def generate(model, new, **options):
    return kvjax.generate(model, prompt_ids(2, 2, 10).tolist(), max_new_tokens=new, **options)


def lookup():
    return kvjax.speculate(kvjax.prompt_lookup(), drafted=2)


LOOPS = {
    "greedy": dict,
    "sampled": lambda: {"sampler": CHAIN, "stop_ids": (1, 2), "stop": [[3, 4]], "logprobs": 2},
    "pages": lambda: {"plan": caches.paged(8)},
    "beams": lambda: {"algorithm": kvjax.beam(2)},
    "lookup": lambda: {"algorithm": lookup()},
    "draft": lambda: {"algorithm": kvjax.speculate(kvjax.draft_model(tiny(ONE_LAYER, 1)), drafted=2), "sampler": CHAIN},
}
FULL = {"pages", "draft"}


@pytest.mark.corner
@pytest.mark.parametrize("how", [pytest.param(x, marks=pytest.mark.full if x in FULL else ()) for x in LOOPS])
def test_a_loop_asks_the_host_for_nothing(apart, how):
    out = generate(tiny(ONE_LAYER), 40, **LOOPS[how]())
    assert out.lengths.max() >= 16
    assert apart().asked == []


@pytest.mark.corner
def test_a_scan_of_steps_and_a_step_ask_the_host_for_nothing():
    model = tiny(ONE_LAYER)
    run = loop.VALUE._replace(step=Apart(loop.VALUE.step), decode=Apart(loop.VALUE.decode))
    logits, cache = kvjax.prefill(model, kvjax.init_cache(model, batch=2, capacity=64), prompt_ids(2, 2, 10))
    _, logits, cache = kvjax.decode(model, cache, logits, steps=20, sampler=CHAIN, _run=run)
    logits, cache = kvjax.step(model, cache, sampling.largest(logits), _run=run)
    cache.check()
    assert run.decode.asked == run.step.asked == []


def looks(x):
    jax.debug.callback(lambda x: None, x[0, 0, 0])
    return x


def asks(x):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.corner
@pytest.mark.parametrize("asking", [looks, asks])
def test_a_loop_that_asks_the_host_is_found(asking):
    model = tiny(ONE_LAYER)
    own, jitted = model.head, Apart(loop.VALUE.decode)
    broken = model.replace(head=lambda params, config, x: own(params, config, asking(x)))
    cache, logits = kvjax.init_cache(broken, batch=2, capacity=64), jnp.zeros((2, 96))
    kvjax.decode(broken, cache, logits, steps=2, _run=loop.VALUE._replace(decode=jitted))
    assert jitted.asked


@pytest.mark.corner
def test_numbers_of_the_host_do_not_pass_where_a_loop_runs():
    step = jax.jit(lambda x, by: x + by)
    x = step(jnp.zeros(3), jnp.ones(3))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        step(x, np.ones(3, np.float32))


@pytest.fixture
def programs(tmp_path):
    """How many programs the device runs, by JAX's own trace of what its runtime does."""

    def count(work):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with jax.profiler.trace(str(folder)):
            work()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [event.name for plane in planes for line in plane.lines for event in line.events]
        return sum("Executable::ExecuteHelper" in name for name in events)

    return count


@pytest.mark.corner
def test_the_count_of_programs_is_that_of_calls(programs):
    one = jax.jit(lambda x: x + 1)
    x = one(jnp.zeros(3))
    assert programs(lambda: None) == 0
    assert programs(lambda: one(one(one(x)))) == 3


@pytest.mark.corner
def test_a_generation_is_two_programs_however_many_tokens(programs):
    model = tiny(ONE_LAYER)
    generate(model, 64)
    assert programs(lambda: generate(model, 17)) == 2, "a prefill and a loop"
    assert programs(lambda: generate(model, 64)) == 2


@pytest.mark.corner
def test_a_stream_is_a_program_a_chunk_and_not_one_a_token(programs):
    model = tiny(ONE_LAYER)

    def stream(new):
        for _ in kvjax.stream(model, prompt_ids(2, 2, 10).tolist(), max_new_tokens=new):
            pass

    stream(64)
    assert programs(lambda: stream(16)) == 2
    assert programs(lambda: stream(64)) == 5


@pytest.mark.corner
@pytest.mark.parametrize("algorithm", [lambda: kvjax.beam(2), lookup], ids=["beams", "lookup"])
def test_an_algorithm_runs_as_many_programs_for_16_tokens_as_for_64(programs, algorithm):
    model = tiny(ONE_LAYER)
    few, many = (
        (lambda: generate(model, 16, algorithm=algorithm())),
        (lambda: generate(model, 64, algorithm=algorithm())),
    )
    many()
    assert programs(few) == programs(many)


@pytest.mark.corner
def test_a_loop_of_steps_on_the_host_is_a_program_a_token(programs):
    model = tiny(ONE_LAYER)
    logits, start = kvjax.prefill(model, kvjax.init_cache(model, batch=2, capacity=64), prompt_ids(2, 2, 10))

    def steps(n):
        cache, tokens = start, np.array([1, 2], np.int32)
        for _ in range(n):
            logits, cache = kvjax.step(model, cache, tokens)
        jax.block_until_ready(logits)

    steps(1)
    assert programs(lambda: steps(24)) - programs(lambda: steps(8)) >= 16
