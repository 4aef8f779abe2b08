"""Conversations: the reply is that of feeding everything, whatever was reused; and `kvjax chat`."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
import re
import signal
import string
import sys
from pathlib import Path

import pytest
import tokenizers
from models import ONE_LAYER, RELATIVE, tiny
from test_cli import write_folder

import kvjax
from kvjax import caches, cli, codecs, sampling
from kvjax.errors import CheckpointError, InputError
from kvjax.loops.conversation import Conversation, Reply
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
NEW = 8
SYSTEM = "Be brief and never repeat."


def letters():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate([*SPECIAL, *LETTERS])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, bos_id=0)


LM = kvjax.LM(tiny(ONE_LAYER), letters(), "toy", eos_ids=(1,), template=TEMPLATE)
MODELS = {
    "toy": LM,
    "base": dataclasses.replace(LM, template=dataclasses.replace(TEMPLATE, text=None), name="base"),
    "short": dataclasses.replace(LM, model=tiny(dataclasses.replace(ONE_LAYER, max_positions=40))),
    "t5": dataclasses.replace(LM, model=tiny(RELATIVE), name="t5"),
}
PLANS = {
    "dense": caches.dense(),
    "ring": caches.ring(16, sinks=2),
    "ring with slack": caches.ring(16, slack=16),
    "int8": caches.dense(store=codecs.int8()),
    "paged": caches.paged(8),
}


def begin(plan, kind=Conversation, **more):
    usual = {"lm": LM, "system": SYSTEM, "sampler": SAMPLER, "plan": plan, "max_new_tokens": NEW}
    return kind(**{**usual, **more})


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
    talk = begin(plan, kind).say("Hi").result()
    yield "say", talk
    talk = talk.say("Who").result()
    yield "say again", talk
    other = talk.retry().result()
    yield "retry", other
    yield "retry again", other.retry().result()
    yield "go on after another reply", other.say("Why").result()
    talk = talk.edit(0, "Hm").result()
    yield "edit", talk
    talk = talk.say("Ok").result()
    yield "go on after an edit", talk
    yield "undo", talk.undo().say("No").result()


DEFAULT = ("dense", "ring")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.full] * (x not in DEFAULT)) for x in PLANS])
def test_a_reply_is_that_of_feeding_the_whole_conversation(name):
    reused = 0
    for did, talk in played(PLANS[name]):
        assert talk.turns[-1].new == anew(talk), did
        reused += talk.turns[-1].reused
    assert reused > 200


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
    talk = begin(None, max_new_tokens=40)
    assert talk.stop_ids == (1, 5)
    ended = [talk.say("Hello", seed=seed).result().turns[-1] for seed in range(6)]
    assert {turn.new[-1] for turn in ended if turn.stop == "eos"} <= {1, 5}
    assert any(turn.stop == "eos" for turn in ended)
    assert not any("<" in turn.reply and ">" in turn.reply for turn in ended if "|" in turn.reply)


@pytest.mark.full
def test_a_stop_string_ends_a_reply_and_is_not_in_it():
    said = begin(None).say("Hi").result().turns[-1].reply
    talk = begin(None, stop=said[3:5]).say("Hi").result()
    assert (talk.turns[-1].reply, talk.turns[-1].stop) == (said[:3], "stop")
    talk = talk.say("Who").result()
    ids = talk.turns[-1].prompt
    assert talk.turns[-1].reused == len(talk.turns[0].prompt) + 3, "what completed it is gone back over"
    out = kvjax.generate(LM, [ids], max_new_tokens=NEW, sampler=SAMPLER, stop_ids=talk.stop_ids, stop=talk.stop)
    assert talk.turns[-1].new == out.tokens[0].tolist()


def test_a_template_that_asks_for_the_date_gets_that_of_the_beginning():
    text = "{{ strftime_now('%H:%M:%S.%f') }}" + (TEMPLATE.text or "")
    dated = dataclasses.replace(TEMPLATE, text=text)
    first = begin(None, template=dated).say("Hello").result()
    prompt = first.turns[-1].prompt
    second = first.say("Hello").result().turns[-1]
    assert second.prompt[: len(prompt)] == prompt and second.reused >= len(prompt)
    assert begin(None, template=dated).say("Hello").result().turns[-1].prompt != prompt


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lm": LM.model}, "kvjax.load"),
        ({"lm": MODELS["base"]}, "no chat template"),
        ({"lm": dataclasses.replace(LM, tokenizer=None)}, "no tokenizer"),
        ({"lm": MODELS["t5"]}, "encoder"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"keep": 0}, "keep"),
        ({"template": "{{ messages }}"}, "template must be a Template"),
        ({"sampler": sampling.temperature(1.0)}, "filter"),
    ],
)
def test_what_cannot_chat_is_said_at_the_beginning(more, says):
    with pytest.raises(InputError, match=says):
        begin(None, **more)


def test_what_cannot_be_done_is_an_error_and_changes_nothing():
    talk = begin(None)
    for wrong in (talk.retry, talk.undo, lambda: talk.edit(0, "Hello"), lambda: talk.say("no"), lambda: talk.turn("0")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(CheckpointError, match="line 1"):
        begin(None, template=Template("{% if"))


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `kvjax chat` in this process on a random model, with lines of standard input: `code, stdout, stderr`."""
    monkeypatch.setenv("KVJAX_COMPILE_CACHE", "off")
    monkeypatch.setattr("kvjax.cli.startup.load", lambda name, dtype: MODELS[name])

    def run(lines, *argv, model="toy"):
        if not sys.stdin.isatty():
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), "utf-8"))
        usual = ["--model", model, "--system", SYSTEM, "--max-new-tokens", NEW, "--temperature", 0.9]
        code = cli.main(["chat", *map(str, usual), *map(str, argv)])
        return code, *capsys.readouterr()

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(command, monkeypatch):
    """The same where lines are typed; an exception in place of a line is raised."""

    def run(lines, *argv):
        left = iter(lines)

        def typed(prompt):
            line = next(left, None)
            if line is None:
                raise EOFError
            if isinstance(line, str):
                return line
            raise line

        with monkeypatch.context() as here:
            here.setattr(sys, "stdin", Terminal())
            here.setattr(builtins, "input", typed)
            return command([], *argv)

    return run


def replies(talk, *texts):
    for text in texts:
        talk = talk.say(text).result()
    return [turn.reply for turn in talk.turns]


def test_a_line_is_a_message_and_its_reply_goes_to_stdout(command):
    code, out, err = command(["Hi", "", "Who"])
    assert (code, out) == (0, "".join(f"{each}\n" for each in replies(begin(None), "Hi", "Who")))
    first, second = err.splitlines()
    assert "[1] 0 of 34 tokens reused, 34 fed, 8 new (length)" in first
    assert re.search(r"\[2\] (4\d) of (4\d) tokens reused, \d fed, 8 new", second)
    assert all("tokens/s" in line and "bytes" in line for line in (first, second))


def test_json_is_one_object_a_reply(command):
    code, out, err = command(["Hi", "/retry", "/edit 1 Hm"], "--json", "--seed", 3)
    assert (code, err) == (0, "")
    made = [json.loads(line) for line in out.splitlines()]
    talk = begin(None, seed=3).say("Hi").result()
    wanted = [talk, talk.retry().result(), talk.edit(0, "Hm").result()]
    assert [each["text"] for each in made] == [talk.turns[0].reply for talk in wanted]
    assert {each["role"] for each in made} == {"assistant"} and {each["turn"] for each in made} == {1}
    assert [sum(each["tokens"].values()) for each in made] == [
        len(talk.turns[0].prompt) + len(talk.turns[0].new) for talk in wanted
    ]
    assert [each["tokens"]["reused"] for each in made][:2] == [0, 33]
    assert set(made[0]) == {"role", "turn", "text", "stop", "tokens", "timings", "cache_bytes"}


def test_commands_change_the_conversation(command):
    code, out, err = command(["//Hi", "Who", "/undo", "/show", "Why", "/help", "/quit", "never said"])
    said = replies(begin(None), "/Hi", "Who")
    assert code == 0 and out.splitlines() == [*said, replies(begin(None), "/Hi", "Why")[1]]
    assert f"- system: {SYSTEM}\n1 user: /Hi\n1 assistant: {said[0]}\n" in err
    assert "turns: 1" in err and "/edit N TEXT" in err and "never said" not in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/retry", "no turn yet"),
        ("/undo", "no turn yet"),
        ("/edit 1 Hm", "a turn from 1 to 0"),
        ("/edit", "a turn from"),
        ("/sing", "no command /sing"),
        ("no", "not this"),
    ],
)
def test_a_line_that_cannot_be_done_ends_a_script_and_not_a_talk(command, terminal, line, says):
    code, out, err = command([line, "Hi"])
    assert (code, out) == (1, "") and err.count("\n") == 1 and says in err and err.startswith("kvjax: error: ")
    code, out, err = terminal([line, "Hi"])
    assert code == 0 and says in err and replies(begin(None), "Hi")[0] in out


def interrupted(monkeypatch):
    made = Reply._made

    def first(self):
        for n, piece in enumerate(made(self)):
            if not n:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Reply, "_made", first)


def test_an_interrupt_ends_a_reply_and_keeps_what_there_is(command, terminal, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupted(monkeypatch)
    code, out, err = terminal(["Hi", "/show"], "--max-new-tokens", 40)
    monkeypatch.undo()
    whole = begin(None, max_new_tokens=40).say("Hi").result().turns[0]
    assert code == 0 and "16 new (stopped)" in err and len(whole.new) > 16
    assert whole.reply.startswith(out.split("\n")[0])
    assert "1 assistant: " + out.split("\n")[0] in err
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_a_script_writes_what_there_is_and_ends_it(command, monkeypatch):
    interrupted(monkeypatch)
    code, out, err = command(["Hi", "Who"], "--max-new-tokens", 40, "--json")
    assert code == 130 and err == "kvjax: interrupted\n"
    assert [json.loads(line)["stop"] for line in out.splitlines()] == ["stopped"]


def test_an_interrupt_at_the_prompt_ends_the_program(terminal):
    code, _, err = terminal(["Hi", KeyboardInterrupt(), "Who"])
    assert code == 130 and "[1]" in err and "[2]" not in err


def test_an_interrupt_before_the_first_piece_leaves_the_conversation_as_it_was(terminal, monkeypatch):
    say = Conversation.say

    def prefilling(self, text, **more):
        if text == "Who":
            raise KeyboardInterrupt
        return say(self, text, **more)

    monkeypatch.setattr(Conversation, "say", prefilling)
    code, out, err = terminal(["Hi", "Who", "Why"])
    assert code == 0 and "kvjax: interrupted" in err
    assert out.split() == " ".join(replies(begin(None), "Hi", "Why")).split()


def test_full_positions_are_one_clear_line(command):
    code, out, err = command(["Hi", "Who"], "--json", model="short")
    made = json.loads(out)
    assert (made["stop"], made["tokens"]["new"]) == ("length", 6)
    assert code == 1 and re.search(r"it has 4\d tokens, the model has 40 positions; undo or edit a turn", err)
    assert err.count("\n") == 1


def test_a_model_without_a_template_says_what_to_do(command, tmp_path):
    code, out, err = command(["Hi"], model="base")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "no chat template" in err and "kvjax generate --model base" in err and "--template FILE" in err
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE.text, "utf-8")
    assert command(["Hi"], "--template", file, model="base")[1].strip() == replies(begin(None), "Hi")[0].strip()
    file.write_text("{% if", "utf-8")
    for wrong, says in ((file, "line 1 of the chat template"), (tmp_path / "none", "cannot be read")):
        code, _, err = command(["Hi"], "--template", wrong)
        assert code == 1 and says in err and wrong.name in err and err.count("\n") == 1


def test_a_model_with_an_encoder_is_for_translation(command):
    code, _, err = command(["Hi"], model="t5")
    assert code == 1 and "kvjax translate --model t5" in err


def test_a_folder_brings_its_template(tmp_path, monkeypatch):
    folder = Path(write_folder(tmp_path / "tiny"))
    assert kvjax.load(folder).template.text is None
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["chat_template"] = TEMPLATE.text
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    lm = kvjax.load(folder)
    assert Conversation(lm).prompt("Hi") == lm.tokenizer.encode_bare("<|text|><|user|>Hi<|assistant|>")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Conversation(kvjax.load(folder)).prompt("Hi") == lm.tokenizer.encode_bare("Hi")
