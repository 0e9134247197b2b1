"""Writing files so that a reader, or a run after a crash, never sees half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
