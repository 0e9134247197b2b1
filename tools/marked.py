"""Text between two comments of a document, which a program writes anew.

<!-- NAME -->
what is replaced
<!-- /NAME -->
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def write(document: Path, name: str, text: str, check: bool = False) -> int:
    """Puts ``text`` between the comments of ``name``.

    Args:
        document: where.
        name: of the comments.
        text: what to put there.
        check: only says whether it is there.

    Returns:
        The exit code: 1 if it is not there and ``check`` is set.
    """
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    before = document.read_text(encoding="utf-8")
    after = between.sub(lambda match: match[1] + text + match[2], before)
    if after != before:
        print(f"{document.name}: {'out of date' if check else 'written'}")
        if not check:
            from attnres_ext.training.files import write_text

            write_text(document, after)
    return int(check and after != before)
