"""Function transforms and export of Kimi Linear."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets


def make_model(**changes):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", **changes)).double()
    with torch.no_grad():
        for query in model.residual.queries:
            query.normal_(std=0.3)
    return model, torch.randint(200, (1, 24))


@pytest.mark.parametrize("mode", ["standard", "block"])
def test_transforms(mode):
    """``torch.func`` runs the definitions: gradients are those of a backward pass, and forward mode
    agrees with them."""
    model, ids = make_model(residual=mode)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values):
        return functional_call(model, values, (ids,), {"labels": ids}).loss

    gradients = grad(loss)(parameters)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, along = jvp(loss, (parameters,), (tangents,))
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    torch.testing.assert_close(along, expected, rtol=1e-8, atol=1e-10)


def test_transforms_count_no_tokens():
    model, ids = make_model()
    loads = [m.load for m in model.modules() if hasattr(m, "load")]
    grad(lambda p: functional_call(model, p, (ids,), {"labels": ids}).loss)(
        {name: p.detach() for name, p in model.named_parameters()}
    )
    assert loads
    assert not any(load.any() for load in loads)


def test_export():
    """With any number of sequences, and whatever experts their tokens go to."""
    # Tracing takes seconds a layer: one of each kind, and each kind of MLP.
    kinds = dataclasses.replace(
        presets("tiny").linear_attn_config, kda_layers=[1], full_attn_layers=[2]
    )
    model, ids = make_model(num_hidden_layers=2, linear_attn_config=kinds, sublayers_per_block=2)
    ids, batch = ids.repeat(2, 1), torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model.eval(), (ids,), strict=False, dynamic_shapes={"input_ids": {0: batch}}
        )
    # The second has tokens of one kind: some experts get none.
    for other in (torch.randint(200, (3, 24)), torch.full((5, 24), 7)):
        torch.testing.assert_close(program.module()(other).logits, model(other).logits)


def test_a_trace_leaves_nothing_behind():
    """What a model computes with after it was traced is real, whatever it was traced first."""
    model, ids = make_model(first_k_dense_replace=4)
    ids = ids[:, :5]  # short chunks, which no other test makes
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(ids))
    assert type(model(ids).logits) is torch.Tensor
