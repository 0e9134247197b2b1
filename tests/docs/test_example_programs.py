"""The programs in examples/ run, and print what they are there to show."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

# What takes seconds to import is imported once, and not by each process.
multiprocessing.set_forkserver_preload(["attnres_ext.parallel", "torch.distributed.tensor"])

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


def run_as_rank(
    name: str, arguments: tuple[str, ...], environment: dict[str, str], out: Path
) -> None:
    os.environ.update(environment)
    sys.argv = [name, *arguments]
    with out.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_in_processes(name: str, size: int, *arguments: str, folder: Path) -> str:
    """Starts a program as torchrun does, and returns what the first process prints."""
    context = multiprocessing.get_context("forkserver")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        out = folder / str(rank)
        process = context.Process(target=run_as_rank, args=(name, arguments, environment, out))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return (folder / "0").read_text()


def losses_shown(text: str) -> list[tuple[str, str]]:
    return re.findall(r"step \d+: ([\d.]+) alone, ([\d.]+) in parts", text)


def test_sequence_parallel(tmp_path):
    shown = run_in_processes(
        "sequence_parallel.py", 2, "--steps", "3", "--length", "15", folder=tmp_path
    )
    losses = losses_shown(shown)
    assert len(losses) == 3
    assert all(float(alone) == pytest.approx(float(parts), abs=2e-4) for alone, parts in losses)
    assert float(losses[-1][1]) < float(losses[0][1]) - 0.5
    assert float(shown.split("at most ")[1].split()[0]) < 1e-5
    assert "blocks take 12,480 bytes on each of 2 ranks" in shown


def test_dtensor_residual(tmp_path):
    losses = losses_shown(run_in_processes("dtensor_residual.py", 2, folder=tmp_path))
    assert len(losses) == 5
    assert all(float(alone) == pytest.approx(float(parts), abs=2e-4) for alone, parts in losses)
    assert float(losses[-1][1]) < 0.6 * float(losses[0][1])


def test_pipeline(tmp_path):
    shown = run_in_processes(
        "pipeline.py",
        2,
        *("--schedule", "ZBVZeroBubble", "--sublayers", "11", "--steps", "4"),
        folder=tmp_path,
    )
    losses = [float(loss) for loss, _ in losses_shown(shown)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    assert shown.count("the same bits") == 4
    assert "4 stages on 2 ranks; hops carry 4 tensors a microbatch, 6 without a cache" in shown
