import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_ext.training.errors import UserError
from attnres_ext.training.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    StreamDecoder,
    decode,
    load_tokenizer,
    save_tokenizer,
)

SENTENCES = [f"Ein größeres Wort, {i} mal – naïve ∑ 深さ 🙂\n".encode() for i in range(50)]


@pytest.fixture(scope="module")
def bpe():
    return BpeTokenizer.learn(SENTENCES, 400)


@given(st.binary())
def test_bytes_are_their_own_ids(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text).tolist()
    assert tokens == list(text)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text
    assert tokenizer.end not in tokens


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bpe_gives_every_text_back(bpe, text):
    tokens = bpe.encode(text.encode()).tolist()
    assert decode(bpe, tokens) == text
    assert all(token < bpe.end for token in tokens)


def test_bpe_learns_words(bpe):
    assert bpe.vocab_size <= 400
    assert bpe.end == bpe.vocab_size - 1
    assert len(bpe.encode(SENTENCES[0])) < len(SENTENCES[0]) / 3


def test_bpe_is_deterministic(bpe):
    assert BpeTokenizer.learn(SENTENCES, 400).to_json() == bpe.to_json()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_stream_holds_back_half_characters(kind, bpe):
    tokenizer = {"byte": ByteTokenizer(), "bpe": bpe}[kind]
    text = "é∑🙂 x ä"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode(text.encode()).tolist()]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_marks_broken_and_unfinished_characters():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.feed(0xE2) == ""
    assert decoder.feed(ord("a")) == "\ufffda"
    assert decoder.feed(0xF0) == ""
    assert decoder.finish() == "\ufffd"


def test_end_of_document_is_no_text(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert decode(tokenizer, [tokenizer.end]) == ""


def test_saved_tokenizer_is_the_same(bpe, tmp_path):
    for tokenizer in (ByteTokenizer(), bpe):
        path = tmp_path / "tokenizer.json"
        save_tokenizer(tokenizer, path)
        loaded = load_tokenizer(path)
        assert loaded.vocab_size == tokenizer.vocab_size
        assert (loaded.encode(SENTENCES[3]) == tokenizer.encode(SENTENCES[3])).all()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", json.dumps({"kind": "bpe", "tokenizer": {}}), '{"kind": "x"}']
)
def test_damaged_tokenizer_is_a_user_error(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)
