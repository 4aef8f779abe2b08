"""Promise: as a Linen or an NNX module the decoder gives what the functions give, on the same parameters."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization, traverse_util
from flax.core import freeze
from models import CAPACITY, MIXED, PROMPTS, RELATIVE, WINDOW, prompt_ids, tiny
from test_readme import ROOT, lines_of

import kvjax
from kvjax import InputError, caches
from kvjax.bridge import linen as in_linen
from kvjax.bridge import nnx as in_nnx

MODEL = tiny(MIXED)
IDS = prompt_ids()
LOCAL = caches.per_layer(local=caches.ring(WINDOW, slack=16), full=caches.dense())  # the default plan


def through_linen(model):
    decoder, variables = in_linen.Decoder(model.config), {"params": model.params}
    return lambda *given, **more: decoder.apply(variables, *given, **more)


DOORS = pytest.mark.parametrize("door", [through_linen, in_nnx.Decoder], ids=["linen", "nnx"])
ONE_DOOR = pytest.mark.parametrize(  # what compiles much goes through the other door in the full suite
    "door", [through_linen, pytest.param(in_nnx.Decoder, marks=pytest.mark.full)], ids=["linen", "nnx"]
)


def empty(model=MODEL, plan=None, batch=3):
    return kvjax.init_cache(model, plan, batch=batch, capacity=CAPACITY)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_module_is_at_most_sixty_lines_of_code():
    for name in ("linen", "nnx"):
        assert 10 < lines_of((ROOT / f"kvjax/bridge/{name}.py").read_text("utf-8")) <= 60


@pytest.mark.full
def test_who_imports_kvjax_does_not_wait_for_the_modules():
    code = "import sys, kvjax; print([x for x in sys.modules if x.startswith(('kvjax.bridge', 'flax.nnx'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---------------------------------------------------------------- what they give


@pytest.mark.corner
@DOORS
def test_prefill_step_and_forward_go_through_one_door(door):
    decoder, cache = door(MODEL), empty()
    got, want = decoder(IDS, cache, PROMPTS), kvjax.prefill(MODEL, cache, IDS, PROMPTS)
    same(got, want)
    for tokens, fed in ((IDS[:, :4], kvjax.prefill), (IDS[:, 4:5], lambda *x: kvjax.step(*x[:2], x[2][:, 0]))):
        same(decoder(tokens, want[1]), want := fed(MODEL, want[1], tokens))
    same(decoder(IDS), kvjax.forward(MODEL, IDS))
    same(decoder(IDS, cache, PROMPTS), got)  # the cache given before is as it was
    assert not np.array_equal(decoder(IDS[::-1], cache)[0], got[0])


@pytest.mark.full
@DOORS
def test_an_encoder_decoder_model_goes_through_the_same_door(door):
    model = tiny(RELATIVE)
    decoder, source = door(model), kvjax.encode(model, IDS)
    logits = kvjax.forward(model, IDS, PROMPTS, source=source)
    same(decoder(IDS, valid=PROMPTS, source=source), logits)
    cache = kvjax.init_cache(model, source=source, capacity=CAPACITY)
    last = decoder(IDS, cache, PROMPTS)[0]
    np.testing.assert_allclose(last, logits[np.arange(3), PROMPTS - 1], atol=1e-5 * np.abs(logits).max())
    with pytest.raises(InputError, match="source is given beside a cache of 3 rows"):
        decoder(IDS, cache, source=source)


@pytest.mark.full
def test_the_encoder_is_reached_through_the_modules():
    model = tiny(RELATIVE)
    want = kvjax.encode(model, IDS, PROMPTS)
    same(through_linen(model)(IDS, PROMPTS, method="encode"), want)
    same(in_nnx.Decoder(model).encode(IDS, PROMPTS), want)


@DOORS
def test_wrong_arguments_are_the_errors_of_the_functions(door):
    decoder = door(MODEL)
    with pytest.raises(InputError, match=r"tokens must be \[B, S\]"):
        decoder(IDS[0], empty())
    with pytest.raises(InputError, match="the vocabulary has 96 ids"):
        decoder(IDS + 96, empty())
    with pytest.raises(kvjax.CacheError, match="16 more do not fit"):
        decoder(IDS, kvjax.init_cache(MODEL, batch=3, capacity=8))


# ---------------------------------------------------------------- parameters


def test_parameters_that_are_not_those_of_the_configuration_are_named():
    decoder = in_linen.Decoder(MIXED)
    flat = traverse_util.flatten_dict(MODEL.params, sep="/")
    for wrong, message in (
        ({"layers/1/attn/out/kernel": None}, r"params/layers/1/attn/out/kernel is missing, config declares \(32, 32\)"),
        ({"embed/table": jnp.zeros((97, 32))}, r"params/embed/table is \(97, 32\), config declares \(96, 32\)"),
        ({"layers/2/attn/out/kernel": jnp.zeros((32, 32))}, r"layers/2/attn/out/kernel is \(32, 32\).* nothing"),
    ):
        given = {name: x for name, x in (flat | wrong).items() if x is not None}
        with pytest.raises(InputError, match=message):
            decoder.apply({"params": traverse_util.unflatten_dict(given, sep="/")}, IDS)
    with pytest.raises(InputError, match="params/.* is missing"):
        decoder.apply(MODEL.params, IDS)  # without {"params": …}


@pytest.mark.corner
def test_init_makes_the_parameters_that_kvjax_declares():
    for config, method in ((MIXED, "__call__"), (RELATIVE, "encode")):
        init = functools.partial(in_linen.Decoder(config, param_dtype=jnp.bfloat16).init, method=method)
        made = jax.eval_shape(init, jax.random.key(0), IDS)
        assert made == {"params": kvjax.params.abstract_params(config, jnp.bfloat16)}


@pytest.mark.corner
def test_parameters_go_to_linen_to_nnx_and_back_and_stay_what_they_are():
    variables = {"params": MODEL.params}
    decoder = in_nnx.Decoder(tiny(MIXED, seed=1))
    state = nnx.state(decoder, nnx.Param)
    nnx.replace_by_pure_dict(state, variables)  # Linen's variables are NNX's state
    nnx.update(decoder, state)
    back = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for params in (back["params"], decoder.model.params, freeze(variables)["params"].unfreeze()):
        same(params, MODEL.params)
    same(in_linen.Decoder(MIXED).apply(freeze(variables), IDS), decoder(IDS))


@pytest.mark.corner
def test_split_and_merge_give_the_same_decoder_and_no_cache_stays_in_it():
    decoder = in_nnx.Decoder(MODEL)
    want = decoder(IDS, empty())
    graph, state = nnx.split(decoder)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure({"params": MODEL.params})
    assert graph == nnx.split(in_nnx.Decoder(MODEL))[0] and hash(graph) == hash(nnx.split(decoder)[0])
    same(nnx.merge(graph, state)(IDS, empty()), want)
    compiled = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state)(tokens, cache))
    np.testing.assert_allclose(compiled(state, IDS, empty())[0], want[0], atol=1e-5 * np.abs(want[0]).max())


@pytest.mark.full
def test_parameters_in_eight_bits_go_through_as_well():
    small = kvjax.int8_weights(MODEL)
    want = kvjax.forward(small, IDS)
    same(through_linen(small)(IDS), want)
    same(in_nnx.Decoder(small)(IDS), want)


def test_a_decoder_is_a_part_of_a_module_of_ones_own():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return in_linen.Decoder(MIXED, name="decoder")(tokens) * self.param("by", nn.initializers.ones, ())

    variables = Scaled().init(jax.random.key(0), IDS)
    assert variables["params"].keys() == {"decoder", "by"}
    given = {"params": {"decoder": MODEL.params, "by": jnp.float32(2)}}
    same(Scaled().apply(given, IDS), 2 * kvjax.forward(MODEL, IDS))


# ---------------------------------------------------------------- sites


def shown(door, decoder, *given):
    """Streams by layer and site, of one call."""
    if door is through_linen:
        out, found = decoder(*given, mutable=["intermediates"])
        return out, found["intermediates"]["layers"]
    out = decoder(*given)
    return out, nnx.to_pure_dict(nnx.pop(decoder, nnx.Intermediate))["intermediates"]["layers"]


SITES = ("embedding", "after_self_attention", "after_ffn")


@pytest.mark.corner
@ONE_DOOR
def test_sites_come_back_as_intermediates_and_are_what_a_trace_holds(door):
    decoder = door(MODEL) if door is through_linen else in_nnx.Decoder(MODEL, sites=SITES)
    plain, traced = empty(), empty(plan=caches.traced(LOCAL))
    for tokens, valid in ((IDS, PROMPTS), (IDS[:, :4], None), (IDS[:, 4:5], None)):
        lengths = np.asarray(plain.lengths)
        (logits, plain), layers = shown(door, decoder, tokens, plain, valid)
        want, traced = kvjax.prefill(MODEL, traced, tokens, valid)
        np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
        assert [*layers] == ["0", "1"] and {*layers["0"]} == {*SITES} and {*layers["1"]} == {*SITES[1:]}
        for layer, sites in layers.items():
            for site, stream in sites.items():
                trace = np.pad(traced.trace(int(layer), site), ((0, 0), (0, 16), (0, 0)))
                trace = np.stack([row[n : n + tokens.shape[1]] for row, n in zip(trace, lengths, strict=True)])
                np.testing.assert_allclose(stream, trace, atol=1e-5 * np.abs(trace).max(), err_msg=f"{layer} {site}")
                assert np.abs(np.asarray(stream)).max() > 0.1
    assert jax.tree.structure(plain) == jax.tree.structure(empty())  # nothing of the trace stays in the cache


@pytest.mark.full
@DOORS
def test_without_a_cache_sites_come_back_as_well(door):
    decoder = door(MODEL) if door is through_linen else in_nnx.Decoder(MODEL, sites=("after_ffn",))
    logits, layers = shown(door, decoder, IDS, None, PROMPTS)
    want, real = kvjax.forward(MODEL, IDS, PROMPTS), np.arange(16)[None, :] < PROMPTS[:, None]
    np.testing.assert_allclose(np.asarray(logits)[real], np.asarray(want)[real], atol=1e-5 * np.abs(want).max())
    traced = kvjax.prefill(MODEL, empty(plan=caches.traced()), IDS, PROMPTS)[1].trace(1, "after_ffn")[:, :16]
    np.testing.assert_allclose(layers["1"]["after_ffn"], traced, atol=1e-5 * np.abs(traced).max())


def test_a_site_that_no_layer_has_is_a_clear_error():
    with pytest.raises(InputError, match="no layer has a site 'before_ffn'"):
        in_linen.Decoder(MIXED, sites=("before_ffn",)).apply({"params": MODEL.params}, IDS, mutable=["intermediates"])


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def lm():
    return kvjax.load("shakespeare")


def loss_of(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def tuned_in_linen(model, tokens, optimiser):
    decoder = in_linen.Decoder(model.config)

    @jax.jit
    def step(params, state):
        loss = lambda p: loss_of(decoder.apply({"params": p}, tokens), tokens)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    params, state, losses = model.params, optimiser.init(model.params), []
    for _ in range(2):
        value, params, state = step(params, state)
        losses.append(float(value))
    return losses, kvjax.decoder(model.config, params)


def tuned_in_nnx(model, tokens, optimiser):
    decoder = in_nnx.Decoder(model)
    state = nnx.Optimizer(decoder, optimiser, wrt=nnx.Param)

    @nnx.jit
    def step(decoder, state):
        value, gradient = nnx.value_and_grad(lambda d: loss_of(d(tokens), tokens))(decoder)
        state.update(decoder, gradient)
        return value

    losses = [float(step(decoder, state)) for _ in range(2)]
    return losses, decoder.model


@pytest.mark.full
@pytest.mark.corner
@pytest.mark.parametrize("tune", [tuned_in_linen, tuned_in_nnx])
def test_a_loaded_checkpoint_is_tuned_and_then_decoded_with(tune, lm):
    prompt, tokens = "ROMEO:", jnp.asarray([lm.encode("ROMEO:\nI will go back to the sea, and sing to the sea.")])
    (before, after), model = tune(lm.model, tokens, optax.adam(5e-4))
    assert after < before - 0.1
    other = dataclasses.replace(lm, model=model)
    out = kvjax.generate(other, prompt, max_new_tokens=12)
    assert out.text != kvjax.generate(lm, prompt, max_new_tokens=12).text
    row = jnp.asarray([[*out.prompts[0], *out.tokens[0]]])
    chosen = kvjax.forward(model, row).argmax(axis=-1)[0, len(out.prompts[0]) - 1 : -1]
    np.testing.assert_array_equal(chosen, out.tokens[0])


# ---------------------------------------------------------------- what else takes a nested dict


@pytest.mark.corner
def test_traverse_util_takes_the_parameters_apart_and_together():
    flat = traverse_util.flatten_dict(MODEL.params, sep="/")
    assert flat["layers/0/attn/qkv/kernel"].shape == (32, 64)
    same(traverse_util.unflatten_dict(flat, sep="/"), MODEL.params)
    halved = traverse_util.path_aware_map(lambda path, x: x / 2 if "head" in path else x, MODEL.params)
    np.testing.assert_allclose(
        kvjax.forward(kvjax.decoder(MIXED, halved), IDS), kvjax.forward(MODEL, IDS) / 2, rtol=1e-5, atol=1e-4
    )


@pytest.mark.corner
def test_flax_serialization_writes_and_reads_the_parameters():
    data, zeros = serialization.to_bytes(MODEL.params), jax.tree.map(jnp.zeros_like, MODEL.params)
    same(serialization.from_bytes(zeros, data), MODEL.params)
    same(serialization.msgpack_restore(serialization.msgpack_serialize(jax.device_get(MODEL.params))), MODEL.params)
    assert jax.tree.structure(serialization.msgpack_restore(data)) == jax.tree.structure(MODEL.params)


@pytest.mark.corner
def test_optax_masked_changes_what_its_mask_names():
    mask = traverse_util.path_aware_map(lambda path, x: path[:2] == ("layers", "1"), MODEL.params)
    rest = jax.tree.map(lambda x: not x, mask)
    optimiser = optax.chain(optax.masked(optax.sgd(1.0), mask), optax.masked(optax.set_to_zero(), rest))
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, MODEL.params), optimiser.init(MODEL.params))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), MODEL.params, optax.apply_updates(MODEL.params, updates))
    assert moved == mask and any(jax.tree.leaves(mask)) and not all(jax.tree.leaves(mask))


@pytest.mark.corner
def test_orbax_writes_and_reads_the_parameters(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", MODEL.params)
        checkpointer.wait_until_finished()
        like = kvjax.params.abstract_params(MIXED)
        same(checkpointer.restore(tmp_path / "params", like), MODEL.params)


# ---------------------------------------------------------------- the page for those who come from Transformers

THEIRS = """input_ids attention_mask position_ids decoder_input_ids decoder_attention_mask encoder_outputs params trace
prng_key generation_config logits_processor max_length max_new_tokens min_length pad_token_id bos_token_id eos_token_id
decoder_start_token_id do_sample temperature top_k top_p num_beams length_penalty early_stopping num_return_sequences
no_repeat_ngram_size forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
forced_decoder_ids"""
"""Arguments of `FlaxGenerationMixin.generate` of Transformers 4.x, and the keys of GenerationConfig that it read."""


def answered(page):
    """What stands in the first columns of a page's tables, with an answer beside it."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page, re.MULTILINE)
    return {name for first, second in rows if second.strip() for name in re.findall(r"`(\w+)", first)}


def unknown(page):
    """Words of kvjax on a page that there are not."""
    words = set(re.findall(r"`[^`\n]*?\b(?:kvjax|sampling|caches)(?:\.[a-z]\w*)+", page))
    names = {re.search(r"\b(?:kvjax|sampling|caches)(?:\.[a-z]\w*)+$", word).group() for word in words}
    names = {name if name.startswith("kvjax") else f"kvjax.{name}" for name in names}
    return {name for name in names if not known(name.removeprefix("kvjax."))}


def known(path):
    try:
        return operator.attrgetter(path)(kvjax) is not None
    except AttributeError:
        return False


def test_the_page_answers_every_argument_of_their_generate_with_words_that_there_are():
    page = (ROOT / "docs/from_transformers.md").read_text("utf-8")
    assert {*THEIRS.split()} <= answered(page)
    assert unknown(page) == set()
    less = page.replace("| `top_p` |", "| none |").replace("sampling.min_p`", "sampling.most_p`")
    assert {*THEIRS.split()} - answered(less) == {"top_p"} and unknown(less) == {"kvjax.sampling.most_p"}
