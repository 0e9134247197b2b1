"""Which code was measured: hashes of ``csrc/``, of each backend and of each file of CUDA kernels.

Needs nothing but the standard library: the build runs it too, with a file to write, so that
a binary can say which sources it was compiled from.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Folders of ``csrc/`` that each backend has to itself: what runs on the other knows nothing of it.
_BACKENDS = ("cpu", "cuda")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def source_hash(root: Path) -> str:
    """SHA-256 over names and contents of everything under ``csrc/`` of the checkout ``root``."""
    return _digest(root, _files(root))


def backend_hashes(root: Path) -> dict[str, str]:
    """A hash for "cpu" and one for "cuda": ``csrc/`` without the other's folder.

    A figure of the CPU stands while only CUDA kernels change, and the other way round.
    """
    return {
        backend: _digest(
            root,
            (
                path
                for path in _files(root)
                if path.relative_to(root / "csrc").parts[0] not in {*_BACKENDS} - {backend}
            ),
        )
        for backend in _BACKENDS
    }


def hashes(root: Path) -> dict[str, Any]:
    """What every record says about its sources: ``csrc_sha256`` and ``backend_sha256``."""
    return {"csrc_sha256": source_hash(root), "backend_sha256": backend_hashes(root)}


def is_current(record: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether a record is of the present sources, as far as they can matter to its figures.

    Args:
        record: what :func:`hashes` said when it was made, and its ``device``. Without a device (a
            build), or in records from before there were hashes of backends, everything matters.
        present: what :func:`hashes` says now.
    """
    if record.get("csrc_sha256") == present["csrc_sha256"]:
        return True
    backend = str(record.get("device", "")).split(":")[0]
    measured = record.get("backend_sha256", {}).get(backend)
    return measured is not None and measured == present["backend_sha256"][backend]


def kernel_hashes(root: Path) -> dict[str, str]:
    """A hash for each file of CUDA kernels (``"sm90/depth_attention"``), headers included.

    It changes when anything that the file includes from ``csrc/`` changes, and only then: a result
    of a GPU stands until the code behind it does not.
    """
    return {
        f"{path.parent.name}/{path.stem}": _digest(root, _with_includes(path, root))
        for path in sorted((root / "csrc" / "cuda").glob("sm*/*.cu"))
    }


def _files(root: Path) -> list[Path]:
    return [path for path in (root / "csrc").rglob("*") if path.is_file()]


def _with_includes(path: Path, root: Path) -> set[Path]:
    """The file and what it includes with quotes, and what that includes, and so on."""
    root = root.resolve()
    folders = (root / "csrc" / "cuda", root / "csrc" / "include")
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in _INCLUDE.findall(file.read_text()):
            # Quotes in csrc/ name files of csrc/; one that is missing would not compile.
            places = [folder / name for folder in (file.parent, *folders)]
            waiting += [place.resolve() for place in places if place.is_file()][:1]
    return found


def _digest(root: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> None:
    """Writes the header that tells the operators' library what it is made of."""
    root = Path(__file__).resolve().parents[2]
    Path(sys.argv[1]).write_text(f'#define ATTNRES_SOURCE_HASH "{source_hash(root)}"\n')


if __name__ == "__main__":
    main()
