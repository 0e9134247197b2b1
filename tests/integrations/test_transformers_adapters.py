"""An adapter that carries Attention Residuals comes back with them, or with a sentence."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from attnres_ext.integrations.transformers import attach, attention_residuals
from tests.integrations import tiny_models


@pytest.fixture
def saved(tmp_path):
    """A base model, a folder with an adapter of its attached twin, and that twin."""
    base = tiny_models.make("llama")
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["attn_res"]
    )
    model = peft.get_peft_model(attach(copy.deepcopy(base), sublayers_per_block=2), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return base, tmp_path, model.eval()


def test_an_adapter_brings_its_own_to_an_attached_model(saved):
    base, folder, model = saved
    ids = tiny_models.tokens()
    loaded = peft.PeftModel.from_pretrained(attach(base, sublayers_per_block=2), folder)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_on_a_bare_model_is_noticed(saved):
    base, folder, _ = saved
    loaded = peft.PeftModel.from_pretrained(base, folder)
    assert not any("attn_res" in name for name, _ in loaded.named_parameters())
    says = "its adapter 'default' carries Attention Residuals .* attach to the base model first"
    for ask in (attach, attention_residuals):
        with pytest.raises(ValueError, match=says):
            ask(loaded)


def test_those_of_an_adapter_load_without_it(saved):
    base, folder, model = saved
    attach(base, sublayers_per_block=2, weights=folder)
    found = dict(attention_residuals(base).named_parameters())
    wrapper = attention_residuals(model)
    expected = dict(wrapper.modules_to_save["default"].named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
