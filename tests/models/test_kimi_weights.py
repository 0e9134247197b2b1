"""Weights on disk: public names, round trips, and complete reports of what does not fit."""

import json
import re
import weakref

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from attnres_ext.models.kimi_linear import (
    KimiLinearForCausalLM,
    load_model,
    load_weights,
    presets,
    save_weights,
)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(presets("tiny", **changes))
    with torch.no_grad():
        for parameter in model.residual.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    return model


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


KDA_MATRICES = ("q", "k", "v", "o", "b", "f_a", "f_b", "g_a", "g_b")
KDA_NAMES = [
    "A_log",
    "dt_bias",
    "o_norm.weight",
    *(f"{name}_conv1d.weight" for name in "qkv"),
    *(f"{name}_proj.weight" for name in KDA_MATRICES),
]
MLA_MATRICES = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLA_NAMES = [f"{name}.weight" for name in (*MLA_MATRICES, "kv_a_layernorm")]
LAYER_NAMES = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(
        f"{site}_res_{name}.weight"
        for site in ("self_attention", "mlp")
        for name in ("norm", "proj")
    ),
]
MOE_NAMES = [
    "gate.weight",
    "gate.e_score_correction_bias",
    *(f"experts.{expert}.w{number}.weight" for expert in range(4) for number in (1, 2, 3)),
    *(f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
]


def public_names():
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.output_attn_res_{name}.weight" for name in ("norm", "proj")}
    for layer in range(4):
        attention = MLA_NAMES if layer == 3 else KDA_NAMES
        names |= {f"model.layers.{layer}.self_attn.{name}" for name in attention}
        names |= {f"model.layers.{layer}.{name}" for name in LAYER_NAMES}
        if layer == 0:
            names |= {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        else:
            names |= {f"model.layers.{layer}.block_sparse_moe.{name}" for name in MOE_NAMES}
    return names


@pytest.mark.parametrize("mode", ["block", "full"])
def test_files_carry_the_public_names_and_shapes(tmp_path, mode):
    model = make_model(residual=mode)
    path = save_weights(model, tmp_path)
    tensors = load_file(path)
    assert tensors.keys() == public_names()
    layer = "model.layers.2"
    residual = model.residual
    proj = tensors[f"{layer}.mlp_res_proj.weight"]
    assert torch.equal(proj, residual.queries[5].detach().unsqueeze(0))
    norm = tensors[f"{layer}.self_attention_res_norm.weight"]
    assert torch.equal(norm, residual.key_weights[4])
    assert torch.equal(tensors["model.output_attn_res_proj.weight"][0], residual.queries[8])
    assert tensors[f"{layer}.self_attn.q_conv1d.weight"].shape == (16, 1, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "standard"},
        {"residual": "block"},
        {"residual": "full", "q_lora_rank": 6, "mla_use_output_gate": True},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_round_trip(tmp_path, changes):
    model = make_model(**changes)
    save_weights(model, tmp_path / "deep" / "folder")
    other = load_model(tmp_path / "deep" / "folder")
    assert other.config == model.config
    assert_same(model, other)
    other = make_model(seed=1, **changes)
    load_weights(other, tmp_path / "deep" / "folder" / "model.safetensors")
    assert_same(model, other)


def test_the_state_dict_round_trips_in_memory():
    model, other = make_model(), make_model(seed=1)
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


def test_public_variants_are_read(tmp_path):
    """Kimi Linear's A_log has four dimensions; Kimi K3 pads it and nests the model in another."""
    model = make_model()
    tensors = load_file(save_weights(model, tmp_path))
    heads = model.config.linear_attn_config.num_heads
    public = {}
    for name, tensor in tensors.items():
        if name.endswith("layers.0.self_attn.A_log"):
            assert tensor.shape == (1, 1, heads, 1)
        elif name.endswith("layers.1.self_attn.A_log"):
            tensor = tensor.flatten()
        elif name.endswith(".A_log"):
            tensor = torch.cat([tensor.flatten(), torch.full((7,), float("nan"))])
        elif name.endswith("mlp_res_proj.weight"):
            tensor = tensor[0]
        public[f"language_model.{name}"] = tensor.contiguous()
    save_file(public, tmp_path / "public.safetensors")
    other = make_model(seed=1)
    load_weights(other, tmp_path / "public.safetensors")
    assert_same(model, other)


def test_large_models_are_saved_in_several_files(tmp_path):
    model = make_model()
    save_weights(model, tmp_path)
    path = save_weights(model, tmp_path, max_shard_bytes=50_000)
    assert path.name == "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    assert weight_map.keys() == public_names()
    files = sorted(set(weight_map.values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {name for name, place in weight_map.items() if place == file}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000
    # Nothing is left of the single file, nor of the several once there is a single one again.
    assert {file.name for file in tmp_path.iterdir()} == {*files, "config.json", path.name}
    assert_same(model, load_model(tmp_path))
    other = make_model(seed=3)
    save_weights(other, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same(other, load_model(tmp_path))


def test_a_failed_save_in_several_files_leaves_the_old_ones(tmp_path, monkeypatch):
    save_weights(make_model(), tmp_path, max_shard_bytes=50_000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def fail(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("disk full")
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr("attnres_ext.models.kimi_linear.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(make_model(seed=1), tmp_path, max_shard_bytes=50_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("spelling", "names"),
    [
        ("fla", {"layers.2.attn_res_proj", "layers.0.mlp_res_norm", "res_proj", "res_norm"}),
        ("torchtitan", {"layers.2.attention_res_norm", "layers.3.ffn_res_proj", "output_res_norm"}),
        ("k3", {"layers.2.self_attention_res_proj", "output_attn_res_norm"}),
    ],
)
def test_residual_parameters_in_every_spelling(tmp_path, spelling, names):
    model = make_model()
    path = save_weights(model, tmp_path, residual_names=spelling)
    assert {f"model.{name}.weight" for name in names} <= load_file(path).keys()
    assert len(load_file(path)) == len(public_names())
    assert_same(model, load_model(tmp_path))


@pytest.mark.parametrize("residual", ["block", "standard"])
def test_modules_of_flash_linear_attention_read_for_the_next_sublayer(tmp_path, residual):
    """And bring its norm along: query, key_norm and norm of a sublayer are those of the next site;
    the first one also has input_query, input_key_norm and input_norm, of its own."""
    model = make_model(residual=residual)
    layers, norm = model.model.layers, model.model.norm
    norms = [n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)] + [norm]
    with torch.no_grad():
        for each in norms:
            each.weight.uniform_()
    tensors = load_file(save_weights(model, tmp_path, residual_names="fla_residuals"))
    first = "model.layers.0.residual_attn.input_"
    sublayers = [f"model.layers.{i}.residual_{kind}." for i in range(4) for kind in ("attn", "mlp")]
    spelt = {"norm": norms}
    if residual == "block":
        queries = [query.unsqueeze(0) for query in model.residual.queries]
        spelt |= {"query": queries, "key_norm": model.residual.key_weights}
    for name, values in spelt.items():
        for stem, value in zip([first, *sublayers], values, strict=True):
            assert torch.equal(tensors.pop(f"{stem}{name}.weight"), getattr(value, "weight", value))
    assert not any("layernorm.weight" in n and "kv_a" not in n for n in tensors)
    assert not any("residual_" in name for name in tensors)
    assert_same(model, load_model(tmp_path))


def test_an_unknown_spelling_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"spelt 'jax'; they can be spelt k3, fla, fla_residuals"):
        save_weights(make_model(), tmp_path / "new", residual_names="jax")
    assert not (tmp_path / "new").exists()


def test_loading_holds_one_file_and_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Beside the model itself; counted in what safetensors hands out."""
    save_weights(make_model(), tmp_path, max_shard_bytes=50_000)
    files, tensors, most = [], [], 0

    class Counting:
        def __init__(self, path, **kwargs):
            self._file = safe_open(path, **kwargs)

        def __enter__(self):
            files.append(self)
            assert len(files) == 1
            self._opened = self._file.__enter__()
            return self

        def __exit__(self, *error):
            files.remove(self)
            return self._file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self._opened, name)

        def get_tensor(self, name):
            nonlocal most
            # Storages, whose clones and views die with them.
            tensors[:] = [alive for alive in tensors if alive() is not None]
            tensor = self._opened.get_tensor(name)
            tensors.append(weakref.ref(tensor))
            most = max(most, len(tensors))
            return tensor

    monkeypatch.setattr("attnres_ext.models.kimi_linear.weights.safe_open", Counting)
    load_model(tmp_path)
    # The one just handed out, and at most the one that its variable still held.
    assert most <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("model-00002*")).unlink(), "names files that are missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "no index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "no index"),
    ],
    ids=["shard", "list", "half"],
)
def test_damaged_sets_of_files_give_sentences(tmp_path, damage, message):
    save_weights(make_model(), tmp_path, max_shard_bytes=50_000)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_weights(make_model(), tmp_path)


def test_a_truncated_file_is_found_before_anything_is_loaded(tmp_path):
    save_weights(make_model(), tmp_path, max_shard_bytes=50_000)
    (last,) = tmp_path.glob("model-00003-*")
    last.write_bytes(last.read_bytes()[:-5])
    model = make_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SafetensorError):
        load_weights(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_sharded_checkpoints_are_read(tmp_path):
    model = make_model()
    tensors = load_file(save_weights(model, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(model, load_model(tmp_path))


def test_everything_that_does_not_fit_is_named_before_anything_is_loaded(tmp_path):
    tensors = load_file(save_weights(make_model(), tmp_path))
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.b_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    tensors["model.output_attn_res_proj.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "broken.safetensors")
    model = make_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit this model; nothing was loaded") as caught:
        load_weights(model, tmp_path / "broken.safetensors")
    message = str(caught.value)
    assert "2 missing: model.layers.1.self_attn.b_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.9.mlp.up_proj.weight" in message
    assert "lm_head.weight is [100, 32], the model has [256, 32]" in message
    assert re.search(r"output_attn_res_proj.weight is \[2, 32\], the model has \[1, 32\]", message)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_weights(make_model(), tmp_path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("attnres_ext.models.kimi_linear.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(make_model(seed=1), tmp_path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_missing_files_and_meta_models_give_sentences(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(make_model(), tmp_path)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(presets("tiny"))
    with pytest.raises(ValueError, match="on the meta device"):
        load_weights(model, tmp_path)
