"""Where files go and come from: links, mount points, full disks, pipes, names of other bytes."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_ext.cli.main import main

from .conftest import TINY, metrics, tree

LATIN = os.fsdecode(b"stra\xdfe")


def attnres(*arguments, **options):
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "attnres_ext", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def lines(stream):
    return stream.decode(errors="replace").splitlines()


def test_a_link_to_a_folder(train, tmp_path):
    real, link = tmp_path / "scratch", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for option, mode in (("--residual=block", "block"), ("--overwrite", "standard")):
        train(option, "--residual", mode, "--steps", 1, out=link)
        assert link.is_symlink()
        assert {record["arm"] for record in metrics(real)} == {mode}
    train("--resume", "--residual=standard", "--steps=1", out=link)


def test_a_folder_that_cannot_be_renamed_over(train, tmp_path, monkeypatch):
    """A mount point: nothing can be renamed onto it, and it cannot be removed."""
    out = tmp_path / "volume"
    out.mkdir()

    def refusing(function):
        def call(*paths, **options):
            if out in paths:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(out))
            return function(*paths, **options)

        return call

    monkeypatch.setattr(os, "rename", refusing(os.rename))
    monkeypatch.setattr(shutil, "rmtree", refusing(shutil.rmtree))
    train("--residual=block", "--steps=1", out=out)
    train("--residual=standard", "--steps=1", "--overwrite", out=out)
    assert {record["arm"] for record in metrics(out)} == {"standard"}


def test_what_an_interrupted_start_left_is_not_in_the_way(train, tmp_path):
    out = tmp_path / "run"
    (out / ".start-1.tmp").mkdir(parents=True)
    train("--residual=block", "--steps=1", out=out)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("name", ["missing", "file/run", "file", "n" * 300])
def test_places_that_cannot_be(refused, text, tmp_path, name):
    (tmp_path / "file").write_text("")
    if name == "missing":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    assert "--out" in refused("train", "--out", tmp_path / name, "--text", text, *TINY)
    assert tree(tmp_path) == before


def test_the_longest_name(train, tmp_path):
    train("--residual=block", "--steps=1", out=tmp_path / ("n" * 255))


def test_places_are_checked_before_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    for command in (["train", "--text", "nowhere"], ["inspect", "nowhere"]):
        sentence = refused(*command, "--out", tmp_path / "folder")
        assert f"--out {tmp_path / 'folder'} cannot be made: Permission denied" in sentence


def test_a_full_disk(train, tmp_path):
    """No checkpoint by halves; the one before stays, and the run goes on when there is room."""
    options = ["--residual=block", "--steps=6", "--checkpoint-every=2"]
    whole = train(*options)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60 << 10, 60 << 10))

    text = tmp_path / "text.py"
    out = tmp_path / "limited"
    first = attnres("train", "--out", out, "--text", text, *TINY, *options, preexec_fn=limit)
    assert first.returncode == 2
    sentence = lines(first.stderr)[-1]
    assert "the checkpoint of step 2" in sentence
    assert "File too large" in sentence
    assert f"go on with: attnres train --out {out} --resume" in sentence
    assert not list((out / "checkpoints").iterdir())
    train("--resume", out=out)
    assert metrics(out, without=("ms",)) == metrics(whole, without=("ms",))


def test_a_full_disk_behind_standard_output(train):
    out = train("--residual=block", "--steps=1")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "attnres_ext", "generate", "--checkpoint", str(out)]
        done = subprocess.run(
            [*command, "--max-new-tokens=2"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert lines(done.stderr)[-1] == "attnres generate: the output: No space left on device"


def test_resume_takes_the_newest_whole_checkpoint(train, capsys):
    options = ["--residual=block", "--steps=6", "--checkpoint-every=2", "--keep-checkpoints=2"]
    whole, out = train(*options), train(*options)
    found = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in found] == ["step-000004", "step-000006"]
    (weights,) = found[1].rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    train("--resume", out=out)
    said = capsys.readouterr().err
    assert "damaged: block-seed0/model.safetensors" in said
    assert "continuing from step 4" in said
    assert metrics(out, without=("ms",)) == metrics(whole, without=("ms",))
    newest = Path("checkpoints", "step-000006", "block-seed0", "model.safetensors")
    assert (out / newest).read_bytes() == (whole / newest).read_bytes()


def test_names_that_are_not_utf8(train, text, tmp_path):
    content = text.read_text()
    folder = tmp_path / LATIN
    folder.mkdir()
    for name in (f"{LATIN}.txt", "b.txt"):
        (folder / name).write_text(content)
    for given in (folder, folder / f"{LATIN}.txt"):
        out = train("--text", given, "--residual=block", "--steps=1", plots=given == folder)
        assert main(["train", "--out", str(out), "--resume"]) == 0
    done = attnres("generate", "--checkpoint", out, "--prompt", LATIN, "--max-new-tokens=1")
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_are_not_utf8(train, encoding):
    out = train("--residual=block", "--steps=1")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for command in (
        ["generate", "--checkpoint", out, "--prompt", "日本 €", "--max-new-tokens=1"],
        ["info"],
        ["--help"],
    ):
        assert attnres(*command, env=environment).returncode == 0


def test_a_pipe(text, tmp_path):
    """What can be read once is kept with the run, which goes on from that."""
    read, write = os.pipe()
    os.write(write, text.read_bytes()[:30000])
    os.close(write)
    out = tmp_path / "piped"
    done = attnres(
        "train", "--out", out, "--text", f"/dev/fd/{read}", *TINY, "--residual=block",
        pass_fds=[read],
    )  # fmt: skip
    os.close(read)
    assert done.returncode == 0
    assert (out / "text").read_bytes() == text.read_bytes()[:30000]
    assert main(["train", "--out", str(out), "--resume"]) == 0
