import json

import pytest
import torch

from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets


def info(capsys, *arguments):
    assert main(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_versions_binaries_and_devices(capsys):
    facts = json.loads(info(capsys, "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["binaries"]["operators"].endswith("_ops.so")
    assert facts["binaries"]["operators bytes"] > 0
    assert facts["cpu"]["cores"] >= 1
    assert facts["cpu"]["instruction set"] in ("baseline", "avx2", "avx512", "armv86")
    assert isinstance(facts["cuda"]["architectures"], list)
    assert "plan" not in facts


def test_plan_for_a_shape(capsys):
    facts = json.loads(info(capsys, "--json", "--shape", "9,6,8192,2304", "--dtype", "bfloat16"))
    plans = facts["plan"]["plans"]
    names = {"cpu", "cuda 9.0"}
    if torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        names = {"cpu", *(f"cuda {major}.{minor}" for major, minor in capabilities)}
    assert {(plan["device"], plan["for"]) for plan in plans} == {
        (name, use) for name in names for use in ("inference", "training")
    }
    for plan in plans:
        assert 0 < plan["bytes, two phases"] < plan["bytes, single pass"]
    # Bytes follow the dtype.
    wide = json.loads(info(capsys, "--json", "--shape", "9,6,8192,2304", "--dtype", "float32"))
    assert wide["plan"]["plans"][0]["bytes, two phases"] == 2 * plans[0]["bytes, two phases"]


def test_kernels_for_a_shape(capsys, monkeypatch):
    def kernels(dtype="bfloat16"):
        facts = json.loads(info(capsys, "--json", "--shape", "10,6,8192,2304", "--dtype", dtype))
        return {
            row["operator"]: (row["forward"], row["backward"]) for row in facts["plan"]["kernels"]
        }

    if not torch.cuda.is_available():
        assert kernels() == {
            "depth_attention": (
                "warps=12,columns=192,cluster=1,stages=4,ctas=1",
                "warps=12,columns=192,cluster=1,stages=3,ctas=1",
            ),
            "accumulate_depth_attention": (
                "warps=12,columns=192,cluster=1,stages=3,ctas=1",
                "general body",
            ),
            "inter_block_attention": (
                "inter_block_warps=12,inter_block_columns=192,inter_block_cluster=1,"
                "inter_block_tokens=1,inter_block_stages=3,inter_block_ctas=1",
                "general body",
            ),
            "merge_partial": ("warps=3,chunks=3,teams=5", "warps=5,chunks=2,teams=3"),
        }
    assert set(kernels("float32").values()) == {("general body", "general body")}
    monkeypatch.setenv("ATTNRES_CUDA_CONFIG", "depth_attention=rows,inter_block_attention=rows")
    assert {forward for forward, _ in kernels().values()} == {"general body"}


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
    assert "--dtype is 'int8', expected one of float32" in refused("info", "--dtype", "int8")


def state(capsys, *arguments):
    facts = json.loads(info(capsys, "--json", "--model", *map(str, arguments)))
    return {part["part"]: part["bytes"] for part in facts["state"]["parts"]}


def test_state_of_a_decoder(capsys, tmp_path):
    short = state(capsys, "48b", "--length", 1000)
    long = state(capsys, "48b", "--length", 100_000)
    # 20 layers of 32 heads, 128 x 128 each, in float32; 7 layers of 512 + 64 numbers a token.
    assert short["KDA memories"] == long["KDA memories"] == 20 * 32 * 128 * 128 * 4
    assert long["MLA latents"] == 7 * 576 * 2 * 100_000
    # Ten slots of a token, and a reciprocal RMS each; it knows neither tokens nor layers.
    assert short["block cache"] == long["block cache"] == 10 * (2304 * 2 + 4)
    values = presets("tiny").to_dict()
    sizes = []
    for layers in (4, 8, 16):
        linear = values["linear_attn_config"] | {
            "kda_layers": list(range(1, layers)), "full_attn_layers": [layers]
        }  # fmt: skip
        deep = values | {"num_hidden_layers": layers, "linear_attn_config": linear}
        (tmp_path / "config.json").write_text(
            json.dumps(deep | {"sublayers_per_block": layers // 2})
        )
        sizes.append(state(capsys, tmp_path / "config.json", "--length", 64, "--batch-size", 3))
    assert len({size["block cache"] for size in sizes}) == 1
    assert sizes[0]["KDA memories"] < sizes[1]["KDA memories"] < sizes[2]["KDA memories"]
    text = info(capsys, "--model", "tiny", "--length", "64", "--residual", "full")
    assert "tiny, full residual, 4 layers, 1 x 64 tokens, bfloat16" in text
    assert "block cache" in text


def test_state_is_what_a_decoder_holds(capsys):
    sizes = state(capsys, "tiny", "--length", 32, "--batch-size", 2, "--dtype", "float32")
    model = KimiLinearForCausalLM(presets("tiny"))
    held = model.new_state(2, 32)
    tensors = [tensor for layer in held.layers for tensor in vars(layer).values()]
    layers = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert sum(sizes.values()) == layers + held.block_cache.nbytes


def test_bad_models(refused, tmp_path):
    assert "is no preset (tiny, demo, small, 48b)" in refused("info", "--model", "huge")
    path = tmp_path / "config.json"
    path.write_text("{")
    assert "is not JSON" in refused("info", "--model", path)
    path.write_bytes(b"\xff\xfe{}")
    assert "--model" in refused("info", "--model", path)
    path.write_text(json.dumps(presets("tiny").to_dict() | {"sublayers_per_block": 0}))
    assert "sublayers_per_block is 0" in refused("info", "--model", path)
    assert "model_max_length" in refused("info", "--model", "tiny", "--length", 513)
    assert "--residual is 'ring', expected one of" in refused(
        "info", "--model", "tiny", "--residual", "ring"
    )
