"""``attnres plan-pipeline``: tables, JSON, picture, and what it refuses."""

import json

import pytest
from matplotlib import image

from attnres_ext.cli.main import main
from attnres_ext.cli.pipeline_display import spans
from attnres_ext.parallel import place_stages, plan_pipeline

K3 = ["--layers=93", "--sublayers-per-block=24", "--hidden-size=7168"]


def plan(capsys, *arguments):
    assert main(["plan-pipeline", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_tables(capsys):
    shown = plan(
        capsys, *K3, "--pipeline=4", "--virtual=2", "--cache=received", "--microbatches=8",
        "--world-size=16",
    )  # fmt: skip
    assert "186 sublayers, blocks of 24, D=7168 bfloat16, microbatches of 4,096 tokens" in shown
    rows = [line.split() for line in shown.splitlines()]
    # A tensor is 58.720256 MB; 25 of 35 are sent.
    assert ["forward", "25", "1,468.0", "11,744.1", "4"] in rows
    assert ["backward", "35", "2,055.2", "16,441.7", "8"] in rows
    assert ["one", "way", "without", "a", "cache", "35", "2,055.2", "16,441.7", "8"] in rows
    assert any(row[-4:] == ["28", "1,644.2", "13,153.3", "4"] for row in rows)
    assert ["4", "0", "96–119", "1–3", "0", "4", "–", "0–3", "4", "5"] in rows


def test_json_is_the_plan(capsys):
    facts = json.loads(plan(capsys, "--model=tiny", "--pipeline=2", "--split=1,3", "--json"))
    expected = plan_pipeline(8, 4, (0, 2), place_stages(2, 1))
    assert facts["hash"] == expected.hash
    assert facts["bytes of a tensor"] == 4096 * 32 * 2
    assert facts["plan"]["hops"][0] == {
        "index": 0, "sender": 0, "receiver": 1, "blocks": [0], "closed": [0], "gradients": [0],
    }  # fmt: skip
    split = ["--split-sublayers=2,6", "--pipeline=2", "--model=tiny", "--json"]
    assert json.loads(plan(capsys, *split))["hash"] == expected.hash


@pytest.mark.parametrize(
    ("residual", "tensors"), [("standard", 1), ("full", 1 + 4), ("block", 1 + 1)]
)
def test_residuals(capsys, residual, tensors):
    facts = json.loads(
        plan(capsys, "--model=tiny", "--residual", residual, "--pipeline=2", "--json")
    )
    assert facts["traffic"]["forward"] == tensors


def test_picture(capsys, tmp_path):
    out = tmp_path / "plan.png"
    shown = plan(
        capsys, *K3, "--pipeline=4", "--virtual=2", "--placement=v", "--out", out,
        "--gradients=gathered",
    )  # fmt: skip
    assert f"the picture is {out}" in shown
    pixels = image.imread(out)[..., :3]
    for colour in ((0, 0x72, 0xB2), (0, 0x9E, 0x73), (0xD5, 0x5E, 0)):  # each way to get a block
        assert (abs(pixels - [c / 255 for c in colour]).max(-1) < 0.01).sum() > 1000
    # Of the whole picture, nothing but the sum for the standard residual.
    plan(capsys, "--model=tiny", "--residual=standard", "--pipeline=2", "--out", out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pipeline=2"], "give either --model, or --layers"),
        (["--pipeline=2", "--model=tiny", "--layers=3"], "give either --model, or --layers"),
        (["--pipeline=2", "--layers=3", "--hidden-size=2"], "--layers needs --sublayers-per-block"),
        (["--pipeline=2", "--layers=3"], "--layers needs --hidden-size"),
        (["--pipeline=2", "--model=tiny", "--hidden-size=3"], "go with --layers"),
        (["--pipeline=2", "--model=huge"], "--model huge is no preset"),
        (
            ["--pipeline=4", "--virtual=2", "--model=tiny"],
            "num_layers is 4, expected at least one for each of 8 stages",
        ),
        (
            ["--pipeline=2", "--model=tiny", "--world-size=5"],
            "world size is 5, expected a multiple of the pipeline's 2 ranks",
        ),
        (["--pipeline=2", "--model=tiny", "--split=1,2,1"], "--split has 3 stages, expected 2"),
        (["--pipeline=2", "--model=tiny", "--split=1,2"], "adds up to 3 layers, expected the mod"),
        (
            ["--pipeline=2", "--model=tiny", "--split-sublayers=1,2"],
            "--split-sublayers adds up to 3 sublayers, expected the model's 8",
        ),
        (["--pipeline=3", "--model=tiny", "--split=2,0,2"], "stage 1 begins at site 4 and ends be"),
        (["--pipeline=2", "--model=tiny", "--split=2,x"], "--split is 'x', expected an integer"),
        (["--pipeline=0", "--model=tiny"], "--pipeline is '0', expected a positive integer"),
        (["--pipeline=2", "--model=tiny", "--out=plan.pdf"], "expected one in .png"),
        (["--pipeline=2", "--model=tiny", "--out=/nowhere/plan.png"], "there is no folder /nowher"),
    ],
)
def test_refused(refused, arguments, sentence):
    assert sentence in refused("plan-pipeline", *arguments)


def test_spans():
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert spans([]) == "–"
