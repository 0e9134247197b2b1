import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres_ext.training.data import check_utf8, read_documents, read_text, tokenize
from attnres_ext.training.errors import UserError
from attnres_ext.training.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i} " * (10 + i % 5))
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "empty.txt").write_text("")
    return root


def test_standard_library_is_the_default_text():
    text = read_text(None)
    names = {document.name for document in [*text.training, *text.validation]}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert sum(len(document.content) for document in text.training) > 2e6


def test_folder_is_split_between_files(folder):
    text = read_text(folder, 0.1)
    names = [document.name for document in [*text.training, *text.validation]]
    assert sorted(names) == sorted(f"part{i % 3}/{i}.txt" for i in range(40))
    assert len(set(names)) == len(names)
    held_out = sum(len(document.content) for document in text.validation)
    total = held_out + sum(len(document.content) for document in text.training)
    assert 0.05 <= held_out / total <= 0.2


def test_order_does_not_depend_on_where_the_folder_is(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    before = read_text(folder)
    folder.rename(moved)
    after = read_text(moved)
    assert (after.training, after.validation) == (before.training, before.validation)
    assert after.fingerprint == before.fingerprint


def test_fingerprint_sees_every_byte(folder):
    before = read_text(folder).fingerprint
    (folder / "part0" / "0.txt").write_text("Text 0 " * 10)
    assert read_text(folder).fingerprint != before


@given(content=st.text(min_size=40), share=st.floats(0.01, 0.5))
def test_one_file_is_cut_between_characters(tmp_path_factory, content, share):
    path = tmp_path_factory.getbasetemp() / "one.txt"
    path.write_bytes(content.encode(errors="replace"))
    text = read_text(path, share)
    (head,), (tail,) = text.training, text.validation
    assert head.content + tail.content == path.read_bytes()
    assert head.content.decode()
    tail.content.decode()
    # At most one character of four bytes off.
    assert abs(len(tail.content) - share * path.stat().st_size) <= 4


def test_batches_depend_on_seed_and_step_alone(folder):
    corpus = tokenize(read_text(folder), ByteTokenizer(), 16)
    torch.manual_seed(1)
    inputs, targets = corpus.batch(3, 7, 4, 16)
    torch.manual_seed(2)
    again, _ = corpus.batch(3, 7, 4, 16)
    assert torch.equal(inputs, again)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for other in (corpus.batch(4, 7, 4, 16), corpus.batch(3, 8, 4, 16)):
        assert not torch.equal(inputs, other[0])


def test_validation_batches_span_the_held_out_text(folder):
    corpus = tokenize(read_text(folder), ByteTokenizer(), 16)
    batches = list(corpus.validation_batches(3, 2, 16))
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(2, 16)] * 3
    assert torch.equal(batches[0][0][0], corpus.validation[:16].long())
    assert torch.equal(batches[-1][1][-1], corpus.validation[-16:].long())
    for first, second in pairwise(corpus.validation_batches(3, 2, 16)):
        assert not torch.equal(first[0], second[0])


def test_documents_are_separated_by_the_end_id(folder):
    text = read_text(folder)
    corpus = tokenize(text, ByteTokenizer(), 16)
    assert (corpus.training == ByteTokenizer.end).sum() == len(text.training)
    assert corpus.training[-1] == ByteTokenizer.end
    assert math.isclose(corpus.bytes_per_token, 1, rel_tol=0.05)


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"--text .*nowhere does not exist"):
        read_text(tmp_path / "nowhere")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"--text .*empty.txt is empty"):
        read_text(empty)
    binary = tmp_path / "folder"
    binary.mkdir()
    (binary / "x.bin").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match=r"folder holds no text"):
        read_text(binary)
    short = tmp_path / "short.txt"
    short.write_text("hello world " * 4)
    with pytest.raises(UserError, match="one sequence needs 65"):
        tokenize(read_text(short), ByteTokenizer(), 64)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve ".encode("latin-1") * 40)
    with pytest.raises(UserError, match=r"latin\.txt .* is not: byte 0xef at position 2"):
        check_utf8(*read_documents(latin))
