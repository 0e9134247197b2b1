"""Training in several processes, as torchrun starts them, over gloo on the CPU."""

import os
import signal
import time

import pytest
import torch

from attnres_ext.cli import train_run
from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets
from attnres_ext.models.kimi_linear.shards import gathered, is_shard
from attnres_ext.training.data import read_text, tokenize
from attnres_ext.training.distributed import joined
from attnres_ext.training.loop import build_arms, train
from attnres_ext.training.settings import Settings
from attnres_ext.training.tokenizer import ByteTokenizer

from .conftest import TINY, metrics, tree, write_text
from .processes import finish, start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def make_model(residual, **changes):
    return KimiLinearForCausalLM(presets("tiny", vocab_size=257, residual=residual, **changes))


# In the second, most experts have no token in a process, and others in the other one.
@pytest.mark.parametrize(
    ("modes", "changes"),
    [
        (("standard", "block", "full"), {}),
        (("block",), {"tie_word_embeddings": True, "num_experts": 64, "num_experts_per_token": 1}),
    ],
    ids=["modes", "tied, many experts"],
)
def test_shards_train_like_one_process(text, tmp_path, modes, changes):
    """Losses, gradient norms and weights of every mode; a processor's share is half a batch."""
    settings = Settings(
        residuals=modes, steps=3, batch_size=4, sequence_length=24,
        warmup_steps=1, validation_batches=1, validate_every=3, gradient_accumulation=2,
    )  # fmt: skip
    corpus = tokenize(read_text(text), ByteTokenizer(), settings.sequence_length)

    def run():
        with joined("cpu") as world:
            arms = build_arms(settings, lambda mode: make_model(mode, **changes), world)
            steps = list(train(arms, corpus, settings, 1, world))
            weights = {
                f"{arm.name}:{name}": gathered(tensor).clone()
                for arm in arms
                for name, tensor in arm.model.state_dict().items()
            }
            if world.size > 1:
                for arm in arms:
                    assert all(is_shard(parameter) for parameter in arm.model.parameters())
                    # Half of what there is, moments included.
                    held = sum(p.to_local().numel() for p in arm.model.parameters())
                    assert held <= 0.55 * arm.num_parameters
                    for state in arm.optimizer.state.values():
                        assert is_shard(state["exp_avg"])
            figures = [
                [value for value in (r.loss, r.val_loss, r.grad_norm) if value is not None]
                for records in steps
                for r in records
            ]
            if world.leads:
                torch.save((figures, weights), tmp_path / f"{world.size}.pt")
        return 0

    run()
    assert finish(start(run)) == [0, 0]
    (figures, weights), (sharded_figures, sharded_weights) = (
        torch.load(tmp_path / f"{size}.pt") for size in (1, 2)
    )
    for one, two in zip(figures, sharded_figures, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    # AdamW's first steps are the rate times a sign: where a gradient is mere rounding, two runs
    # part by up to twice the rates so far.
    assert weights.keys() == sharded_weights.keys()
    for name, tensor in weights.items():
        difference = (tensor - sharded_weights[name]).abs()
        assert difference.max() <= 2 * 3 * settings.learning_rate, name
        assert difference.mean() <= 0.02 * settings.learning_rate, name


# One arm, and bfloat16 and recomputation on top of shards: what differs most from plain training.
OPTIONS = ["--residual=block", "--batch-size=4", "--steps=4", "--validation-batches=1"]
OPTIONS += ["--validate-every=4", "--precision=bfloat16", "--activation-checkpointing"]


def command(out, text, *arguments):
    argv = ["train", "--out", str(out), "--text", str(text), *TINY, *OPTIONS, *arguments]

    def run():
        train_run._plot = lambda *_: None
        return main(argv)

    return run


def weights_of(out):
    (folder,) = (out / "checkpoints").iterdir()
    return {
        name: content for name, content in tree(folder).items() if name.suffix == ".safetensors"
    }


def test_resume_after_kill_9(tmp_path, capfd):
    text = write_text(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(command(whole, text))) == [0, 0]
    # One process talks.
    assert capfd.readouterr().err.count("step     4/4") == 1

    children = start(command(killed, text))
    deadline = time.monotonic() + 60
    lines = killed / "metrics.jsonl"
    while time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert finish(children) == [-signal.SIGKILL] * 2
    assert finish(start(command(killed, text, "--resume"))) == [0, 0]
    assert metrics(killed, without=("ms",)) == metrics(whole, without=("ms",))
    assert weights_of(killed) == weights_of(whole)
    assert not [path for path in killed.rglob("*") if path.name.startswith(".")]
    # One process goes on with what two have saved.
    assert main(["generate", "--checkpoint", str(killed), "--max-new-tokens=2"]) == 0


def test_mistakes_are_said_once_and_leave_nothing(tmp_path, capfd):
    text = write_text(tmp_path)
    out = tmp_path / "out"
    for arguments, message in (
        (["--batch-size=3"], "--batch-size 3 cannot be shared out evenly: 2 processes"),
        (["--device=cpu:0"], "under torchrun each process takes its own of --device cpu"),
        (["--text=nowhere"], "--text nowhere does not exist"),
    ):
        assert finish(start(command(out, text, *arguments))) == [2, 2]
        error = capfd.readouterr().err
        assert error.count("attnres train: ") == 1
        assert message in error
        assert not out.exists()
