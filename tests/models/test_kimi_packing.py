"""Packed sequences compute what they compute apart; kernels of others are called as they want."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, fla_kernels, presets
from attnres_ext.models.kimi_linear.delta_rule import (
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from attnres_ext.models.kimi_linear.packing import Packing

LENGTHS = [5, 1, 17, 2, 16, 3]
ENDS = torch.tensor([0, 5, 6, 23, 25, 41, 44])


def make_model(**changes):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", initializer_range=0.2, **changes)).double()
    with torch.no_grad():
        for query in model.residual.queries:
            query.normal_()
    return model.eval()


@pytest.mark.parametrize("mode", ["standard", "block", "full"])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_packed_sequences_are_those_apart(mode, bound):
    model = make_model(residual=mode)
    for layer in model.model.layers[:3]:
        layer.self_attn.gate_lower_bound = bound
    ids = torch.randint(256, (1, 44))
    packed = model(ids, cu_seqlens=ENDS).logits
    apart = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(packed)
    parameters = list(model.parameters())
    actual, expected = (
        torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
        for out in (packed, apart)
    )
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9 * e.abs().max().item() + 1e-12)


def test_labels_do_not_reach_over_an_end():
    model = make_model()
    ids = torch.randint(256, (1, 44))
    loss = model(ids, labels=ids, cu_seqlens=ENDS).loss
    parts = [part for part in ids.split(LENGTHS, dim=1) if part.shape[1] > 1]
    losses = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    expected = torch.stack(losses).sum() / sum(part.shape[1] - 1 for part in parts)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("shape", "ends", "message"),
    [
        ((2, 4), [0, 4], "all sequences lie in one row"),
        ((1, 4), [0, 2], r"rise from 0 to the 4 tokens"),
        ((1, 4), [0, 3, 2, 4], r"rise from 0 to the 4 tokens"),
        ((1, 4), [0, 2, 2, 4], r"rise from 0 to the 4 tokens"),
        ((1, 4), [4], r"must be \[sequences \+ 1\], integers"),
        ((1, 4), [0.0, 4.0], r"must be \[sequences \+ 1\], integers"),
    ],
)
def test_mistakes_give_sentences(shape, ends, message):
    with pytest.raises(ValueError, match=message):
        make_model()(torch.zeros(shape, dtype=torch.long), cu_seqlens=torch.tensor(ends))


def test_packed_sequences_do_not_continue_a_state():
    model = make_model()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot continue a decoding state"):
        model(ids, state=model.new_state(1, 8), cu_seqlens=torch.tensor([0, 4]))


def test_kernels_of_others_are_called_as_they_want(monkeypatch):
    """With bodies of ours behind flash-linear-attention's interface: arguments, dtypes, states."""
    calls = []

    def kernel(rule, q, k, v, g, beta, *, initial_state, output_final_state, cu_seqlens):
        calls.append(rule.__name__)
        assert output_final_state
        assert initial_state is None or initial_state.dtype == torch.float32
        assert {q.dtype, k.dtype, v.dtype, beta.dtype} == {torch.float32}
        ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        outs, states = zip(
            *(
                rule(*(x[:, a:b] for x in (q, k, v, g, beta)), initial_state)
                for a, b in pairwise(ends)
            ),
            strict=True,
        )
        return torch.cat(outs, 1), torch.cat(states)

    model = make_model().float()
    ids = torch.randint(256, (1, 44))

    def results():
        with torch.no_grad():
            state = model.new_state(1, 44)
            prefill = model(ids[:, :40], state=state).logits
            decoded = [model(ids[:, i : i + 1], state=state).logits for i in range(40, 44)]
        return [model(ids, cu_seqlens=ENDS).logits, prefill, *decoded]

    expected = results()
    kernels = fla_kernels._Kernels(
        lambda *a, **b: kernel(chunk_gated_delta_rule, *a, **b),
        lambda *a, **b: kernel(recurrent_gated_delta_rule, *a, **b),
    )
    monkeypatch.setattr(fla_kernels, "_kernels", lambda: kernels)
    monkeypatch.setattr(fla_kernels, "takes", lambda values: True)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert set(calls) == {"chunk_gated_delta_rule", "recurrent_gated_delta_rule"}
    assert len(calls) == 3 * (len(["packed", "prefill"]) + 4)


def test_without_the_package_the_pytorch_form_runs():
    assert not fla_kernels.takes(torch.zeros(1, 1, 1, 8))


@pytest.mark.parametrize(
    ("dtype", "precision", "takes"),
    [
        (torch.bfloat16, "ieee", True),
        (torch.float16, "ieee", True),
        (torch.float32, "ieee", False),
        (torch.float32, "none", False),
        (torch.float32, "tf32", True),
        (torch.float64, "tf32", False),
    ],
)
def test_float32_is_multiplied_in_tf32_by_permission_alone(dtype, precision, takes, monkeypatch):
    monkeypatch.setattr(fla_kernels, "_kernels", lambda: fla_kernels._Kernels(None, None))
    matmul = SimpleNamespace(fp32_precision=precision)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    values = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 1, 8))
    assert fla_kernels.takes(values) == takes


def test_sequences_may_be_told_on_another_device_than_the_tokens():
    packing = Packing.of(ENDS, torch.Size([1, 44]), torch.device("meta"))
    assert packing.cu_seqlens.is_meta
    assert packing.begins.is_meta
    assert packing.visible.is_meta


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_pytorch_form(packed, dtype):
    """The real ones: outputs, states and gradients, against float64."""
    pytest.importorskip("fla.ops.kda")
    torch.manual_seed(0)
    shape = (1, 200, 2, 64)
    q, k = (torch.nn.functional.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(shape), -torch.rand(shape) * 3, torch.rand(shape[:3])
    ends = torch.tensor([0, 70, 71, 200]) if packed else None
    weight = torch.randn(shape)

    def outcome(rule, to):
        inputs = [to(x).requires_grad_() for x in (q, k, v, g, beta)]
        out, state = rule(*inputs)
        grads = torch.autograd.grad((out * weight.to(out)).sum(), inputs)
        return [x.double().cpu() for x in (out, state[-1:], *grads)]

    def exact(q, k, v, g, beta):
        if ends is not None:
            begins = Packing.of(ends, torch.Size([1, 200])).begins
            g = g.masked_fill(begins[:, None, None], -1e4)
        return chunk_gated_delta_rule(q, k, v, g, beta)

    def theirs(q, k, v, g, beta):
        ends_there = None if ends is None else ends.cuda()
        return fla_kernels.delta_rule(q, k, v.to(dtype), g, beta, None, ends_there)

    expected = outcome(exact, lambda x: x.double())
    actual = outcome(theirs, lambda x: x.cuda())
    for a, e in zip(actual, expected, strict=True):
        # The kernels multiply in TF32 or bfloat16, over dozens of products in a row.
        assert (a - e).norm() <= 0.03 * e.norm()
