"""The programs in examples/ run, and print what they are there to show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(b"How much wood would a woodchuck chuck? " * 400)
    return str(path)


def test_nanogpt(text, monkeypatch, capsys):
    run(
        *("nanogpt.py", "--text", text, "--modes", "standard,block,full"),
        *("--steps", "12", "--num-layers", "2", "--batch-size", "2", "--seed", "3"),
        monkeypatch=monkeypatch,
    )
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()][1:]
    first, last = ([float(cell) for cell in row[1:]] for row in (table[0], table[-1]))
    assert max(first) - min(first) < 0.002  # zero queries: every mode is the same function
    assert all(after < before - 1 for before, after in zip(first, last, strict=True))
    assert shown.count("It writes:\ndef ") == 3


def test_a_text_that_is_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("nanogpt.py", "--text", "/nowhere", monkeypatch=monkeypatch)
    assert "nanogpt.py: error: --text /nowhere is no file" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--lora"]], ids=str)
def test_finetune_transformers(options, text, tmp_path, monkeypatch, capsys):
    for name in ("transformers", "accelerate", "peft"):
        pytest.importorskip(name)
    run(
        *("finetune_transformers.py", "--text", text, "--steps", "4", "--length", "32", *options),
        *("--out", str(tmp_path / "out")),
        monkeypatch=monkeypatch,
    )
    shown = capsys.readouterr().out
    assert "12 sublayers in 3 blocks" in shown
    moved = float(shown.split("moved the logits by ")[1].split()[0])
    assert moved < 1e-5
    assert "the output reads 0." in shown
    assert ("loaded again it computes the same: True" in shown) == (not options)
