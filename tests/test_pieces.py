"""SentencePiece tokenizers agree with those of Transformers (tests/golden/tokenizers.json), and fail clearly."""

import base64
import functools
import io
import json
import sys
from pathlib import Path

import pytest

from kvjax.errors import CheckpointError, InputError
from kvjax.text import load_tokenizer

KINDS = ["t5", "marian", "marian_separate"]


@functools.cache
def golden():
    return json.loads((Path(__file__).parent / "golden" / "tokenizers.json").read_text())


def write(folder, kind):
    for name, content in golden()[kind]["files"].items():
        (folder / name).write_bytes(base64.b64decode(content))
    return folder


@pytest.fixture
def tokenizers_of(tmp_path):
    pytest.importorskip("sentencepiece")
    return lambda kind: load_tokenizer(write(tmp_path, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(tokenizers_of, kind):
    tokenizer, expected = tokenizers_of(kind), golden()[kind]
    assert [tokenizer.encode(text) for text in golden()["texts"]] == expected["ids"]
    ids = expected.get("target_ids", expected["ids"])
    if kind == "t5":
        assert [[*tokenizer.encode_target(text), 1] for text in golden()["texts"]] == ids
    else:
        assert [tokenizer.encode_target(text) for text in golden()["texts"][:-1]] == ids
    # Marian cuts spaces off at the end there, which a stream of pieces cannot; T5 keeps one at the beginning
    assert [tokenizer.decode(row).strip() for row in ids] == [text.strip() for text in expected["decoded"]]


def test_sources_and_targets_of_a_translator_are_cut_by_models_of_their_own(tokenizers_of):
    tokenizer = tokenizers_of("marian_separate")
    assert tokenizer.encode("the hut")[:-1] != tokenizer.encode_target("the hut")


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_concatenate_to_the_text(tokenizers_of, kind):
    tokenizer = tokenizers_of(kind)
    ids = tokenizer.encode_target("die katze saß auf der matte, the cat")
    stream = tokenizer.stream(ids[:2])
    pieces = [stream.push(i) for i in ids[2:]]
    assert "".join([*pieces, stream.finish()]) == tokenizer.continuation(ids[:2], ids[2:])


def test_ids_of_a_model_that_was_just_trained_come_back_as_its_text(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text, model = "a small cat and a large dog saw the small dog", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    tokenizer = load_tokenizer(tmp_path, vocab_size=64)
    size = tokenizer.backend.token_to_id("<extra_id_2>")
    assert tokenizer.encode("<extra_id_0>") == [size + 2, 1]  # the last id of all, before the end
    ids = tokenizer.encode(text)
    assert ids[-1] == 1 and max(ids) < size and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 63]) == text  # a row of the model's table without a piece
    with pytest.raises(InputError, match="vocabulary of 64"):
        tokenizer.decode([64])
    with pytest.raises(InputError, match="empty"):
        tokenizer.encode("")
    assert tokenizer.encode_target("") == []
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode_target("\ud800")


def test_bytes_that_stand_for_what_no_piece_has_become_characters(tokenizers_of):
    backend = tokenizers_of("t5").backend
    backend._tokens = dict(enumerate(["▁the", "▁", *(f"<0x{x:02X}>" for x in "猫é".encode()), "a"]))
    assert backend.decode(range(8)) == "the 猫éa"
    assert backend.decode(range(4)) == "the \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"pip install 'kvjax\[sentencepiece\]'"):
        load_tokenizer(write(tmp_path, kind))


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        ("t5", "spiece.model", "", "spiece.model: no SentencePiece model"),
        ("t5", "spiece.model", "x" * 100, "spiece.model: no SentencePiece model"),
        ("t5", "added_tokens.json", '{"<new>": 170}', "'<new>' with id 170 was added to spiece.model"),
        (
            "t5",
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"170": {"content": "<new>"}}}',
            "'<new>' with id 170",
        ),
        ("t5", "tokenizer_config.json", '{"extra_ids": -1}', "extra_ids must be an integer from 0, not -1"),
        ("marian", "target.spm", "x", "target.spm: no SentencePiece model"),
        ("marian", "vocab.json", "[]", "no JSON object"),
        ("marian", "vocab.json", '{"</s>": "0"}', "is no map from tokens to ids"),
        ("marian", "vocab.json", '{"</s>": 0, "<unk>": 1}', r"the vocabulary of source.spm has no token '<pad>'"),
        ("marian", "tokenizer_config.json", '{"unk_token": 3}', "the vocabulary of source.spm has no token 3"),
    ],
)
def test_a_damaged_file_is_a_checkpoint_error_that_names_it(tmp_path, kind, file, content, message):
    pytest.importorskip("sentencepiece")
    write(tmp_path, kind)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["target.spm", "vocab.json"])
def test_a_missing_file_is_named(tmp_path, file):
    pytest.importorskip("sentencepiece")
    (write(tmp_path, "marian") / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_tokenizer(tmp_path)
