"""Attaching costs a look at the norms, whatever a model holds, wherever it is, however torch is
set."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig

from attnres_ext.integrations.transformers import (
    attach,
    attention_residuals,
    detach,
)
from attnres_ext.integrations.transformers.norms import recognise
from tests.helpers import allocated
from tests.integrations import tiny_models
from tests.torch_settings import SETTINGS, state


def test_attaching_to_eight_billion_parameters_copies_none(monkeypatch):
    """Only norms are tried: eight rows of the hidden size at a time, of which nothing is kept."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) > 8e9

    def copied(*args):
        raise AssertionError("a module or a tensor was copied")

    monkeypatch.setattr(nn.Module, "__deepcopy__", copied, raising=False)
    monkeypatch.setattr(nn.Module, "__copy__", copied, raising=False)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)

    def holding_values():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]

    before = {id(tensor) for tensor in holding_values()}
    assert max(allocated(lambda: recognise(model.model.norm, 4096))) <= 8 * 4096 * 4
    attach(model)
    kept = [t for t in holding_values() if id(t) not in before]
    residual = attention_residuals(model)
    assert all(tensor.is_meta for tensor in kept)
    assert sum(tensor.numel() for tensor in kept) == 2 * 65 * 4096
    assert {id(tensor) for tensor in kept} == {id(p) for p in residual.parameters()}


def test_what_is_attached_without_values_is_what_is_attached_with_them():
    base = tiny_models.make("gemma2")
    ids = tiny_models.tokens()
    with torch.device("meta"):
        model = attach(copy.deepcopy(base).to("meta"), sublayers_per_block=2)
    model.to_empty(device="cpu")
    attention_residuals(model).reset_parameters()
    model.load_state_dict(base.state_dict(), strict=False)
    for name, buffer in base.named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(model(ids).logits, attach(base, sublayers_per_block=2)(ids).logits)


def keep_activation(model, ids):
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: setattr(module, "last", output))
    layer.mlp.register_forward_hook(lambda module, args, output: setattr(module, "last", output))
    model(ids)


def keep_cache(model, ids):
    model.model.kept = model(ids, use_cache=True).past_key_values


def keep_lock(model, ids):
    model.model.norm.lock = threading.Lock()


def keep_file(model, ids):
    model.model.log = open(__file__)  # noqa: SIM115


@pytest.mark.parametrize("keep", [keep_activation, keep_cache, keep_lock, keep_file])
def test_models_may_hold_what_cannot_be_copied(keep):
    model = tiny_models.make("llama")
    ids = tiny_models.tokens()
    expected = model(ids).logits
    keep(model, ids)
    attach(model, sublayers_per_block=2)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    detach(model)
    assert torch.equal(model(ids).logits, expected)


def test_hooks_of_layers_and_norms_do_not_meet_the_trial():
    model = tiny_models.make("llama")
    seen = []
    for module in (model.model.layers[0], model.model.layers[0].input_layernorm, model.model.norm):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    attach(model, sublayers_per_block=2)
    assert all(isinstance(value, torch.Tensor) for value in seen)
    seen.clear()
    model(tiny_models.tokens())
    assert len(seen) == 6  # none of them was lost


def test_norms_are_left_as_they_were():
    model = tiny_models.make("llama")
    norm = model.model.layers[0].input_layernorm
    norm.register_buffer("calls", torch.zeros((), dtype=torch.long))
    weight, buffer = norm.weight, norm.calls
    attach(model, sublayers_per_block=2)
    assert norm.weight is weight
    assert norm.calls is buffer


def trained(model, ids):
    model.zero_grad(set_to_none=True)
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return {
        "logits": logits.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("setting", [*SETTINGS, "inference mode", "no gradients"])
def test_what_torch_is_set_to_changes_nothing(name, setting, monkeypatch):
    base = tiny_models.make(name)
    ids = tiny_models.tokens()
    expected = trained(attach(copy.deepcopy(base), sublayers_per_block=2), ids)

    def seeded(*args):
        raise AssertionError("a generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    modes = {"inference mode": torch.inference_mode, "no gradients": torch.no_grad}
    with (SETTINGS | modes)[setting]():
        before = state()
        attach(base, sublayers_per_block=2)
        assert state() == before
    found = trained(base, ids)  # norms are fused as well, or not to the bit the same
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("settings", [{"sublayers_per_block": 2}, {"mode": "full"}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_run_several_times_are_served_and_let_go(settings, checkpointing):
    base = tiny_models.make("llama", num_hidden_layers=4)
    base.model.layers[2] = base.model.layers[0]
    ids = tiny_models.tokens()
    expected = trained(base, ids)
    model = attach(base, **settings)
    assert attention_residuals(model).num_sublayers == 8
    tiny_models.randomise(attention_residuals(model))
    plain = trained(model, ids)
    if checkpointing:
        model.train().activation_checkpointing_enable()
        again = trained(model, ids)
        assert all(torch.equal(again[n], plain[n]) for n in plain)
        model.eval().activation_checkpointing_disable()
    detach(model)
    assert not any("forward" in vars(module) for module in model.modules())
    found = trained(model, ids)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_one_norm_in_several_places_is_served_and_let_go():
    base = tiny_models.make("llama")
    layers, ids = base.model.layers, tiny_models.tokens()
    for layer in layers:
        layer.input_layernorm = layer.post_attention_layernorm = base.model.norm
    expected = base(ids).logits
    attach(base, sublayers_per_block=2)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-5, atol=1e-5)
    detach(base)
    assert torch.equal(base(ids).logits, expected)
    assert not any("forward" in vars(module) for module in base.modules())
