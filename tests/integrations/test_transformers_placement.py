"""Models that are loaded in the ways of large ones: placed, in several files, quantized."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from attnres_ext.integrations.transformers import attach, attention_residuals, from_pretrained
from tests.integrations import tiny_models


@pytest.fixture
def saved(tmp_path):
    """A folder with an attached model in several files, and that model."""
    model = attach(tiny_models.make("llama"), sublayers_per_block=2)
    tiny_models.randomise(attention_residuals(model))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path, model


@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_placed_models_load(saved, place):
    folder, model = saved
    ids = tiny_models.tokens()
    loaded = from_pretrained(folder, device_map=place)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_offloaded_models_are_told_what_to_do(saved, tmp_path):
    folder, _ = saved
    place = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    place |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    place |= {"model.norm": "cpu", "lm_head": "cpu"}
    offload = {"device_map": place, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=r"decoder are offloaded .* one device"):
        from_pretrained(folder, **offload)
    plain = AutoModelForCausalLM.from_pretrained(folder, **offload)
    plain(tiny_models.tokens())  # as before


class Packed(nn.Module):
    """A frozen matrix in 8 bits, as quantized models have them: no float, no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_a_quantized_base_stays_frozen_while_queries_train():
    model = tiny_models.make("llama").requires_grad_(False)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, Packed(module))
    ids = tiny_models.tokens()
    expected = model(ids).logits
    attach(model, sublayers_per_block=2)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("attn_res" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    optimizer = torch.optim.Adam(trainable.values(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
