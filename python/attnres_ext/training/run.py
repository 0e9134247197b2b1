"""A run's directory: who may write it, what it was asked to do, what it has measured."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_ext.training.checkpoint import (
    ArmState,
    checkpoints,
    read_json_object,
    save_checkpoint,
    verify,
)
from attnres_ext.training.errors import UserError
from attnres_ext.training.files import sync_directory, write_json, write_text
from attnres_ext.training.loop import Record
from attnres_ext.training.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

# Of run.json; raised whenever an older one can no longer be resumed.
FORMAT = 1
_DESCRIPTION = "run.json"
_METRICS = "metrics.jsonl"
_TOKENIZER = "tokenizer.json"


class Run:
    """The directory of one training run; see :mod:`attnres_ext.training.checkpoint`.

    Args:
        path: The directory, created by :meth:`create`.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(
        cls, path: Path, description: Mapping[str, Any], tokenizer: Tokenizer, overwrite: bool
    ) -> Run:
        """Makes the directory; it appears with all its files or not at all.

        Raises:
            UserError: It cannot be made, or see :func:`check_vacant`.
        """
        check_vacant(path, overwrite)
        path = path.absolute()
        building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            building.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {path} cannot be made: {error.strerror}") from None
        try:
            write_json(building / _DESCRIPTION, description)
            save_tokenizer(tokenizer, building / _TOKENIZER)
            write_text(building / _METRICS, "")
            if path.exists() and any(path.iterdir()):
                with cls(path).lock():
                    shutil.rmtree(path)
            os.rename(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_directory(path.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens a run to resume it.

        Raises:
            UserError: There is no run.
        """
        if not (path / _DESCRIPTION).is_file():
            raise UserError(f"--resume: --out {path} holds no run (no {_DESCRIPTION} in it)")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def description(self) -> dict[str, Any]:
        """What :meth:`create` was given.

        Raises:
            UserError: The file is damaged, or another version of the package wrote it.
        """
        description = read_json_object(self.path / _DESCRIPTION)
        if description.get("format") != FORMAT:
            raise UserError(
                f"{self.path / _DESCRIPTION} has format {description.get('format')}, expected "
                f"{FORMAT}: it was written by another version, or is damaged"
            )
        return description

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.path / _TOKENIZER)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from training in the same directory.

        The kernel drops the lock when the process ends, however it ends.

        Raises:
            UserError: Another process holds it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"another process is training in --out {self.path}") from None
        finally:
            os.close(descriptor)

    def latest_checkpoint(self) -> tuple[int, Path | None]:
        """Steps done and the verified checkpoint to continue from; (0, None) at the start."""
        found = list(checkpoints(self.checkpoints))
        if not found:
            return 0, None
        step, path = found[-1]
        verify(path)
        return step, path

    def append(self, records: Sequence[Record]) -> None:
        """Adds a line per record to the metrics.

        Appending is the one write that is not a rename; :meth:`rewind` drops a torn last line.
        """
        with open(self.path / _METRICS, "a") as file:
            file.write("".join(json.dumps(asdict(record)) + "\n" for record in records))

    def save(
        self, step: int, arms: Sequence[ArmState], tokenizer: Tokenizer, write: bool = True
    ) -> Path:
        """Writes a checkpoint of all arms and returns its folder; see :func:`save_checkpoint`."""
        if not write:
            return save_checkpoint(self.checkpoints, step, arms, tokenizer, write=False)
        # After a power cut the metrics must reach at least as far as the checkpoint.
        descriptor = os.open(self.path / _METRICS, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return save_checkpoint(self.checkpoints, step, arms, tokenizer)

    def rewind(self, step: int | None) -> None:
        """Drops metrics of steps after ``step``, which a resumed run does again; None drops all."""
        kept = [record for record in self.records() if step is not None and record.step <= step]
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in kept)
        write_text(self.path / _METRICS, lines)

    def records(self) -> list[Record]:
        """All metrics so far, without a torn last line.

        Raises:
            UserError: The file is missing or a line is no record.
        """
        path = self.path / _METRICS
        try:
            lines = path.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        records = []
        for number, line in enumerate(lines, start=1):
            # Only a line with its newline was written whole.
            if line.endswith("\n"):
                try:
                    records.append(Record(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path} is damaged in line {number}: {error}") from error
        return records


def check_vacant(path: Path, overwrite: bool) -> None:
    """Refuses a directory whose content a new run would mix with or destroy.

    Raises:
        UserError: ``path`` is a file, or it is not empty and ``overwrite`` is false, or it is not
            empty and holds something else than a run.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file, expected a directory")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / _DESCRIPTION).is_file():
        raise UserError(
            f"--out {path} is not empty and holds no run (no {_DESCRIPTION}): name another "
            "directory"
        )
    if not overwrite:
        raise UserError(
            f"--out {path} already holds a run: --resume continues it, --overwrite starts again"
        )
