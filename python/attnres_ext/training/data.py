"""Real text as batches of tokens, the same on every machine that holds the same text.

A batch is a function of (seed, step) alone. So every arm of a comparison sees the same batches, and
a resumed run needs no data position beyond the step it is at.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attnres_ext.training.errors import UserError
from attnres_ext.training.files import shown
from attnres_ext.training.tokenizer import Tokenizer

# Packages of others, tests, and generated tables: not the prose of Python programs.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__"}
    | {"test", "tests", "idle_test"}
    | {"encodings", "pydoc_data"}
)
# Large odd constant: neighbouring (seed, step) pairs land far apart as generator seeds.
_STEP_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Document:
    """One file: its name relative to the folder it came from, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Text:
    """Documents of a corpus, split for training and validation, before tokenization.

    Attributes:
        source: What to call it in messages and titles.
        training: Documents to learn from.
        validation: Documents held out.
        piped: All of it, where it came from something that can be read only once.
    """

    source: str
    training: list[Document]
    validation: list[Document]
    piped: bytes | None = None

    @property
    def fingerprint(self) -> str:
        """Hash over the split and every byte; a resumed run must find the same."""
        digest = hashlib.sha256()
        for part in (self.training, self.validation):
            digest.update(b"%d|" % len(part))
            for document in part:
                digest.update(b"%s|%d|" % (os.fsencode(document.name), len(document.content)))
                digest.update(document.content)
        return digest.hexdigest()


def read_documents(path: Path | None) -> tuple[str, list[Document]]:
    """Reads a corpus.

    Documents are ordered by a hash of their names, which mixes topics and does not depend on the
    machine.

    Args:
        path: A file, a folder (its text files, hidden ones skipped), a pipe, or None for the
            sources of Python's own standard library.

    Returns:
        What to call the corpus, and its documents, none of them empty.

    Raises:
        UserError: Nothing there, or nothing readable.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"the standard library of Python {platform.python_version()}"
        documents = [Document(name, (root / name).read_bytes()) for name in _stdlib_files(root)]
        wanted = f"no Python sources under {root}; name a text with --text"
    elif path.is_dir():
        source = shown(path.resolve().name)
        documents = list(_folder_documents(path))
        wanted = (
            f"--text {shown(path)} holds no text (files that are hidden, empty or binary are "
            "skipped)"
        )
    elif path.exists():
        piped = can_be_read_once(path)
        source = "a pipe" if piped else shown(path.resolve().name)
        # What a pipe is called, /dev/fd/63, is another name each time.
        documents = [Document("text" if piped else path.name, _read(path))]
        wanted = f"--text {shown(path)} is empty"
    else:
        raise UserError(f"--text {shown(path)} does not exist")
    documents = [document for document in documents if document.content]
    if not documents:
        raise UserError(wanted)
    documents.sort(key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
    return source, documents


def can_be_read_once(path: Path | None) -> bool:
    """Whether it is a pipe or the like, such as the shell's ``<(command)``."""
    return path is not None and path.exists() and not path.is_file() and not path.is_dir()


def read_text(path: Path | None, validation_fraction: float = 0.05) -> Text:
    """Reads a corpus and holds out its tail for validation.

    The cut falls between two files where that leaves a sensible share, otherwise inside one.

    Args:
        path: See :func:`read_documents`.
        validation_fraction: Share of the bytes to hold out, in (0, 0.5].

    Raises:
        UserError: Nothing there, nothing readable, or too little to split.
    """
    source, documents = read_documents(path)
    piped = documents[0].content if can_be_read_once(path) else None
    training, validation = _split(documents, validation_fraction)
    return Text(source, training, validation, piped)


def _stdlib_files(root: Path) -> list[str]:
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(name.as_posix() for name in names if _STDLIB_SKIPPED.isdisjoint(name.parts))


def _folder_documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            content = _read(path)
            # A NUL byte early on means binary, as git has it.
            if b"\0" not in content[:8192]:
                yield Document(name.as_posix(), content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--text: {shown(path)} cannot be read: {error.strerror}") from error


def _split(
    documents: list[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    sizes = np.cumsum([len(document.content) for document in documents])
    total = int(sizes[-1])
    target = min(total - 1, round(total * (1 - validation_fraction)))
    nearest = int(np.abs(sizes - target).argmin())
    held_out = (total - int(sizes[nearest])) / total
    if validation_fraction / 2 <= held_out <= validation_fraction * 2:
        return documents[: nearest + 1], documents[nearest + 1 :]
    index = int(np.searchsorted(sizes, target, side="right"))
    cut = documents[index]
    position = target - (int(sizes[index - 1]) if index else 0)
    # Not in the middle of a character, so that both halves stay valid UTF-8.
    while position > 0 and cut.content[position] & 0xC0 == 0x80:
        position -= 1
    head = Document(cut.name, cut.content[:position])
    tail = Document(cut.name, cut.content[position:])
    return [*documents[:index], head], [tail, *documents[index + 1 :]]


def check_utf8(source: str, documents: Sequence[Document]) -> None:
    """Refuses text that is not UTF-8, which BPE needs, naming the file.

    Raises:
        UserError: A document is not UTF-8.
    """
    for document in documents:
        try:
            document.content.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"a bpe tokenizer needs UTF-8, but {shown(document.name)} of {source} is not: byte "
                f"0x{document.content[error.start]:02x} at position {error.start} "
                "(--tokenizer byte of attnres train takes any file)"
            ) from error


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
        training: Token ids, documents one after the other, each followed by the end id.
        validation: The same for the held-out part.
        bytes_per_token: Of the validation part, to turn its loss into bits per byte.
    """

    training: torch.Tensor
    validation: torch.Tensor
    bytes_per_token: float

    def batch(
        self, seed: int, step: int, batch_size: int, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training batch of a step.

        Returns:
            Inputs and next-token targets, int64 ``[batch_size, sequence_length]`` each.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        last = self.training.numel() - sequence_length - 1
        starts = torch.randint(last + 1, (batch_size,), generator=generator)
        return _windows(self.training, starts, sequence_length)

    def validation_batches(
        self, num_batches: int, batch_size: int, sequence_length: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Windows spread evenly over the held-out text; see :func:`spread_windows`."""
        return spread_windows(self.validation, num_batches, batch_size, sequence_length)


def spread_windows(
    tokens: torch.Tensor, num_batches: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows spread evenly over ``tokens``, the same on every call.

    Yields:
        Inputs and next-token targets, int64 ``[batch_size, sequence_length]`` each.
    """
    last = tokens.numel() - sequence_length - 1
    starts = torch.linspace(0, last, num_batches * batch_size, dtype=torch.float64).long()
    for part in starts.split(batch_size):
        yield _windows(tokens, part, sequence_length)


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random that happens in ``step`` of the run with ``seed``."""
    return (seed * 0x2545F4914F6CDD1D + (step + 1) * _STEP_STRIDE) % 2**63


def _windows(
    tokens: torch.Tensor, starts: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def tokenize(text: Text, tokenizer: Tokenizer, sequence_length: int) -> Corpus:
    """Tokenizes both parts of a corpus.

    Raises:
        UserError: A part is shorter than one sequence and its targets.
    """
    parts = {}
    for part, documents in (("training", text.training), ("validation", text.validation)):
        parts[part] = tokenize_documents(documents, tokenizer)
        if parts[part].numel() < sequence_length + 1:
            raise UserError(
                f"the {part} part of {text.source} has {parts[part].numel()} tokens, but one "
                f"sequence needs {sequence_length + 1}: shorten --sequence-length or give more text"
            )
    num_bytes = sum(len(document.content) for document in text.validation)
    return Corpus(**parts, bytes_per_token=num_bytes / parts["validation"].numel())


def tokenize_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> torch.Tensor:
    """Token ids of all documents, each followed by the end id; int32 ``[tokens]``."""
    end = np.array([tokenizer.end], np.int32)
    pieces = [part for document in documents for part in (tokenizer.encode(document.content), end)]
    return torch.from_numpy(np.concatenate(pieces))
