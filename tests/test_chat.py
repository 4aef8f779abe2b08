"""Conversations: the reply is that of feeding everything, whatever was reused; and `kvjax chat`."""

from __future__ import annotations

import dataclasses
import os
import string

import pytest
import tokenizers
from models import FULL, RELATIVE, tiny

import kvjax
from kvjax import caches, codecs, sampling
from kvjax.errors import CheckpointError, InputError
from kvjax.loops.conversation import Conversation
from kvjax.templates import Template
from kvjax.text import Tokenizer

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|6|>", "<|7|>"]
LETTERS = (string.ascii_letters + string.digits + string.punctuation)[:87] + " "
TEMPLATE = Template(
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content == 'no' %}{{ raise_exception('not\nthis') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    {"bos_token": "<s>", "eos_token": "</s>", "eot_token": "<|end|>"},
)
SAMPLER = sampling.chain(sampling.temperature(0.9))
NEW = 24


def letters():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate([*SPECIAL, *LETTERS])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, bos_id=0)


LM = kvjax.LM(tiny(FULL), letters(), "toy", eos_ids=(1,), template=TEMPLATE)
PLANS = {
    "dense": caches.dense(),
    "ring": caches.ring(16, sinks=2),
    "ring with slack": caches.ring(16, slack=16),
    "int8": caches.dense(store=codecs.int8()),
    "paged": caches.paged(8),
    "mixed": (caches.ring(16), caches.dense()),
}


def begin(plan, kind=Conversation, **more):
    return kind(**{"lm": LM, "system": "Be brief.", "sampler": SAMPLER, "plan": plan, "max_new_tokens": NEW, **more})


def anew(talk):
    """Ids of the last reply when the whole conversation is fed to an empty cache."""
    last = talk.turns[-1]
    ids = LM.tokenizer.encode_bare(TEMPLATE.render(talk.messages[:-1]))
    assert ids == last.prompt
    out = kvjax.generate(
        LM, [ids], max_new_tokens=NEW, sampler=SAMPLER, seed=last.seed, plan=talk.plan, stop_ids=talk.stop_ids
    )
    return out.tokens[0, : out.lengths[0]].tolist()


def played(plan, kind=Conversation):
    """Conversations of several turns, with what was done to come to each."""
    talk = begin(plan, kind)
    for text in ("Hello", "Who is it?", "I do not know"):
        talk = talk.say(text).result()
        yield f"say {text}", talk
    other = talk.retry().result()
    yield "retry", other
    yield "retry again", other.retry().result()
    yield "go on after another reply", other.say("And now?").result()
    talk = talk.edit(1, "Who goes there?").result()
    yield "edit", talk
    yield "undo", talk.undo().say("Come in").result()
    yield "begin anew", dataclasses.replace(talk, system="Be rude.").say("Hello").result()


DEFAULT = ("dense", "ring")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.full] * (x not in DEFAULT)) for x in PLANS])
def test_a_reply_is_that_of_feeding_the_whole_conversation(name):
    reused = 0
    for did, talk in played(PLANS[name]):
        assert talk.turns[-1].new == anew(talk), did
        reused += talk.turns[-1].reused
    assert reused > 150


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Careless(Conversation):
    """Goes back one token too few."""

    def nearest(self, ids):
        base, same = super().nearest(ids)
        for each in self.kept:
            if base is not None and same < int(each.cache.lengths[0]):
                return dataclasses.replace(each, cache=each.cache.rewind(same + 1)), same
        return base, same


def test_one_that_goes_back_one_token_too_few_is_found():
    assert any(talk.turns[-1].new != anew(talk) for _, talk in played(PLANS["dense"], Careless))


def test_a_turn_feeds_only_what_is_new():
    talk = begin(None).say("Hello").result()
    first, talk = talk, talk.say("Who is it?").result()
    one, two = talk.turns
    have = [*one.prompt, *one.new]
    assert (one.reused, one.fed) == (0, len(one.prompt))
    assert two.reused == len(os.path.commonprefix([have, two.prompt])) > len(one.prompt)
    assert talk.retry().result().turns[-1].fed == 1
    assert first.turns == (one,), "a conversation is a value"
    assert first.say("Who is it?").result().turns[-1].new == two.new


def test_kinds_that_go_back_keep_one_cache_and_others_so_many():
    talks = [talk for _, talk in played(PLANS["dense"])]
    assert {len(talk.kept) for talk in talks} == {1}
    talk = begin(PLANS["ring"], keep=3)
    for text in ("Hello", "Who", "Why", "When"):
        talk = talk.say(text).result()
    assert len(talk.kept) == 3 and talk.nbytes == 3 * talk.kept[-1].cache.nbytes
    again = talk.retry().result()
    assert (again.turns[-1].fed, len(again.kept)) == (0, 3), "from the cache after the prompt"


def test_pieces_are_the_reply_and_it_may_be_stopped():
    reply = begin(None, max_new_tokens=40).say("Hello")
    pieces = list(reply)
    whole = reply.result().turns[-1]
    assert "".join(pieces) == whole.reply and len(pieces) > 1
    reply = begin(None, max_new_tokens=40).say("Hello")
    seen = next(iter(reply))
    reply.stop()
    talk = reply.result()
    assert talk.turns[-1].stop == "stopped" and talk.turns[-1].new == whole.new[:16]
    assert whole.reply.startswith(talk.turns[-1].reply) and talk.turns[-1].reply.startswith(seen)
    assert talk.say("Go on").result().turns[-1].reused >= len(talk.turns[-1].prompt)


def test_special_tokens_end_a_reply_and_are_not_shown():
    talk = begin(None)
    assert talk.stop_ids == (1, 5)
    ended = [talk.say("Hello", seed=seed).result().turns[-1] for seed in range(6)]
    assert {turn.new[-1] for turn in ended if turn.stop == "eos"} <= {1, 5}
    assert any(turn.stop == "eos" for turn in ended)
    assert not any("<" in turn.reply and ">" in turn.reply for turn in ended if "|" in turn.reply)


def test_a_template_that_asks_for_the_date_gets_that_of_the_beginning():
    text = "{{ strftime_now('%H:%M:%S.%f') }}" + (TEMPLATE.text or "")
    dated = dataclasses.replace(TEMPLATE, text=text)
    talk = begin(None, template=dated).say("Hello").result()
    assert talk.say("Hello").result().turns[-1].reused > len(talk.turns[-1].prompt)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lm": LM.model}, "kvjax.load"),
        ({"lm": dataclasses.replace(LM, template=Template())}, "no chat template"),
        ({"lm": dataclasses.replace(LM, tokenizer=None)}, "no tokenizer"),
        ({"lm": kvjax.LM(tiny(RELATIVE), letters(), "t5", template=TEMPLATE)}, "encoder"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"keep": 0}, "keep"),
        ({"sampler": sampling.temperature(1.0)}, "filter"),
    ],
)
def test_what_cannot_chat_is_said_at_the_beginning(more, says):
    with pytest.raises(InputError, match=says):
        begin(None, **more)


def test_what_cannot_be_done_is_an_error_and_changes_nothing():
    talk = begin(None)
    for wrong in (talk.retry, talk.undo, lambda: talk.edit(0, "Hello"), lambda: talk.say("no")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(CheckpointError, match="line 1"):
        begin(None, template=Template("{% if"))


