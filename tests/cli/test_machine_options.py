"""Options that change how a step is computed, but not what is learnt."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch

from attnres_ext.cli import train_run
from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets
from attnres_ext.training.data import read_text, tokenize
from attnres_ext.training.distributed import World
from attnres_ext.training.loop import build_arms, train
from attnres_ext.training.preparation import prepare
from attnres_ext.training.settings import Settings
from attnres_ext.training.tokenizer import ByteTokenizer

from .conftest import TINY, metrics, tree, write_text

SETTINGS = Settings(
    residuals=("standard", "block", "full"),
    steps=3,
    batch_size=4,
    sequence_length=24,
    warmup_steps=1,
    validation_batches=1,
)

OPTIONS = [
    "--precision=bfloat16", "--activation-checkpointing", "--gradient-accumulation=2", "--compile"
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text"))
    return tokenize(read_text(text), ByteTokenizer(), SETTINGS.sequence_length)


def make_model(residual):
    return KimiLinearForCausalLM(presets("tiny", vocab_size=257, residual=residual))


# A sublayer of each kind that is compiled whole, and few tokens: tracing is what takes time.
SHALLOW = presets(
    "tiny",
    vocab_size=257,
    num_hidden_layers=2,
    num_experts=None,
    linear_attn_config={
        "kda_layers": [1], "full_attn_layers": [2], "num_heads": 1, "head_dim": 8, "chunk_size": 2,
    },
)  # fmt: skip


def losses(corpus, make_model=make_model, **changes):
    """Loss and gradient norm of every step of every arm, and the arms."""
    settings = dataclasses.replace(SETTINGS, **changes)
    arms = build_arms(settings, make_model)
    records = [record for step in train(arms, corpus, settings, 1) for record in step]
    return [value for r in records if r.loss for value in (r.loss, r.grad_norm)], arms


@pytest.fixture(scope="module")
def plain(corpus):
    return losses(corpus)[0]


def test_activation_checkpointing_learns_the_same(corpus, plain):
    assert losses(corpus, activation_checkpointing=True)[0] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("mode", ["standard", "block", "full"])
def test_activation_checkpointing_keeps_less(mode):
    kept = {}
    for wanted in (False, True):
        model = make_model(mode)
        model.model.checkpoint_sublayers = wanted
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.arange(400).view(2, 200) % 257).logits.sum()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept[wanted] = sum(size for place, size in storages.items() if place not in own)
        loss.backward()
    assert kept[True] < kept[False] / 3


def test_parts_of_a_batch_learn_like_the_whole(corpus, plain):
    for parts in (2, 4):
        assert losses(corpus, gradient_accumulation=parts)[0] == pytest.approx(plain, rel=1e-4)


def test_bfloat16_stays_near_float32_and_leaves_weights_alone(corpus, plain):
    narrow, arms = losses(corpus, precision="bfloat16")
    assert narrow != plain
    # Eight bits a number. Later gradients are those of other weights.
    assert narrow[::2] == pytest.approx(plain[::2], rel=0.02)
    assert narrow[1:6:2] == pytest.approx(plain[1:6:2], rel=0.05)
    for arm in arms:
        assert {parameter.dtype for parameter in arm.model.parameters()} == {torch.float32}
        states = arm.optimizer.state.values()
        assert {state["exp_avg"].dtype for state in states} == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert arm.model.model(torch.zeros(1, 8, dtype=torch.long)).dtype == torch.bfloat16


@pytest.fixture
def traced(monkeypatch):
    """Compiles without a code generator, whose C++ would take minutes."""
    compiled = []
    compile = torch.nn.Module.compile

    def trace(module, **options):
        compiled.append(module)
        compile(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    yield compiled
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_sublayers_learn_like_plain_ones(corpus, traced):
    one_arm = {"residuals": ("block",), "steps": 1, "sequence_length": 4}
    one_arm["make_model"] = lambda mode: KimiLinearForCausalLM(SHALLOW.replace(residual=mode))
    expected, _ = losses(corpus, **one_arm)
    assert losses(corpus, compile=True, **one_arm)[0] == pytest.approx(expected, rel=1e-4)
    names = {type(module).__name__ for module in traced}
    assert names == {"KimiDeltaAttention", "KimiMLAAttention", "KimiMLP"}
    traced.clear()
    prepare(make_model("block"), World(), compile=True, activation_checkpointing=False)
    # Where tokens go decides shapes: experts stay as they are.
    assert names | {"KimiRouter"} == {type(module).__name__ for module in traced}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process")
@pytest.mark.parametrize(
    "option",
    [
        "--precision=bfloat16",
        "--activation-checkpointing",
        "--gradient-accumulation=2",
        "--compile",
    ],
)
def test_resume_after_kill_9(tmp_path, monkeypatch, option, request):
    if option == "--compile":
        request.getfixturevalue("traced")
    monkeypatch.setattr(train_run, "_plot", lambda *_: None)
    text = str(write_text(tmp_path))
    options = ["--residual=block", "--steps=4", "--validate-every=4", "--validation-batches=1"]
    config = tmp_path / "config.json"
    values = SHALLOW.to_dict()
    if option == "--compile":  # KDA's tracing takes longer than everything else
        values["linear_attn_config"] |= {"kda_layers": [], "full_attn_layers": [1, 2]}
    config.write_text(json.dumps(values))
    options += [f"--config={config}", "--sequence-length=8", "--batch-size=2", "--warmup-steps=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", "--text", text, *options, "--checkpoint-every=2", option, "--out"]
    assert main([*argv, str(whole)]) == 0
    child = os.fork()
    if not child:
        main([*argv, str(killed)])
        os._exit(0)
    deadline = time.monotonic() + 60
    lines = killed / "metrics.jsonl"
    while time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    assert metrics(killed, without=("ms",)) == metrics(whole, without=("ms",))
    (first,), (second,) = ((out / "checkpoints").iterdir() for out in (whole, killed))
    names = [name for name in tree(first) if name.suffix == ".safetensors"]
    assert names
    assert all(tree(first)[name] == tree(second)[name] for name in names)


def test_refusals(refused, tmp_path):
    text = write_text(tmp_path)
    start = ["train", "--out", tmp_path / "run", "--text", text, *TINY]
    sentence = refused(*start, "--gradient-accumulation", 3)
    assert "--batch-size 2 cannot be shared out evenly" in sentence
    assert "--precision is 'float8', expected one of float32, bfloat16" in refused(
        *start, "--precision", "float8"
    )
    assert "is '0', expected a pos" in refused(*start, "--gradient-accumulation", 0)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_options(refused, train):
    out = train("--residual", "block", "--steps", 1)
    assert "--compile True differs from False" in refused(
        "train", "--out", out, "--resume", "--compile"
    )
