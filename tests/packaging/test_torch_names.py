"""What torch does not document is used in one place, and missed with a sentence."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from attnres_ext import torch_internals

FILE = Path(torch_internals.__file__)
UNDOCUMENTED = re.compile(
    r"\b(torch|forward_ad)(\.\w+)*\._(?!_)\w+"
    r"|^\s*(from|import) torch[\w.]*\._.*"
    r"|^\s*from torch[\w.]* import .*\b_\w+.*",
    re.MULTILINE,
)


def test_nobody_else_uses_them() -> None:
    found = {
        (path.name, match.group())
        for path in FILE.parent.rglob("*.py")
        if path != FILE
        for match in UNDOCUMENTED.finditer(path.read_text())
    }
    assert not found
    assert len(UNDOCUMENTED.findall(FILE.read_text())) >= 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_current_graph_task_id"),
        (torch._C._autograd, "_top_saved_tensors_default_hooks"),
        (torch.utils.checkpoint, "_StopRecomputationError"),
        (torch.autograd.forward_ad, "_current_level"),
    ],
)
def test_a_torch_without_one(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    specification = importlib.util.spec_from_file_location("again", FILE)
    message = rf"torch {re.escape(torch.__version__)} has no torch\.[\w.]*\.{name}, .* torch 2\.10"
    with pytest.raises(ImportError, match=message):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
