"""Writing files so that a reader, or a run after a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_ext.training.errors import UserError


def shown(path: Path | str) -> str:
    """A path for people: bytes that are no UTF-8 as U+FFFD, so that it can be written anywhere."""
    return os.fsencode(path).decode(errors="replace")


def check_folder(option: str, path: Path) -> None:
    """Finds out before any work that a folder can be written to, or made; makes nothing.

    Args:
        option: What the user calls it.
        path: The folder, or where it is to be.

    Raises:
        UserError: It is a file, or this process may not write there.
    """
    name = f"{option} {shown(path)}"
    with writing(name, "cannot be made"):  # a name may be too long to look at
        if path.exists() and not path.is_dir():
            raise UserError(f"{name} is a file, expected a directory")
        # A link that leads nowhere is there, though it does not exist.
        if path.is_symlink() and not path.exists():
            target = shown(os.readlink(path))
            raise UserError(f"{name} is a link to {target}, which does not exist")
        nearest = path.absolute()
        while not nearest.exists():
            nearest = nearest.parent
    verb = "written to" if nearest == path.absolute() else "made"
    with writing(name, f"cannot be {verb}"):
        if not nearest.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def writing(what: str, failure: str = "cannot be written", then: str = "") -> Iterator[None]:
    """Says what the system refused in one sentence.

    Args:
        what: The thing that is written.
        failure: What became of it.
        then: What the user can do about it.

    Raises:
        UserError: In the place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} {failure}: {error.strerror or error}{then}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` with ``data`` in one step: temporary file, flush to disk, rename."""
    # The temporary name keeps the suffix, so that nobody globbing for *.json.tmp has to know us.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` with ``text`` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` with ``value`` as indented JSON, in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync_directory(path: Path) -> None:
    """Makes renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
