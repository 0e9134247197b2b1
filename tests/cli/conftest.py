import itertools
import json

import pytest

from attnres_ext.cli import train_run
from attnres_ext.cli.main import main

# Small enough that a whole run takes a second or two.
TINY = [
    "--preset=tiny",
    "--sequence-length=32",
    "--batch-size=2",
    "--steps=6",
    "--warmup-steps=2",
    "--validate-every=3",
    "--validation-batches=2",
    "--checkpoint-every=2",
]


def write_text(folder):
    """Some 20 kB of text that is neither constant nor random."""
    path = folder / "text.py"
    lines = (f"def f{i}(x):\n    return x * {i * i} + {i % 7}  # naïve ∑\n" for i in range(400))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def train(text, tmp_path, monkeypatch):
    """Trains in this process and returns the run's folder."""
    numbers = itertools.count()

    def run(*arguments, out=None, code=0, plots=False):
        out = out or tmp_path / f"run{next(numbers)}"
        argv = ["train", "--out", str(out), "--text", str(text), *TINY, *map(str, arguments)]
        with monkeypatch.context() as patch:
            if not plots:  # half of the time of a run this small
                patch.setattr(train_run, "_plot", lambda *_: None)
            assert main(argv) == code
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused with one sentence, and returns the sentence."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse leaves this way
            code = exit.code
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert captured.err.startswith(f"attnres {arguments[0]}: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def metrics(out, *, without=()):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: record[key] for key in record if key not in without} for record in records]


def tree(folder):
    """Every file below ``folder`` with its content."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
