"""Training in a pipeline, as torchrun starts it, over gloo on the CPU."""

import json
import os
import re
import signal
import time

import pytest
import torch

from attnres_ext.cli import train_run
from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, presets
from attnres_ext.training.data import read_text, tokenize
from attnres_ext.training.distributed import joined
from attnres_ext.training.errors import UserError
from attnres_ext.training.loop import build_arms, train
from attnres_ext.training.settings import Settings
from attnres_ext.training.split import Split
from attnres_ext.training.tokenizer import ByteTokenizer

from .conftest import TINY, metrics, tree, write_text
from .processes import finish, start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

# Blocks of three sublayers: cuts between layers divide some of them.
OPTIONS = ["--residual=block", "--sublayers-per-block=3", "--gradient-clip=0.5", "--steps=4"]
OPTIONS += ["--batch-size=4", "--gradient-accumulation=4", "--sequence-length=16"]
OPTIONS += ["--validation-batches=1", "--validate-every=4"]


def command(out, text, *arguments):
    argv = ["train", "--out", str(out), "--text", str(text), *TINY, *OPTIONS, *arguments]

    def run():
        torch.set_num_threads(1)
        train_run._plot = lambda *_: None
        return main(argv)

    return run


def outcome(out):
    """All that was logged, but for times, and all bytes of the checkpoint."""
    summary = json.loads((out / "summary.json").read_text())
    return metrics(out, without=("ms",)), summary["depth_attention"], tree(out / "checkpoints")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A text, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    text = write_text(folder)
    # In a process of its own, with as many threads as those of a pipeline.
    assert finish(start(command(folder / "run", text), size=1)) == [0]
    return text, outcome(folder / "run")


@pytest.mark.parametrize(
    ("size", "arguments"),
    [(4, ["--schedule=1F1B", "--activation-checkpointing"]), (2, ["--schedule=ZBVZeroBubble"])],
    ids=["1F1B", "ZBV"],
)
def test_a_pipeline_is_one_process(alone, tmp_path, size, arguments):
    """Losses, gradient norms, validation, depth attention, weights, moments: the same bits."""
    text, expected = alone
    run = command(tmp_path / "run", text, f"--pipeline={size}", *arguments)
    assert finish(start(run, size)) == [0] * size
    assert outcome(tmp_path / "run") == expected


def test_all_residuals_in_bfloat16(tmp_path):
    text = write_text(tmp_path)
    options = ["--residual=standard,full", "--precision=bfloat16", "--steps=1"]
    outcomes = []
    for name, size, arguments in (
        ("one", 1, []),
        ("two", 2, ["--pipeline=2", "--schedule=Interleaved1F1B"]),
    ):
        run = command(tmp_path / name, text, *options, *arguments)
        assert finish(start(run, size)) == [0] * size
        outcomes.append(outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1]


def test_a_process_holds_its_own_layers_alone(tmp_path):
    """Parameters, gradients and moments; together they are the model's."""
    settings = Settings(
        residuals=("block",), steps=1, batch_size=2, sequence_length=16, gradient_accumulation=2,
        validation_batches=1,
    )  # fmt: skip
    text = write_text(tmp_path)

    def run():
        torch.set_num_threads(1)
        split = Split.of(2, None, "ZBVZeroBubble")
        with joined("cpu", split) as world:
            corpus = tokenize(read_text(text), ByteTokenizer(), settings.sequence_length)
            config = presets("tiny", vocab_size=257)
            (arm,) = build_arms(settings, lambda _: KimiLinearForCausalLM(config), world)
            list(train([arm], corpus, settings, 1, world))
            held = {name: p for name, p in arm.model.named_parameters() if not p.is_meta}
            assert set(held.values()) == set(arm.optimizer.state)
            layers = {name.split(".")[2] for name in held if name.startswith("model.layers.")}
            (tmp_path / str(world.rank)).write_text(
                json.dumps([sorted(layers), sum(p.numel() for p in held.values())])
            )
            (tmp_path / "all").write_text(str(arm.num_parameters))
        return 0

    assert finish(start(run)) == [0, 0]
    (outer, some), (inner, rest) = (
        json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)
    )
    assert (outer, inner) == (["0", "3"], ["1", "2"])
    assert some + rest == int((tmp_path / "all").read_text())


def kill_at(step, out, children, victims):
    """Kills ``victims`` when ``out`` has logged ``step``; codes of all, and for how long they were
    there after it."""
    lines, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") > step:
            break
        time.sleep(0.005)
    for victim in victims:
        os.kill(children[victim], signal.SIGKILL)
    begin = time.monotonic()
    return finish(children), time.monotonic() - begin


def test_a_killed_process_takes_the_others_along_and_a_run_goes_on_in_another_split(
    alone, tmp_path, capfd
):
    """Killed once in each of two splits, and finished by one process: as if nothing had been."""
    text, expected = alone
    out = tmp_path / "run"
    pipeline = ["--pipeline=2", "--schedule=GPipe"]
    codes, seconds = kill_at(2, out, start(command(out, text, *pipeline)), victims=[1])
    assert codes == [2, -signal.SIGKILL]
    assert seconds < 30
    assert "another process is gone" in capfd.readouterr().err
    again = ["--resume", "--pipeline=2", "--schedule=DualPipeV"]
    codes, _ = kill_at(3, out, start(command(out, text, *again)), victims=[0, 1])
    assert codes == [-signal.SIGKILL] * 2
    assert finish(start(command(out, text, "--resume"), size=1)) == [0]
    assert outcome(out) == expected


def test_mistakes_are_found_before_processes_meet(tmp_path, monkeypatch, refused):
    """Nobody would answer: the others are not there."""
    text, out = write_text(tmp_path), tmp_path / "out"

    def message(size, *arguments):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("RANK", "0")
        given = ["--out", out, "--text", text, *TINY, *OPTIONS, *arguments]
        sentence = refused("train", *given)
        assert not out.exists()
        return sentence

    for size, arguments, expected in (
        (3, ["--pipeline=2"], "--pipeline 2 needs 2 processes, and there are 3"),
        (2, ["--schedule=GPipe"], "--schedule GPipe needs --pipeline"),
        (2, ["--virtual=2"], "--virtual 2 needs --pipeline"),
        (2, ["--pipeline=2", "--virtual=2"], "--virtual is 2, expected 1: .* --schedule 1F1B"),
        (3, ["--pipeline=3", "--schedule=DualPipeV"], "makes 6 stages, and the model has 4 layers"),
        (
            4,
            ["--pipeline=4", "--gradient-accumulation=2"],
            "--gradient-accumulation 2: .* 4 stages",
        ),
        (
            2,
            ["--pipeline=2", "--schedule=ZBVZeroBubble", "--compile"],
            "--compile does not go with --schedule ZBVZeroBubble",
        ),
        (
            2,
            ["--pipeline=2", "--schedule=DualPipeV", "--activation-checkpointing"],
            "--activation-checkpointing does not go with --schedule DualPipeV",
        ),
    ):
        assert re.search(expected, message(size, *arguments))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    given = ["--out", out, "--text", text, *TINY, *OPTIONS, "--pipeline=2"]
    assert "--pipeline 2 needs 2 processes, and there is 1" in refused("train", *given)


def test_schedules_and_their_microbatches():
    config = presets("tiny")

    def parts(count):
        return Settings(gradient_accumulation=count)

    for schedule, virtual, microbatches, message in (
        ("Interleaved1F1B", 1, 4, "--virtual is 1, expected at least 2"),
        ("ZBVZeroBubble", 3, 4, "--virtual is 3, expected 2"),
        ("DualPipeV", None, 3, "needs a microbatch for each of 4 stages"),
        ("Interleaved1F1B", None, 5, "make it a multiple of 2"),
    ):
        with pytest.raises(UserError, match=message):
            Split.of(2, virtual, schedule).check(config, parts(microbatches), 2)
    tied = KimiLinearConfig.from_dict({**config.to_dict(), "tie_word_embeddings": True})
    with pytest.raises(UserError, match="tie_word_embeddings is set"):
        Split.of(2, None, "GPipe").check(tied, parts(1), 2)
    for schedule, microbatches in (("GPipe", 1), ("ZBVZeroBubble", 1), ("Interleaved1F1B", 3)):
        Split.of(2, None, schedule).check(config, parts(microbatches), 2)
