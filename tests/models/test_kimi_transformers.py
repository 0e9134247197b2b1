"""The same weights through transformers' Kimi Linear: names, shapes and mathematics agree."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets, save_weights
from tests.module.naive_residual import assert_as_exact_as_plain_pytorch

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")

TOKENS = (2, 37)


def order(*, kda, full):
    """Which layers, from 1 on, are of which kind."""
    linear = presets("tiny").to_dict()["linear_attn_config"]
    return {"linear_attn_config": linear | {"kda_layers": kda, "full_attn_layers": full}}


CONFIGURATIONS = {
    "three to one, first layer dense": {},
    "full attention first": order(kda=[2, 3, 4], full=[1]) | {"first_k_dense_replace": 2},
    "in turns, experts everywhere": order(kda=[1, 3], full=[2, 4]) | {"first_k_dense_replace": 0},
    "two by two, all dense": order(kda=[3, 4], full=[1, 2]) | {"first_k_dense_replace": 4},
    "KDA alone": order(kda=[1, 2, 3, 4], full=[]),
    "full attention alone, low-rank queries": order(kda=[], full=[1, 2, 3, 4]) | {"q_lora_rank": 6},
    "other experts": {"num_experts": 7, "num_experts_per_token": 3, "num_shared_experts": 2},
}


def make_model(**changes):
    torch.manual_seed(0)
    # A wide initialisation makes every part of the model matter to the logits.
    config = presets("tiny", residual="standard", initializer_range=0.2, **changes)
    model = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.3)
    return model


def load_theirs(model, folder):
    """Their model with our weights, as they read them from our files."""
    save_weights(model, folder)
    config = model.config
    ours = json.loads((folder / "config.json").read_text())
    for name in ("residual", "sublayers_per_block", "mla_use_output_gate"):
        del ours[name]
    kinds = ["linear_attention" if config.is_kda_layer(i) else "full_attention" for i in range(4)]
    public = {
        "num_expert_group": 1, "topk_group": 1, "num_key_value_heads": 2, "pad_token_id": 0,
        "layer_types": kinds,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(ours | public))
    other, report = theirs.KimiLinearForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    return other.eval()


def gradients(model, save):
    """Gradients under the names and in the shapes that ``save`` gives to weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    return save(model)


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_transformers_reads_our_checkpoint_and_computes_the_same(tmp_path, changes):
    model = make_model(**changes)
    other = load_theirs(model, tmp_path)
    exact = make_model(**changes).double()
    ids = torch.randint(3, 256, TOKENS)
    weight = torch.randn(*TOKENS, 256)
    expected = exact(ids).logits
    (expected * weight).sum().backward()
    ours, public = model(ids).logits, other(input_ids=ids, use_cache=False).logits
    for logits in (ours, public):
        (logits * weight).sum().backward()

    assert_as_exact_as_plain_pytorch([ours], [public], [expected])

    def save_ours(model):
        return load_file(save_weights(model, tmp_path / "ours"))

    def save_theirs(model):
        model.save_pretrained(tmp_path / "theirs")
        tensors = load_file(tmp_path / "theirs" / "model.safetensors")
        # Reads dense layers as "mlp", writes them like sparse ones.
        dense = re.compile(r"block_sparse_moe\.(?=(gate|up|down)_proj)")
        return {dense.sub("mlp.", name): tensor for name, tensor in tensors.items()}

    wanted = gradients(exact, save_ours)
    actual, public = gradients(model, save_ours), gradients(other, save_theirs)
    assert actual.keys() == wanted.keys() == public.keys()
    names = [name for name in wanted if not name.endswith("e_score_correction_bias")]
    assert_as_exact_as_plain_pytorch(
        [actual[name] for name in names],
        [public[name].view_as(wanted[name]) for name in names],
        [wanted[name] for name in names],
    )
