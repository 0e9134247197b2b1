import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from attnres_ext.cli.main import main
from attnres_ext.training import checkpoint as checkpoint_module

from .conftest import TINY, metrics, tree, write_text

TIMELESS = {"without": ("ms",)}


def final(out):
    """Everything of a run that must not depend on interruptions."""
    (folder,) = (out / "checkpoints").iterdir()
    weights = {
        name: content for name, content in tree(folder).items() if name.suffix == ".safetensors"
    }
    assert len(weights) > 1
    return metrics(out, **TIMELESS), weights


def test_a_run_leaves_what_the_readme_promises(train, capsys):
    out = train("--residual", "standard,block,full", plots=True)
    records = metrics(out)
    assert [(record["arm"], record["step"]) for record in records] == [
        (arm, step) for step in range(7) for arm in ("standard", "block", "full")
    ]
    assert all(record["seed"] == 0 for record in records)
    for record in records:
        validated = record["step"] in (0, 3, 6)
        assert (record["val_loss"] is not None) == validated
        assert (record["loss"] is None) == (record["step"] == 0)
        assert record["tokens"] == record["step"] * 64
    for name in ("loss.png", "depth_attention.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert [row["arm"] for row in summary["arms"]] == ["standard", "block", "full"]
    assert set(summary["depth_attention"]) == {"block-seed0", "full-seed0"}
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    table = capsys.readouterr().out
    for heading in ("residual", "parameters", "train", "val", "ms/", "overhead"):
        assert heading in table


def test_first_losses_of_arms_agree(train):
    records = metrics(train("--residual", "standard,block,full", "--steps", 1))
    first = [record["loss"] for record in records if record["step"] == 1]
    assert first == pytest.approx([first[0]] * 3, abs=1e-2)


def test_runs_repeat_and_seeds_matter(train):
    first = final(train("--residual", "block"))
    assert final(train("--residual", "block")) == first
    other = metrics(train("--residual", "block", "--seed", 1), without=("ms", "seed"))
    assert [record["loss"] for record in other] != [record["loss"] for record in first[0]]


def test_several_seeds(train):
    out = train("--residual", "standard,block", "--seeds", "0,3", "--steps", 2)
    arms = {(record["arm"], record["seed"]) for record in metrics(out)}
    assert arms == {(arm, seed) for arm in ("standard", "block") for seed in (0, 3)}
    alone = metrics(train("--residual", "block", "--seed", 3, "--steps", 2), **TIMELESS)
    assert alone == [
        record
        for record in metrics(out, **TIMELESS)
        if (record["arm"], record["seed"]) == ("block", 3)
    ]


def test_bpe(train):
    out = train("--residual", "block", "--tokenizer", "bpe", "--vocab-size", 400)
    config = json.loads((out / "run.json").read_text())["config"]
    assert 257 < config["vocab_size"] <= 400
    row = json.loads((out / "summary.json").read_text())["arms"][0]
    assert 0 < row["bits_per_byte"] < row["val_loss"]


def test_configuration_from_a_file(train, tmp_path):
    first = train("--residual", "block", "--sublayers-per-block", 2, "--steps", 1)
    config = json.loads((first / "run.json").read_text())["config"]
    assert config["sublayers_per_block"] == 2
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    # --config replaces --preset, which the fixture gives.
    argv = [argument for argument in TINY if not argument.startswith("--preset")]
    out = tmp_path / "configured"
    text = tmp_path / "text.py"
    command = ["train", "--out", str(out), "--text", str(text), "--residual", "block", *argv]
    assert main([*command, "--config", str(path), "--steps", "1"]) == 0
    assert metrics(out, **TIMELESS) == metrics(first, **TIMELESS)


# ---- resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two arms."""
    folder = tmp_path_factory.mktemp("whole")
    argv = ["train", "--out", folder / "run", "--text", write_text(folder), *TINY]
    assert main([*map(str, argv), "--residual", "standard,block"]) == 0
    return final(folder / "run")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_resume_after_dying_in_a_checkpoint(train, whole, monkeypatch, tmp_path, saves):
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        rename = os.rename
        count = 0

        def dying(source, target):
            nonlocal count
            if str(target).endswith(("step-000002", "step-000004", "step-000006")):
                count += 1
                if count > saves:
                    raise Killed
            rename(source, target)

        patch.setattr(checkpoint_module.os, "rename", dying)
        with pytest.raises(Killed):
            train("--residual", "standard,block", out=out)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert final(out) == whole


def test_resume_after_kill_9(whole, text, tmp_path):
    """A real process, killed at several moments on its way."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "attnres_ext", "train", "--out", str(out)]
    start = [*command, "--text", str(text), "--residual", "standard,block", *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads())}
    for wanted, argv in ((5, start), (9, [*command, "--resume"])):
        process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE)
        _wait_for_lines(out / "metrics.jsonl", wanted, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # Half a line, as a kill in the middle of a write would leave it.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"arm": "standard", "se')
    finished = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert final(out) == whole


def _threads():
    import torch

    return torch.get_num_threads()


def _wait_for_lines(path, count, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    assert process.poll() == 0, process.stderr.read()


def test_ctrl_c_saves_and_says_how_to_go_on(whole, train, text, tmp_path, monkeypatch, capsys):
    from attnres_ext.training.run import Run

    out = tmp_path / "stopped"
    append = Run.append

    def interrupting(self, records):
        append(self, records)
        if records[0].step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", interrupting)
        train("--residual", "standard,block", out=out, code=130)
    assert "stopped after step 3; continue with: attnres train" in capsys.readouterr().err
    assert (out / "checkpoints" / "step-000003").is_dir()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert final(out) == whole


def test_resuming_a_finished_run_changes_nothing(train):
    out = train("--residual", "standard,block", plots=True)
    before = tree(out)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert tree(out) == before


# ---- refusals: nothing is written, nothing is overwritten ----------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--residual", "standard,foo"],
            "--residual is 'foo', expected one of standard, block, full",
        ),
        (["--residual", "block,block"], "--residual is 'block,block', expected each once"),
        (["--residual", ""], "--residual"),
        (["--steps", "0"], "--steps is '0', expected a positive integer"),
        (["--steps", "many"], "--steps is 'many', expected a positive integer"),
        (["--learning-rate", "nan"], "--learning-rate is 'nan', expected a number above 0"),
        (["--seeds", "1,1"], "is '1,1', expected each once"),
        (["--preset", "huge"], "--preset is 'huge', expected one of tiny, demo, small"),
        (["--config", "nowhere.json"], "not allowed with argument --preset"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--sublayers-per-block", "99"], "sublayers_per_block is 99"),
        (["--sequence-length", "4096"], "tokens, but one sequence needs 4097"),
        (["--text", "nowhere"], "--text nowhere does not exist"),
        (["--resume"], "holds no run"),
        (["--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_refusals_write_nothing(refused, text, tmp_path, arguments, message):
    before = tree(tmp_path)
    out = tmp_path / "run"
    sentence = refused("train", "--out", out, "--text", text, *TINY, *arguments)
    assert message in sentence
    assert tree(tmp_path) == before
    assert not out.exists()


def test_sequences_longer_than_the_model_takes(refused, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("word " * 10_000)
    arguments = ["--validation-fraction", "0.3", "--sequence-length", "1024"]
    sentence = refused("train", "--out", tmp_path / "run", "--text", text, *TINY, *arguments)
    assert "model_max_length is 512" in sentence


def test_empty_and_undecodable_text(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größer ".encode("latin-1") * 2000)
    out = tmp_path / "run"
    assert "is empty" in refused("train", "--out", out, "--text", empty, *TINY)
    arguments = ["--text", latin, *TINY, "--tokenizer", "bpe"]
    assert "needs UTF-8, but latin.txt" in refused("train", "--out", out, *arguments)
    assert not out.exists()


def test_an_existing_run_is_kept(refused, train, text, tmp_path):
    out = train("--residual", "block", "--steps", 1)
    before = tree(out)
    start = ["train", "--out", out, "--text", text, *TINY]
    assert "--resume continues it, --overwrite starts again" in refused(*start)
    # Not even --overwrite touches it when the new run cannot start.
    assert "'foo'" in refused(*start, "--overwrite", "--residual", "foo")
    assert "does not exist" in refused(*start, "--overwrite", "--text", "nowhere")
    assert tree(out) == before
    train("--residual", "standard", "--steps", 2, "--overwrite", out=out)
    assert {record["arm"] for record in metrics(out)} == {"standard"}
    assert len(list((out / "checkpoints").iterdir())) == 1


def test_a_folder_that_is_no_run_is_never_overwritten(refused, text, tmp_path):
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_text("irreplaceable")
    for option in ("--overwrite", "--resume"):
        refused("train", "--out", out, "--text", text, *TINY, option)
    refused("train", "--out", out, "--text", text, *TINY)
    refused("train", "--out", out / "photo.jpg", "--text", text, *TINY)
    assert tree(tmp_path / "holiday").keys() == {(out / "photo.jpg").relative_to(out)}


def test_an_empty_folder_is_fine(train, tmp_path):
    out = tmp_path / "fresh"
    out.mkdir()
    train("--residual", "block", "--steps", 1, out=out)
    assert (out / "run.json").is_file()


def test_resume_refuses_other_settings_and_other_text(refused, train, text, tmp_path):
    out = train("--residual", "block", "--steps", 2)
    before = tree(out)
    resume = ["train", "--out", out, "--resume"]
    assert "--steps 9 differs from 2" in refused(*resume, "--steps", 9)
    assert "differs from block" in refused(*resume, "--residual", "standard,block")
    assert "--text" in refused(*resume, "--text", tmp_path)
    assert "--tokenizer bpe differs from byte" in refused(*resume, "--tokenizer", "bpe")
    assert "differs from None" in refused(*resume, "--sublayers-per-block", 2)
    text.write_text(text.read_text() + "#")
    assert "the text" in refused(*resume)
    assert tree(out) == before


def test_resume_refuses_a_damaged_checkpoint(refused, train):
    out = train("--residual", "block", "--steps", 2)
    (weights,) = out.rglob("optimizer.safetensors")
    weights.write_bytes(weights.read_bytes()[:-3])
    before = tree(out)
    sentence = refused("train", "--out", out, "--resume")
    assert "is damaged: block-seed0/optimizer.safetensors" in sentence
    assert tree(out) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", '{"format": 7}'),
        ("run.json", '{"format": 2}'),
        ("run.json", '{"format": 2, "settings": {"steps": 0}}'),
        ("run.json", '{"format": 2, "settings": {"stepps": 1}}'),
        ("tokenizer.json", "{}"),
        ("metrics.jsonl", "garbage\n"),
    ],
)
def test_resume_refuses_damaged_files(refused, train, name, content):
    out = train("--residual", "block", "--steps", 1)
    (out / name).write_text(content)
    before = tree(out)
    assert name in refused("train", "--out", out, "--resume")
    assert tree(out) == before


def test_the_same_command_with_resume_is_fine(train, whole):
    out = train("--residual", "standard,block")
    assert final(train("--residual", "standard,block", "--resume", out=out)) == whole


def test_a_run_of_an_older_version_is_resumed(refused, train, whole):
    """Format 1 had what is learnt, and with which model, among the command line's arguments."""
    out = train("--residual", "standard,block", "--sublayers-per-block", 2)
    run = json.loads((out / "run.json").read_text())
    settings = run["settings"]
    moved = {
        "text", "tokenizer", "vocab_size", "validation_fraction", "preset", "config",
        "sublayers_per_block",
    }  # fmt: skip
    run["format"] = 1
    run["arguments"] = {**settings, "residual": settings["residuals"], "command_line": "train"}
    del run["arguments"]["residuals"]
    run["settings"] = {name: settings[name] for name in settings.keys() - moved}
    (out / "run.json").write_text(json.dumps(run))
    before = final(out)
    shutil.rmtree(out / "checkpoints")
    resume = ["train", "--out", out, "--resume"]
    assert "--sublayers-per-block 4 differs from 2" in refused(*resume, "--sublayers-per-block", 4)
    assert main([*map(str, resume), "--sublayers-per-block", "2"]) == 0
    assert final(out) == before


def test_two_processes_do_not_share_a_run(refused, train, text, tmp_path):
    from attnres_ext.training.run import Run

    out = train("--residual", "block", "--steps", 1)
    with Run(out).lock():
        for option in ("--resume", "--overwrite"):
            argv = ["train", "--out", out, "--text", text, *TINY, "--steps", 1, option]
            assert "another process is training" in refused(*argv, "--residual", "block")
    assert not list(tmp_path.glob(".*"))
