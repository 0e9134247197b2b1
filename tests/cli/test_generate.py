import json
import shutil

import pytest
import torch

from attnres_ext.cli.main import main
from attnres_ext.training.checkpoint import find_arm, load_model
from attnres_ext.training.tokenizer import decode

from .conftest import tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of each tokenizer with all residual modes, trained long enough to be opinionated."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("".join(f"naïve {i % 9} ∑ größer als {i % 7};\n" for i in range(900)))
    runs = {}
    for kind in ("byte", "bpe"):
        runs[kind] = folder / kind
        argv = ["train", "--out", runs[kind], "--text", text, "--preset", "tiny", "--steps", 12]
        argv += ["--sequence-length", 32, "--batch-size", 4, "--warmup-steps", 2]
        argv += ["--validation-batches", 1, "--tokenizer", kind, "--vocab-size", 320]
        argv += ["--residual", "standard,block,full", "--learning-rate", 0.01]
        assert main([str(argument) for argument in argv]) == 0
    return runs


def generate(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("arm", ["standard", "block", "full"])
def test_text_is_that_of_the_full_forward(trained, capsys, kind, arm):
    folder = find_arm(trained[kind], arm)
    model, tokenizer = load_model(folder, "cpu")
    assert model.config.residual == arm
    tokens = tokenizer.encode("naïve 3".encode()).tolist()
    expected = []
    with torch.no_grad():
        for _ in range(24):
            token = model(torch.tensor([tokens + expected])).logits[0, -1].argmax().item()
            expected.append(token)
    if tokenizer.end in expected:
        expected = expected[: expected.index(tokenizer.end)]
    arguments = ["--prompt", "naïve 3", "--temperature", 0, "--max-new-tokens", 24]
    text = generate(capsys, "--checkpoint", trained[kind], "--arm", arm, *arguments)
    assert text == decode(tokenizer, tokens + expected) + "\n"


def test_seeds_repeat_and_differ(trained, capsys):
    argv = ["--checkpoint", trained["byte"], "--prompt", "a", "--temperature", 1, "--seed"]
    first = generate(capsys, *argv, 5, "--max-new-tokens", 30)
    assert generate(capsys, *argv, 5, "--max-new-tokens", 30) == first
    assert generate(capsys, *argv, 6, "--max-new-tokens", 30) != first


def test_prompt_from_standard_input_and_none_at_all(trained, capsys, monkeypatch):
    import io
    from types import SimpleNamespace

    stdin = SimpleNamespace(buffer=io.BytesIO("größer".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    argv = ["--checkpoint", trained["byte"], "--max-new-tokens", 2]
    assert generate(capsys, *argv, "--prompt", "-").startswith("größer")
    assert generate(capsys, *argv).endswith("\n")
    assert generate(capsys, *argv, "--prompt", "x", "--max-new-tokens", 0) == "x\n"


def test_an_arm_folder_is_enough_on_its_own(trained, capsys, tmp_path):
    alone = tmp_path / "model"
    shutil.copytree(find_arm(trained["bpe"], "full"), alone)
    (alone / "optimizer.safetensors").unlink()
    argv = ["--prompt", "naïve", "--max-new-tokens", 8, "--temperature", 0]
    expected = generate(capsys, "--checkpoint", trained["bpe"], "--arm", "full", *argv)
    assert generate(capsys, "--checkpoint", alone, *argv) == expected


def test_refusals(trained, refused, tmp_path):
    run = trained["byte"]
    before = tree(run)
    assert "does not exist" in refused("generate", "--checkpoint", tmp_path / "nowhere")
    assert "holds no checkpoint" in refused("generate", "--checkpoint", tmp_path)
    assert "--arm mini is not in" in refused("generate", "--checkpoint", run, "--arm", "mini")
    sentence = refused("generate", "--checkpoint", run, "--prompt", "x" * 400)
    assert "--prompt has 400 tokens; with --max-new-tokens 300" in sentence
    assert "512" in sentence
    assert "at least 0" in refused("generate", "--checkpoint", run, "--temperature", "-1")
    assert "--device abacus" in refused("generate", "--checkpoint", run, "--device", "abacus")
    sentence = refused("generate", "--checkpoint", trained["bpe"], "--prompt", "\udcff")
    assert "--prompt is not UTF-8" in sentence
    assert tree(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("whole_run", [True, False])
def test_damaged_checkpoints(trained, refused, tmp_path, name, whole_run):
    copy = tmp_path / "copy"
    shutil.copytree(trained["byte"] if whole_run else find_arm(trained["byte"], "block"), copy)
    file = find_arm(copy, "block") / name
    for content in (file.read_bytes()[: file.stat().st_size // 2], b"", b"{}"):
        file.write_bytes(content)
        assert name in refused("generate", "--checkpoint", copy)


def test_configuration_of_another_model(trained, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(find_arm(trained["byte"], "block"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    sentence = refused("generate", "--checkpoint", copy)
    assert "model.safetensors cannot be loaded" in sentence
