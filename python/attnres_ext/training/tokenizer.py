"""Text to token ids and back: bytes as they are, or a byte-level BPE learnt from the text.

Both tokenizers end every document with one extra id, the last of the vocabulary, which no text can
produce. Decoding goes through bytes, because a token may hold half a character.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from attnres_ext.training.errors import UserError
from attnres_ext.training.files import write_text


class Tokenizer(Protocol):
    """What training and generation need to know of a tokenizer."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document id included."""

    @property
    def end(self) -> int:
        """The end-of-document id, ``vocab_size - 1``."""

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of ``text``, int32, without an end-of-document id."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; none for the end of a document."""

    def to_json(self) -> str:
        """All that :func:`load_tokenizer` needs to build this tokenizer again."""


class ByteTokenizer:
    """256 bytes and the end of a document. Any file is valid text to it."""

    kind = "byte"
    vocab_size = 257
    end = 256

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of ``text``: its bytes."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def token_bytes(self, token: int) -> bytes:
        """The byte ``token``; nothing for the end of a document."""
        return bytes([token]) if token != self.end else b""

    def to_json(self) -> str:
        """The tokenizer's name, which is all there is to it."""
        return json.dumps({"kind": self.kind})


class BpeTokenizer:
    """Byte-level byte-pair encoding by Hugging Face ``tokenizers``, learnt from the training text.

    Args:
        serialized: What ``tokenizers.Tokenizer.to_str`` gave.
    """

    kind = "bpe"

    def __init__(self, serialized: str):
        import tokenizers

        self._serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.end = self._tokenizer.get_vocab_size()
        self.vocab_size = self.end + 1

    @classmethod
    def learn(cls, documents: Iterable[bytes], vocab_size: int) -> BpeTokenizer:
        """Learns at most ``vocab_size`` ids (end of document included) from UTF-8 documents."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((text.decode() for text in documents), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of UTF-8 ``text``."""
        ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of ``token``, perhaps part of a character; none for the end of a document."""
        if token == self.end:
            return b""
        return bytes(_byte_of_letter()[letter] for letter in self._tokenizer.id_to_token(token))

    def to_json(self) -> str:
        """The ``tokenizers`` serialization, wrapped with the tokenizer's name."""
        return json.dumps({"kind": self.kind, "tokenizer": json.loads(self._serialized)})


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of the byte-level alphabet (GPT-2's).

    Printable Latin-1 bytes stand for themselves, the others follow from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads what :func:`save_tokenizer` wrote.

    Raises:
        UserError: The file is missing or is not a tokenizer of ours.
    """
    try:
        data = json.loads(path.read_text())
        if data["kind"] == ByteTokenizer.kind:
            return ByteTokenizer()
        if data["kind"] == BpeTokenizer.kind:
            serialized = json.dumps(data["tokenizer"])
            try:
                return BpeTokenizer(serialized)
            # What tokenizers raises on JSON that is not its own has no class but this.
            except Exception as error:
                raise ValueError(error) from error
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error
    raise UserError(f"{path} holds a tokenizer of kind {data['kind']!r}, expected byte or bpe")


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes ``tokenizer`` to ``path`` atomically."""
    write_text(path, tokenizer.to_json())


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(map(tokenizer.token_bytes, tokens)).decode(errors="replace")


class StreamDecoder:
    """Turns tokens into text one at a time, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that ``token`` completes; empty in the middle of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left when the stream ends: U+FFFD for a character cut short, else nothing."""
        return self._decoder.decode(b"", final=True)
