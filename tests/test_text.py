"""Text to ids and back: BOS as the tokenizer has it, ids checked, streams that add up and never break a character."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kvjax.errors import CheckpointError, InputError
from kvjax.text import BROKEN, Tokenizer, load_tokenizer

TEXT = "Zoë ate 3 crêpes; naïve façade – “quoted” 日本語テキスト, emoji 👩‍👩‍👧 🇫🇷!\n\ttabs  and  spaces "


def byte_level():
    """As GPT-2, Llama 3 and Qwen: every byte a letter, a few merges, a special end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "a"), ("Ġ", "t"), ("Ã", "©"), ("e", "r"), ("â", "Ģ")]
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return made


def sentencepiece():
    """As Llama 1 and 2, and Mistral: ▁ for a space, one before the text, bytes for what the vocabulary lacks."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁a",
        "▁t",
        "th",
        "er",
        *"abcdefghijklmnorstuvy,.!é日",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "t"), ("t", "h"), ("e", "r")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def metaspace():
    """As newer conversions of SentencePiece."""
    made = sentencepiece()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return Tokenizer(KINDS[request.param](), bos_id=1)


def streamed(tokenizer, prompt, new):
    stream = tokenizer.stream(prompt)
    return [stream.push(i) for i in new] + [stream.finish()]


def test_text_survives_the_way_to_ids_and_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_streamed_pieces_of_a_text_add_up_wherever_the_prompt_ends(tokenizer):
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids) + 1):
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        before = tokenizer.decode(ids[:cut])
        assert "".join(pieces) == tokenizer.continuation(ids[:cut], ids[cut:])
        assert not any(BROKEN in piece for piece in pieces)
        if TEXT.startswith(before):
            assert before + "".join(pieces) == TEXT


def test_streamed_pieces_of_random_ids_add_up(tokenizer):
    rng = random.Random(0)
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer._skipped]
    for length in [*range(1, 20)] * 8 + [400]:
        ids = rng.choices(range(tokenizer.vocab_size) if length % 2 else ordinary, k=length)
        cut = rng.randrange(length + 1)
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == tokenizer.continuation(ids[:cut], ids[cut:])


def test_a_long_stream_decodes_a_bounded_window_for_each_token(tokenizer, monkeypatch):
    ids = tokenizer.encode(TEXT * 20)
    longest, decode = 0, Tokenizer._decode
    stream = tokenizer.stream(ids[:5])

    def counting(self, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "_decode", counting)
    pieces = [stream.push(i) for i in ids[5:]]
    assert len(ids) > 1000 and longest <= 150
    monkeypatch.undo()
    assert "".join([*pieces, stream.finish()]) == tokenizer.continuation(ids[:5], ids[5:])


def test_a_character_is_held_back_until_its_last_byte(tokenizer):
    ids = tokenizer.encode("a👩b")
    stream = tokenizer.stream()
    seen = "".join(stream.push(i) for i in ids[:-2])
    assert "👩" not in seen and BROKEN not in seen
    assert "".join([seen, *(stream.push(i) for i in ids[-2:]), stream.finish()]) == "a👩b"


def test_special_tokens_are_not_text(tokenizer):
    end = max(tokenizer._skipped)
    ids = tokenizer.encode("the year")
    assert tokenizer.decode([*ids, end]) == "the year"
    assert "".join(streamed(tokenizer, ids, [end, *ids])) == tokenizer.continuation(ids, [end, *ids])


def test_an_empty_text_is_the_bos_alone_or_an_error():
    assert Tokenizer(byte_level(), bos_id=3).encode("") == [3]
    assert Tokenizer(sentencepiece(), bos_id=1, add_bos=False).encode("") == [1]
    with pytest.raises(InputError, match="no BOS"):
        Tokenizer(byte_level()).encode("")


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"], "a\ud800"])
def test_what_is_no_text_is_an_input_error(text):
    with pytest.raises(InputError, match="encode: text"):
        Tokenizer(byte_level()).encode(text)


@pytest.mark.parametrize("bad", [-1, 300, 10**6])
def test_an_id_outside_the_vocabulary_is_named_with_the_size_of_it(bad):
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.vocab_size == 263
    for call in (
        lambda: tokenizer.decode([0, bad]),
        lambda: tokenizer.stream([bad]),
        lambda: tokenizer.stream().push(bad),
    ):
        with pytest.raises(InputError, match=f"id {bad} is outside the vocabulary of 263"):
            call()
    assert Tokenizer(byte_level(), vocab_size=320).decode([300]) == ""  # a row of the model's table without a text


@pytest.mark.parametrize("bad", [[1.5], ["a"], [None], 3, [[1]]])
def test_ids_that_are_no_whole_numbers_are_an_input_error(bad):
    with pytest.raises(InputError, match="whole numbers"):
        Tokenizer(byte_level()).decode(bad)


def test_ids_may_be_arrays():
    tokenizer = Tokenizer(byte_level())
    ids = np.asarray(tokenizer.encode("né"), np.int32)
    assert tokenizer.decode(ids) == "né"
    stream = tokenizer.stream(ids[:1])
    assert "".join([stream.push(ids[1]), stream.push(ids[2:]), stream.finish()]) == "é"


def write(folder, backend, config=None):
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def templated():
    made = sentencepiece()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize(
    ("make", "config", "begins"),
    [
        (templated, {"bos_token": "<s>"}, True),
        (templated, {"bos_token": "<s>", "add_bos_token": True}, True),
        (templated, {"bos_token": {"content": "<s>"}, "add_bos_token": False}, False),
        (sentencepiece, {"bos_token": "<s>"}, False),
        (sentencepiece, {"bos_token": {"content": "<s>", "lstrip": False}, "add_bos_token": True}, True),
        (sentencepiece, {"bos_token": None, "add_bos_token": True}, False),
        (sentencepiece, None, False),
    ],
)
def test_a_text_begins_with_bos_as_the_folder_says(tmp_path, make, config, begins):
    tokenizer = load_tokenizer(write(tmp_path, make(), config))
    plain = sentencepiece().encode("that").ids
    assert tokenizer.encode("that") == ([1] if begins else []) + plain
    assert tokenizer.bos_id == (1 if (config or {}).get("bos_token") else None)


def test_a_bos_known_from_the_model_counts_only_where_the_tokenizer_is_silent(tmp_path):
    assert load_tokenizer(write(tmp_path, byte_level()), bos_id=262).encode("") == [262]
    with pytest.raises(InputError, match="no BOS"):
        load_tokenizer(write(tmp_path, byte_level(), {"bos_token": None}), bos_id=262).encode("")


def test_truncation_and_padding_that_a_file_carries_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    assert len(load_tokenizer(write(tmp_path, backend)).encode("x" * 20)) == 20


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "no tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "no tokenizer"),
        ("tokenizer_config.json", "{", "damaged JSON"),
        ("tokenizer_config.json", '{"bos_token": "<nope>"}', "no such token"),
        ("tokenizer_config.json", '{"bos_token": 3}', "no such token"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token"),
    ],
)
def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path, name, text, message):
    write(tmp_path, byte_level())
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None
