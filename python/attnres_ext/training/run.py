"""A run's directory: who may write it, what it was asked to do, what it has measured."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from attnres_ext.fields import build
from attnres_ext.training.checkpoint import (
    ArmState,
    checkpoints,
    discard,
    read_json_object,
    save_checkpoint,
    verify,
)
from attnres_ext.training.errors import UserError
from attnres_ext.training.files import (
    check_folder,
    shown,
    sync_directory,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from attnres_ext.training.loop import Record
from attnres_ext.training.settings import Settings
from attnres_ext.training.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

# Of run.json. In 1 some settings were among "arguments"; it is still read.
FORMAT = 2
_DESCRIPTION = "run.json"
_METRICS = "metrics.jsonl"
_TOKENIZER = "tokenizer.json"
_TEXT = "text"
# What an interrupted start leaves in a folder; never part of a run.
_UNFINISHED = ".start-*.tmp"


class Run:
    """The directory of one training run; see :mod:`attnres_ext.training.checkpoint`.

    Args:
        path: The directory, created by :meth:`create`.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(
        cls,
        path: Path,
        description: Mapping[str, Any],
        tokenizer: Tokenizer,
        overwrite: bool,
        text: bytes | None = None,
    ) -> Run:
        """Begins a run in a directory, which may be a link to one or a mount point.

        Everything is written beside what is there and then renamed, the description last: a
        directory without one holds no run.

        Args:
            path: The directory, made where it is missing.
            description: What defines the run.
            tokenizer: Turns the text into ids.
            overwrite: Whether a run that is there already is replaced.
            text: The text itself, kept where it cannot be read again.

        Raises:
            UserError: It cannot be made, or see :func:`check_vacant`.
        """
        check_vacant(path, overwrite)
        with writing(f"--out {shown(path)}", "cannot be made"):
            path = path.resolve()
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            building = path / _UNFINISHED.replace("*", str(os.getpid()))
            try:
                building.mkdir()
                save_tokenizer(tokenizer, building / _TOKENIZER)
                write_text(building / _METRICS, "")
                if text is not None:
                    write_bytes(building / _TEXT, text)
                write_json(building / _DESCRIPTION, description)
                with cls(path).lock():
                    _remove_all(path, but=building)
                    # In the order in which they were written.
                    for name in (_TOKENIZER, _METRICS, _TEXT, _DESCRIPTION):
                        if (building / name).exists():
                            os.rename(building / name, path / name)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                if made:
                    with contextlib.suppress(OSError):
                        path.rmdir()
                raise
            building.rmdir()
            sync_directory(path)
            sync_directory(path.parent)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens a run to resume it.

        Raises:
            UserError: There is no run.
        """
        if not (path / _DESCRIPTION).is_file():
            raise UserError(f"--resume: --out {shown(path)} holds no run (no {_DESCRIPTION} in it)")
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
        if description.get("format") not in (1, FORMAT):
            raise UserError(
                f"{self.path / _DESCRIPTION} has format {description.get('format')}, expected "
                f"{FORMAT}: it was written by another version, or is damaged"
            )
        return description

    @property
    def settings(self) -> Settings:
        """The settings that it was begun with.

        Raises:
            UserError: As for :attr:`description`, or a setting is not what it may be.
        """
        description = self.description
        names = {entry.name for entry in fields(Settings)}
        older = description.get("arguments", {})
        values = {name: value for name, value in older.items() if name in names}
        try:
            return build(Settings, values | description["settings"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            path = self.path / _DESCRIPTION
            raise UserError(f"{path} is damaged, or another version's: {error}") from error

    @property
    def kept_text(self) -> Path:
        """Where a run keeps a text that could be read only once."""
        return self.path / _TEXT

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
            raise UserError(f"another process is training in --out {shown(self.path)}") from None
        finally:
            os.close(descriptor)

    def latest_checkpoint(self) -> tuple[int, Path | None]:
        """Steps done and the newest whole checkpoint to continue from; (0, None) at the start.

        Raises:
            UserError: There are checkpoints, and all are damaged; the newest one's damage.
        """
        newest: UserError | None = None
        for step, path in reversed(list(checkpoints(self.checkpoints))):
            try:
                verify(path)
            except UserError as error:
                newest = newest or error
            else:
                if newest is not None:
                    print(f"{newest}; continuing from step {step}", file=sys.stderr)
                return step, path
        if newest is not None:
            raise newest
        return 0, None

    def append(self, records: Sequence[Record]) -> None:
        """Adds a line per record to the metrics.

        Appending is the one write that is not a rename; :meth:`rewind` drops a torn last line.

        Raises:
            UserError: They cannot be written.
        """
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        with self.writing(_METRICS), open(self.path / _METRICS, "a") as file:
            file.write(lines)

    def save(
        self,
        step: int,
        arms: Sequence[ArmState],
        tokenizer: Tokenizer,
        keep: int = 1,
        write: bool = True,
    ) -> Path:
        """Writes a checkpoint of all arms and returns its folder; see :func:`save_checkpoint`.

        Raises:
            UserError: It cannot be written; the checkpoints before it stay.
        """
        if not write:
            return save_checkpoint(self.checkpoints, step, arms, tokenizer, keep, write=False)
        with self.writing(f"the checkpoint of step {step}"):
            # After a power cut the metrics must reach at least as far as the checkpoint.
            descriptor = os.open(self.path / _METRICS, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            return save_checkpoint(self.checkpoints, step, arms, tokenizer, keep)

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Says in one sentence that ``what`` cannot be written, and how to go on afterwards."""
        return writing(
            f"{what} in {shown(self.path)}",
            then=f"; with that mended, go on with: {self.resume_command}",
        )

    @property
    def resume_command(self) -> str:
        """What continues the run."""
        return f"attnres train --out {shlex.quote(shown(self.path))} --resume"

    def rewind(self, step: int | None) -> None:
        """Drops what was written after ``step``, which a resumed run does again; None drops all.

        These are metrics, and checkpoints that are newer than the newest whole one.
        """
        kept = [record for record in self.records() if step is not None and record.step <= step]
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in kept)
        with self.writing(_METRICS):
            write_text(self.path / _METRICS, lines)
            for number, path in checkpoints(self.checkpoints):
                if number > (step or 0):
                    discard(path)

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
        UserError: ``path`` is a file or cannot be written to, or it is not empty and ``overwrite``
            is false, or it is not empty and holds something else than a run.
    """
    check_folder("--out", path)
    if not path.exists() or all(child.match(_UNFINISHED) for child in path.iterdir()):
        return
    if not (path / _DESCRIPTION).is_file():
        raise UserError(
            f"--out {shown(path)} is not empty and holds no run (no {_DESCRIPTION}): name another "
            "directory"
        )
    if not overwrite:
        raise UserError(
            f"--out {shown(path)} already holds a run: --resume continues it, --overwrite starts "
            "again"
        )


def _remove_all(folder: Path, but: Path) -> None:
    # The description first: what is left after an interruption is no run.
    (folder / _DESCRIPTION).unlink(missing_ok=True)
    for child in folder.iterdir():
        if child == but:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
