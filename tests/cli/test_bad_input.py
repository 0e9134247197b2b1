"""What cannot work: a sentence, exit code 2, nothing written and nothing overwritten."""

import json
import shutil

import pytest

from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import presets

from .conftest import TINY, tree, write_text

ARGUMENTS = [argument for argument in TINY if not argument.startswith("--preset")]


def changed(**changes):
    return json.dumps(presets("tiny").to_dict() | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "holds a list"),
        (b"\xff\xfe{}", "config.json"),
        (b"", "is not JSON"),
        (b"{}", "linear_attn_config is None"),
        (changed(sublayers_per_block=0), "sublayers_per_block is 0"),
        (changed(attn_res_block_size=0), "attn_res_block_size is 0"),
        (changed(sublayers_per_block=9), "from 1 to 8: the sublayers of the model"),
        (changed(num_hidden_layers=5), "expected each of the layers 1 to 5"),
        (changed(hidden_sise=8), "hidden_sise is not a known field; did you mean hidden_size?"),
        (changed(residual="blocks"), "expected one of standard, block, full"),
        (changed(num_experts_per_token=5), "from 1 to 4, as num_experts is 4"),
        (changed(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (changed(hidden_size="wide"), "hidden_size is 'wide', expected a positive integer"),
    ],
)
def test_configurations(refused, tmp_path, content, message):
    text, config = write_text(tmp_path), tmp_path / "config.json"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(tmp_path)
    out = tmp_path / "run"
    arguments = ["--out", out, "--text", text, "--config", config, *ARGUMENTS]
    assert message in refused("train", *arguments)
    assert tree(tmp_path) == before
    assert not out.exists()


def test_configurations_that_are_not_there(refused, tmp_path):
    out = tmp_path / "run"
    for config in (tmp_path / "none.json", tmp_path):
        sentence = refused("train", "--out", out, "--config", config, *ARGUMENTS)
        assert "cannot be read: No such file" in sentence
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"abc", "has"),
        ("folder/binary.bin", b"\0\1\2" * 100, "holds no text"),
        ("folder/.hidden.txt", b"text " * 100, "holds no text"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_texts(refused, tmp_path, name, content, message, tokenizer):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    before = tree(tmp_path)
    text = path.parent if path.parent != tmp_path else path
    out = tmp_path / "run"
    arguments = ["--out", out, "--text", text, *TINY, "--tokenizer", tokenizer]
    assert message in refused("train", *arguments)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    argv = ["train", "--out", folder / "run", "--text", write_text(folder), *TINY, "--steps=2"]
    assert main([*map(str, argv), "--residual=block"]) == 0
    return folder


FILES = ["config.json", "tokenizer.json", "model.safetensors", "../manifest.json"]
DAMAGES = {
    "gone": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "other": lambda content: b"[]",
}


@pytest.mark.parametrize("command", ["generate", "inspect", "resume"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(refused, trained, tmp_path, command, damage):
    """Every file of a checkpoint, damaged in every way, in front of every command that reads it."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (arm,) = run.glob("checkpoints/*/block-seed0")
    commands = {
        "generate": ["generate", "--checkpoint", run],
        "inspect": ["inspect", run, "--text", trained / "text.py", "--out", tmp_path / "depth"],
        "resume": ["train", "--out", run, "--resume"],
    }
    for name in FILES:
        path = arm / name
        content = path.read_bytes()
        if DAMAGES[damage] is None:
            path.unlink()
        else:
            path.write_bytes(DAMAGES[damage](content))
        if (name, damage) == ("../manifest.json", "flipped"):
            path.write_bytes(content.replace(b'"bytes": ', b'"bytes": 1', 1))
        before = tree(run)
        refused(*commands[command])
        assert tree(run) == before
        assert not (tmp_path / "depth").exists()
        path.write_bytes(content)


def test_prompts_that_are_too_long(refused, trained):
    run = trained / "run"
    for count, new in ((513, 0), (212, 301)):
        sentence = refused(
            "generate", "--checkpoint", run, "--prompt", "x" * count, "--max-new-tokens", new
        )
        assert f"--prompt has {count} tokens" in sentence
        assert "than the 512 the model was made for" in sentence


def test_a_folder_that_cannot_be_made(capsys):
    assert main(["train", "--preset", "tiny", "--steps", "1", "--out", "/dev/null/run"]) == 2
    printed = capsys.readouterr().err
    assert "attnres train: --out /dev/null/run cannot be made: Not a directory\n" in printed
