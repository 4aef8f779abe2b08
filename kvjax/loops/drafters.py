"""Where drafts come from: the text itself, a smaller model, or the first layers of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvjax import struct
from kvjax.caches.base import Cache, OpenCache
from kvjax.caches.cross import Source
from kvjax.caches.loosening import loosened
from kvjax.caching import init_cache
from kvjax.checks import count
from kvjax.config import Config
from kvjax.errors import InputError
from kvjax.lm import LM
from kvjax.loops import decode as loop
from kvjax.loops.feed import feed
from kvjax.model import Model
from kvjax.transformer import apply_decoder, embed, final_norm, through
from kvjax.types import Array, Params

Choose = Callable[[Array, Array, Array], tuple[Array, Any]]
"""`(logits [B, V], tokens [B, T], lengths [B]) -> (drafts [B], their law [B, V] or None)`, as the sampler has it."""


@struct.node
class Drafts(struct.Value):
    """What a drafter proposes to follow a text.

    Args:
        tokens: `[B, n]` int32; -1 from where a row has none.
        laws: `[B, n, V]`, logits of the distributions that they were drawn from; None where nothing was drawn.
        state: of the drafter afterwards.
        cache: of the target model, where the drafter fed that; else None.
        stream: `[B, n + 1, M]`, the target's own stream where it stopped.
    """

    tokens: Array
    laws: Array | None
    state: Any
    cache: Cache | None = None
    stream: Array | None = None


class Drafter(struct.Value):
    """Proposes tokens; derives from it and is a `struct.node`. Everything runs under `jit`, but `check` and `cost`."""

    drawn = True
    """Whether a sampler draws its drafts (`choose`)."""

    def check(self, model: Model) -> None:
        """Raises InputError where it cannot draft for a model."""

    def cost(self, model: Model) -> float:
        """Of one draft, in steps of the target model: an estimate, by which the number of drafts is chosen."""
        return 0.0

    @property
    def encoder(self) -> Model | None:
        """The model that must encode the sources, if it reads some of its own."""
        return None

    def begin(self, cache: Cache, source: Source | None, drafted: int) -> Any:
        """The state for the target's cache; nothing in common with its buffers."""
        return ()

    def propose(
        self,
        model: Model,
        cache: Cache,
        state: Any,
        tokens: Array,
        most: Array,
        active: Array,
        drafted: int,
        choose: Choose,
    ) -> Drafts:
        """Drafts for rows whose next token is known and not fed.

        Args:
            model, cache: the target's; `cache.lengths[B]` tokens are fed.
            state: as `begin` or `settle` left it.
            tokens: `[B, T]` int32, the text with that token.
            most: `[B]` int32, drafts that a row can use, 0 to `drafted`.
            active: `[B]` bool, rows that go on at all.
            drafted: static, columns of the drafts.
            choose: draws.
        """
        raise NotImplementedError

    def verify(self, model: Model, cache: Cache, drafts: Drafts, fed: Array, valid: Array) -> tuple[Array, Cache]:
        """Feeds `fed[B, n + 1]`, `valid[B]` of them, as `kvjax.loops.feed.feed` does, to the target."""
        return feed(model, cache, fed, valid)

    def settle(self, state: Any, lengths: Array) -> Any:
        """The state once the target's text has `lengths[B]` tokens fed."""
        return state

    def resize(self, state: Any, capacity: int) -> Any:
        """The state with room for `capacity` tokens."""
        return state

    def caches(self, state: Any) -> tuple[Cache, ...]:
        """Its own, whose flags must be looked at."""
        return ()


@struct.node
class PromptLookup(Drafter):
    """See `prompt_lookup`."""

    drawn = False

    ngram: int = struct.static()
    least: int = struct.static()

    def propose(
        self,
        model: Model,
        cache: Cache,
        state: Any,
        tokens: Array,
        most: Array,
        active: Array,
        drafted: int,
        choose: Choose,
    ) -> Drafts:
        """See `Drafter`."""
        n = cache.lengths  # the last token stands at n
        at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        run, same = jnp.zeros(tokens.shape, jnp.int32), jnp.ones(tokens.shape, bool)
        for back in range(self.ngram):
            last = jnp.take_along_axis(tokens, jnp.maximum(n - back, 0)[:, None], axis=1)
            there = jnp.take(tokens, jnp.maximum(jnp.arange(tokens.shape[1]) - back, 0), axis=1)
            same &= (there == last) & (at >= back) & (n[:, None] >= back)
            run += same.astype(jnp.int32)
        run = jnp.where(at < n[:, None], run, 0)  # [B, T], how much of what ends there is how the text ends
        best = jnp.max(run, axis=1)
        found = jnp.max(jnp.where((run == best[:, None]) & (at < n[:, None]), at, 0), axis=1)
        # What followed it; where the text ends first, again from its beginning, as LZ77 copies.
        step = jnp.arange(drafted, dtype=jnp.int32)[None, :] % jnp.maximum(n - found, 1)[:, None]
        drafts = jnp.take_along_axis(tokens, found[:, None] + 1 + step, axis=1, mode="clip")
        return Drafts(jnp.where((best >= self.least)[:, None], drafts, -1), None, state)


def prompt_lookup(ngram: int = 3, *, least: int = 1) -> PromptLookup:
    """Drafts what followed the last place where the text read as it does at its end (Saxena 2023, prompt lookup).

    No model, and nothing is drawn: whatever the sampler, tokens are those that the same seed gives without drafts.

    Args:
        ngram: tokens that are compared, at most: the longest agreement wins, of these the latest.
        least: tokens that must agree.

    Raises:
        InputError: a number is no whole number of at least 1, or `least` more than `ngram`.
    """
    count("prompt_lookup: ngram", ngram), count("prompt_lookup: least", least)
    if least > ngram:
        raise InputError(f"prompt_lookup: least {least} is more than ngram {ngram}, the tokens that are compared")
    return PromptLookup(ngram, least)


@struct.node
class DraftModel(Drafter):
    """See `draft_model`."""

    model: Model
    plan: Any = struct.static()

    def check(self, model: Model) -> None:
        """See `Drafter`.

        Raises:
            InputError: another vocabulary, or a source that only the draft reads.
        """
        own, others = self.model.vocab_size, model.vocab_size
        if None not in (own, others) and own != others:
            raise InputError(f"draft_model: the draft has a vocabulary of {own} ids, the model one of {others}")
        if self.model.encode is not None and model.encode is None:
            raise InputError("draft_model: the draft attends to a source, and the model has none")

    def cost(self, model: Model) -> float:
        """See `Drafter`: by the bytes of both models."""
        size = lambda m: sum(x.nbytes for x in jax.tree.leaves(m.params))  # noqa: E731
        return size(self.model) / max(size(model), 1)

    @property
    def encoder(self) -> Model | None:
        """See `Drafter`."""
        return self.model if self.model.encode is not None else None

    def begin(self, cache: Cache, source: Source | None, drafted: int) -> Cache:
        """See `Drafter`."""
        lengths = cache.lengths
        if self.model.max_positions is not None:  # too long for the draft: it has nothing to say there
            lengths = jnp.where(lengths > self.model.max_positions, 0, lengths)
        own = init_cache(self.model, self.plan, batch=cache.batch, capacity=cache.capacity, source=source)
        live = jnp.arange(cache.capacity)[None, :] < lengths[:, None]
        return loop.prefill(self.model, loosened(own, drafted), jnp.where(live, cache.tokens, 0), lengths)[1]

    def propose(
        self,
        model: Model,
        cache: Cache,
        state: Any,
        tokens: Array,
        most: Array,
        active: Array,
        drafted: int,
        choose: Choose,
    ) -> Drafts:
        """See `Drafter`. Its cache lags by the last token, or by two where all drafts were kept."""
        own, limit, n = state, self.model.max_positions, cache.lengths
        lag = n + 1 - own.lengths
        able = active & (lag <= 2)
        if limit is not None:
            able &= n + 1 + drafted <= limit
        at = own.lengths[:, None] + jnp.arange(2, dtype=jnp.int32)[None, :]
        new = jnp.take_along_axis(tokens, at, axis=1, mode="clip")
        logits, own = loop.prefill(self.model, own, new, jnp.where(able, lag, 0))
        first, law = choose(logits, own.tokens, own.lengths)

        def one(carry: tuple[Cache, Array], j: Array) -> tuple[tuple[Cache, Array], tuple[Array, Any]]:
            own, token = carry
            goes = able & (j < most) & (token >= 0)
            logits, own = loop.prefill(self.model, own, jnp.maximum(token, 0)[:, None], goes.astype(jnp.int32))
            token, law = choose(logits, own.tokens, own.lengths)
            token = jnp.where(goes, token, -1)
            return (own, token), (token, law)

        first = jnp.where(able, first, -1)
        (own, _), (rest, laws) = lax.scan(one, (own, first), jnp.arange(1, drafted, dtype=jnp.int32))
        found = jnp.concatenate([first[:, None], rest.T], axis=1)
        joined = None if law is None else jnp.concatenate([law[:, None], jnp.swapaxes(laws, 0, 1)], axis=1)
        return Drafts(found, joined, own)

    def settle(self, state: Any, lengths: Array) -> Any:
        """See `Drafter`."""
        return loop.back_to(state, jnp.minimum(state.lengths, lengths))

    def resize(self, state: Any, capacity: int) -> Any:
        """See `Drafter`."""
        return state.resize(capacity)

    def caches(self, state: Any) -> tuple[Cache, ...]:
        """See `Drafter`."""
        return (state,)


def draft_model(model: LM | Model, plan: Any = None) -> DraftModel:
    """A smaller model drafts, with a cache of its own, of any kind (Leviathan et al. 2023, 2211.17192).

    It must have the ids of the model that it drafts for; positions past its own get no drafts.

    Args:
        model: from `kvjax.load`, or a `Model`.
        plan: kind of its cache; None is `caches.default`.

    Raises:
        InputError: it is no model.
    """
    model = model.model if isinstance(model, LM) else model
    if not isinstance(model, Model):
        raise InputError(f"draft_model: {model!r} is no model; give one from kvjax.load")
    return DraftModel(model, tuple(plan) if isinstance(plan, list) else plan)


@struct.node
class EarlyExit(Drafter):
    """See `early_exit`."""

    layers: int = struct.static()

    def check(self, model: Model) -> None:
        """See `Drafter`.

        Raises:
            InputError: the model has layers of its own making, or not more than `layers`.
        """
        if model.apply is not apply_decoder or not isinstance(model.config, Config):
            raise InputError("early_exit: needs a model of kvjax's own layers (kvjax.decoder)")
        if self.layers >= model.config.num_layers:
            raise InputError(
                f"early_exit: layers {self.layers} must be less than the model's {model.config.num_layers}"
            )

    def cost(self, model: Model) -> float:
        """See `Drafter`: what the layers are of all, and the head."""
        return self.layers / model.config.num_layers

    def propose(
        self,
        model: Model,
        cache: Cache,
        state: Any,
        tokens: Array,
        most: Array,
        active: Array,
        drafted: int,
        choose: Choose,
    ) -> Drafts:
        """See `Drafter`. The first layers of the target's own cache take the drafts in, the last draft too."""
        lower = model.replace(apply=functools.partial(_lower, last=self.layers))
        first = jnp.take_along_axis(tokens, cache.lengths[:, None], axis=1, mode="clip")[:, 0]

        def one(carry: tuple[Cache, Array], j: Array) -> tuple[tuple[Cache, Array], tuple[Array, Array, Any]]:
            cache, token = carry
            goes = active & (j <= most) & (token >= 0)
            x, cache = feed(lower, cache, jnp.maximum(token, 0)[:, None], goes.astype(jnp.int32))
            logits = model.head(model.params, model.config, final_norm(model.params, model.config, x))[:, 0]
            token, law = choose(logits, cache.tokens, cache.lengths)
            token = jnp.where(goes, token, -1)
            return (cache, token), (x[:, 0], token, law)

        steps = jnp.arange(drafted + 1, dtype=jnp.int32)
        (own, _), (stream, found, laws) = lax.scan(one, (cache, first), steps)
        laws = None if laws is None else jnp.swapaxes(laws[:-1], 0, 1)
        return Drafts(found[:-1].T, laws, state, own, jnp.swapaxes(stream, 0, 1))

    def verify(self, model: Model, cache: Cache, drafts: Drafts, fed: Array, valid: Array) -> tuple[Array, Cache]:
        """See `Drafter`. Goes on at the layer where the drafts left; what keeps nothing begins again."""
        assert drafts.cache is not None and drafts.stream is not None
        again = drafts.cache.replace(lengths=cache.lengths)
        if cache.replays:
            return feed(model, again, fed, valid)
        upper = functools.partial(_upper, stream=drafts.stream, first=self.layers)
        return feed(model.replace(apply=upper), again, fed, valid)


def early_exit(layers: int) -> EarlyExit:
    """The model's own first layers draft: their stream goes through the final norm and the head, and the verification
    resumes it where it left (self-speculation, LayerSkip, Elhoushi et al. 2024, 2404.16710).

    Args:
        layers: how many, at least 1 and less than the model has.

    Raises:
        InputError: no whole number of at least 1.
    """
    return EarlyExit(count("early_exit: layers", layers))


def _lower(
    params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array, *, last: int
) -> tuple[Array, OpenCache]:
    x = embed(params, config, tokens, cache.positions)
    return through(params, config, x, cache.record(0, "embedding", x), 0, last)


def _upper(
    params: Params, config: Config, cache: OpenCache, tokens: Array, valid: Array, *, stream: Array, first: int
) -> tuple[Array, OpenCache]:
    x, cache = through(params, config, stream, cache, first, config.num_layers)
    return final_norm(params, config, x), cache


__all__ = ["Drafts", "Drafter", "prompt_lookup", "draft_model", "early_exit", "PromptLookup", "DraftModel", "EarlyExit"]
