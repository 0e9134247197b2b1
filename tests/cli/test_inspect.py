import csv
import math

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F

from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets
from attnres_ext.training.inspection import inspect_model

from .conftest import TINY, tree, write_text

FILES = {"depth_attention.png", "by_depth.png", "depth_attention.csv", "sites.csv", "sublayers.csv"}


def make_model(mode, per_block=3):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", residual=mode, sublayers_per_block=per_block))
    with torch.no_grad():
        for query in model.residual.queries:
            query.normal_()
    return model


@pytest.mark.parametrize("mode", ["standard", "block", "full"])
def test_magnitudes_are_those_of_the_definition(mode):
    model = make_model(mode)
    tokens = torch.randint(256, (4, 21))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    result = inspect_model("arm", model, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())

    # All at once, by hooks of this test's own, with gradients kept on the tensors themselves.
    outputs = []

    def keep(module, arguments, output):
        output.retain_grad()
        outputs.append(output)

    modules = [model.model.embed_tokens]
    modules += [m for layer in model.model.layers for m in (layer.self_attn, layer.feed_forward)]
    handles = [module.register_forward_hook(keep) for module in modules]
    logits = model.eval()(inputs).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    assert result.tokens == 80
    assert result.loss == pytest.approx(loss.item() / 80, rel=1e-5)
    assert len(result.depths) == len(outputs) == 9
    sums = {"standard": range(9), "block": (0, 1, 4, 7), "full": range(9)}[mode]
    for index, (depth, output) in enumerate(zip(result.depths, outputs, strict=True)):
        first = 0 if mode == "standard" else max(begin for begin in sums if begin <= index)
        state = torch.stack(outputs[first : index + 1]).sum(0)
        for value, tensor in (
            (depth.output, output), (depth.state, state), (depth.gradient, output.grad),
        ):  # fmt: skip
            assert value == pytest.approx(tensor.square().mean().sqrt().item(), rel=1e-4)
    blocks = [depth.block for depth in result.depths]
    assert blocks == {
        "standard": [None] * 9, "block": [0, 1, 1, 1, 2, 2, 2, 3, 3], "full": list(range(9)),
    }[mode]  # fmt: skip


def test_attention_is_that_of_every_token():
    model = make_model("block")
    tokens = torch.randint(256, (2, 9))
    result = inspect_model("arm", model, [(tokens[:, :-1], tokens[:, 1:])])
    names = [site.name for site in result.sites]
    assert names == [
        "1 kda", "1 mlp", "2 kda", "2 moe", "3 kda", "3 moe", "4 mla", "4 moe", "output"
    ]  # fmt: skip
    assert inspect_model("arm", make_model("standard"), [(tokens, tokens)]).sites == []
    first, last = result.sites[0], result.sites[-1]
    assert (first.entropy, first.evenness, first.weights) == (0, None, [1.0])
    assert last.sources == ["embedding", "block 1", "block 2", "block 3"]
    for site in result.sites[1:]:
        assert sum(site.weights) == pytest.approx(1)
        assert sum(site.top_shares) == pytest.approx(1)
        # Of the mean the entropy is at least the mean entropy.
        most = -sum(weight * math.log(weight) for weight in site.weights)
        assert 0 < site.entropy <= most * (1 + 1e-5)
        assert site.evenness == pytest.approx(site.entropy / math.log(len(site.sources)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    argv = ["train", "--out", folder / "run", "--text", write_text(folder), *TINY, "--steps=2"]
    argv += ["--residual", "standard,block,full", "--seeds", "0,1"]
    assert main([str(argument) for argument in argv]) == 0
    return folder


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_command_writes_tables_and_pictures(trained, tmp_path, capsys):
    out = tmp_path / "depth"
    text = trained / "text.py"
    command = ["inspect", str(trained / "run"), "--text", str(text), "--out", str(out)]
    assert main([*command, "--sequence-length", "32", "--sequences", "5"]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    for name in ("depth_attention.png", "by_depth.png"):
        assert matplotlib.image.imread(out / name).shape[0] > 300
    arms = ["block-seed0", "full-seed0", "standard-seed0"]
    sublayers = table(out / "sublayers.csv")
    assert [(row["arm"], row["name"]) for row in sublayers][::9] == [
        (arm, "embedding") for arm in arms
    ]
    assert all(float(row["gradient_rms"]) > 0 for row in sublayers)
    sites = table(out / "sites.csv")
    assert [row["arm"] for row in sites][::9] == arms[:2]
    cells = table(out / "depth_attention.csv")
    for site in sites:
        weights = {
            cell["source"]: float(cell["mean_weight"])
            for cell in cells
            if (cell["arm"], cell["site"]) == (site["arm"], site["site"])
        }
        assert len(weights) == int(site["sources"])
        assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
        assert site["top"] == max(weights, key=weights.__getitem__)
    printed = capsys.readouterr().out
    for word in ("block-seed0", "entropy", "top source", "gradient", "4 moe", "nats per token"):
        assert word in printed


def test_one_arm_without_attention_and_a_text_shorter_than_a_window(trained, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("To be, or not")
    out = tmp_path / "depth"
    command = ["inspect", str(trained / "run"), "--text", str(text), "--out", str(out)]
    assert main([*command, "--arm", "standard-seed1"]) == 0
    assert {path.name for path in out.iterdir()} == FILES - {"depth_attention.png"}
    assert "13 tokens of short.txt" in capsys.readouterr().out
    assert {row["arm"] for row in table(out / "sublayers.csv")} == {"standard-seed1"}


def test_refusals_write_nothing(trained, refused, tmp_path):
    out, text, run = tmp_path / "depth", trained / "text.py", trained / "run"
    command = ["inspect", run, "--text", text, "--out", out]
    assert "--arm mini is not in" in refused(*command, "--arm", "mini")
    assert "does not exist" in refused("inspect", tmp_path / "nowhere", "--out", out)
    assert "holds no checkpoint" in refused("inspect", tmp_path, "--out", out)
    assert "model_max_length is 512" in refused(*command, "--sequence-length", 513)
    assert "--text nowhere does not exist" in refused(*command, "--text", "nowhere")
    assert "--device abacus" in refused(*command, "--device", "abacus")
    assert "is a file" in refused("inspect", run, "--text", text, "--out", text)
    short = tmp_path / "short.txt"
    short.write_text("To be")
    sentence = refused(*command, "--text", short, "--sequence-length", 32)
    assert "short.txt has 6 tokens, but one window needs 33" in sentence
    assert not out.exists()
    out.mkdir()
    (out / "sites.csv").write_text("mine")
    before = tree(out)
    assert "already holds sites.csv: --overwrite replaces it" in refused(*command)
    assert tree(out) == before


def test_text_that_is_not_utf8(refused, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("größer\n" * 200, encoding="utf-8")
    run = tmp_path / "bpe"
    argv = ["train", "--out", run, "--text", text, *TINY, "--steps=1", "--residual=block"]
    argv += ["--tokenizer=bpe", "--vocab-size=300", "--validation-fraction=0.5"]
    assert main([str(argument) for argument in argv]) == 0
    text.write_bytes(b"gr\xf6sser")
    sentence = refused("inspect", run, "--text", text, "--out", tmp_path / "depth")
    assert "needs UTF-8, but text.txt" in sentence
    assert not (tmp_path / "depth").exists()
