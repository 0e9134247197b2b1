import json

import pytest
import torch

from attnres_ext.cli.main import main


def info(capsys, *arguments):
    assert main(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_versions_binaries_and_devices(capsys):
    facts = json.loads(info(capsys, "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["binaries"]["operators"].endswith("_ops.so")
    assert facts["binaries"]["operators bytes"] > 0
    assert facts["cpu"]["cores"] >= 1
    assert facts["cpu"]["instruction set"] in ("baseline", "avx2", "avx512")
    assert isinstance(facts["cuda"]["architectures"], list)
    assert "plan" not in facts


def test_plan_for_a_shape(capsys):
    facts = json.loads(info(capsys, "--json", "--shape", "9,6,8192,2304", "--dtype", "bfloat16"))
    plans = facts["plan"]["plans"]
    assert {(plan["device"], plan["for"]) for plan in plans} == {
        (device, use) for device in ("cpu", "cuda") for use in ("inference", "training")
    }
    for plan in plans:
        assert 0 < plan["bytes, two phases"] < plan["bytes, single pass"]
    # Bytes follow the dtype.
    wide = json.loads(info(capsys, "--json", "--shape", "9,6,8192,2304", "--dtype", "float32"))
    assert wide["plan"]["plans"][0]["bytes, two phases"] == 2 * plans[0]["bytes, two phases"]


def test_text_says_the_same(capsys):
    text = info(capsys, "--shape", "2,1,1,7168")
    for word in ("versions", "binaries", "cpu", "cuda", torch.__version__, "_ops.so"):
        assert word in text
    assert "plan for N=2 S=1 M=1 D=7168 bfloat16" in text
    assert "single pass" in text


@pytest.mark.parametrize("shape", ["9,6,8192", "9,6,0,2304", "a,b,c,d", ""])
def test_bad_shape(refused, shape):
    assert "--shape" in refused("info", "--shape", shape)


def test_bad_dtype(refused):
    assert "'int8' is not one of float32" in refused("info", "--dtype", "int8")
