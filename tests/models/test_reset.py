"""Memory that holds anything becomes a model: `reset_parameters` of every module restores all that
the module owns, and loading all that a model has."""

import importlib
import pkgutil

import pytest
import torch
from torch import nn

import attnres_ext
from attnres_ext import AttentionResiduals
from attnres_ext.compat.liger import LigerAttnRes
from attnres_ext.models.kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearStage,
    load_weights,
    presets,
    save_weights,
)
from attnres_ext.parallel import first_sites_of, place_stages, plan_pipeline


def stage(index):
    model = KimiLinearForCausalLM(presets("tiny"))
    config, block = model.config, model.residual.sublayers_per_block
    plan = plan_pipeline(config.num_sublayers, block, first_sites_of((4, 4)), place_stages(2, 1))
    return KimiLinearStage(model, plan.stages[index])


K3 = {"q_lora_rank": 6, "mla_use_output_gate": True}
WHOLES = {
    "block": lambda: KimiLinearForCausalLM(presets("tiny")),
    "standard": lambda: KimiLinearForCausalLM(presets("tiny", residual="standard")),
    "K3": lambda: KimiLinearForCausalLM(presets("tiny", **K3)),
    "tied": lambda: KimiLinearForCausalLM(presets("tiny", tie_word_embeddings=True)),
    "first stage": lambda: stage(0),
    "last stage": lambda: stage(1),
    "residual": lambda: AttentionResiduals(8, 4, mode="full"),
    "LigerAttnRes": lambda: LigerAttnRes(8),
}


def owned(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def spoil(module):
    """What a reused allocation may hold."""
    with torch.no_grad():
        for tensor in owned(module).values():
            tensor.fill_(float("nan"))


@pytest.mark.parametrize("name", WHOLES)
def test_reset_restores_all_that_a_module_owns(name):
    whole = WHOLES[name]()
    torch.manual_seed(0)
    whole.reset_parameters()
    expected = {key: tensor.clone() for key, tensor in owned(whole).items()}
    for part in whole.modules():
        if hasattr(part, "reset_parameters"):
            spoil(part)
            part.reset_parameters()
            assert all(tensor.isfinite().all() for tensor in owned(part).values()), type(part)
    spoil(whole)
    torch.manual_seed(0)
    whole.reset_parameters()
    for key, tensor in owned(whole).items():
        assert torch.equal(tensor, expected[key]), key


def test_every_module_can_be_reset():
    names = [m.name for m in pkgutil.walk_packages(attnres_ext.__path__, "attnres_ext.")]
    # Those that begin with an underscore are compiled, or a command.
    modules = [importlib.import_module(n) for n in names if "._" not in n]
    ours = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith("attnres_ext.")
        and not value.__name__.startswith("_")  # they inherit it
    }
    seen = {type(part) for make in WHOLES.values() for part in make().modules()}
    assert ours <= seen
    assert all(hasattr(kind, "reset_parameters") for kind in ours)


@pytest.mark.parametrize("residual", ["block", "standard"])
def test_loading_fills_a_model_that_only_has_memory(residual, tmp_path):
    model = KimiLinearForCausalLM(presets("tiny", residual=residual))
    ids = torch.randint(256, (2, 9))
    model(ids, labels=ids).loss.backward()
    model.update_router_bias()
    save_weights(model, tmp_path)
    with torch.device("meta"):
        other = KimiLinearForCausalLM(presets("tiny", residual=residual))
    other.to_empty(device="cpu")
    spoil(other)
    load_weights(other, tmp_path)
    expected = owned(model)
    assert owned(other).keys() == expected.keys()
    for key, tensor in owned(other).items():
        assert torch.equal(tensor, expected[key]), key
