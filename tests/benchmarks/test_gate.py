"""The correctness gate lets the right pass and refuses every kind of wrong."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from attnres_ext.benchmarks.baselines import BASELINES, Baseline
from attnres_ext.benchmarks.gate import Gate, results, sample_rows
from attnres_ext.benchmarks.inputs import Inputs, copy_inputs, make_inputs
from attnres_ext.benchmarks.registry import Case
from tests.benchmarks.shapes import SMALL_CASES

eager, ours, standard, standard_fused = (
    BASELINES[name] for name in ("eager", "ours", "standard", "standard-fused")
)
FORWARD = Case("depth_attention", sources=3, tokens=200, hidden=32, dtype="float32")
BACKWARD = Case("depth_attention", 3, 200, 32, "float32", gradients="fresh", norm=True)


def gate(case: Case) -> Gate:
    return Gate(case, make_inputs(case))


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("baseline", [ours, eager], ids=["ours", "eager"])
def test_lets_the_operators_pass(case: Case, baseline: Baseline) -> None:
    verdict = gate(case).check(baseline.prepare(case))
    assert verdict.passed, verdict.reason
    assert verdict.worst <= 1


@pytest.mark.parametrize("yardstick", [standard, standard_fused], ids=["two", "fused"])
@pytest.mark.parametrize(
    "case",
    [case for case in SMALL_CASES if standard.unsupported(case, "cpu") is None],
    ids=lambda case: case.name,
)
def test_lets_the_yardsticks_pass_by_their_own_definitions(case: Case, yardstick: Baseline) -> None:
    inputs = make_inputs(case)
    held_to = Gate(case, inputs, yardstick.definition)
    verdict = held_to.check(yardstick.prepare(case))
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("yardstick", [standard, standard_fused], ids=["two", "fused"])
def test_the_yardstick_is_no_depth_attention(yardstick: Baseline) -> None:
    case = Case("merge_partial", 3, 100, 32, norm=True)
    assert not gate(case).check(yardstick.prepare(case)).passed


def test_both_yardsticks_are_the_same_residual() -> None:
    case = Case("merge_partial", 3, 100, 32, "float32", norm=True, gradients="fresh")
    inputs = make_inputs(case)
    one, two = (results(one.prepare(case), case, inputs) for one in (standard, standard_fused))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-5, atol=1e-5)


def off_by_a_percent(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(1.01 * output for output in outputs)


def a_nan_far_from_the_ends(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    broken = outputs[0].clone()
    unsampled = set(range(broken.shape[0])) - set(sample_rows(broken.shape[0]).tolist())
    broken[unsampled.pop()] = float("nan")
    return (broken,)


def rounded_to_bfloat16(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(output.bfloat16().float() for output in outputs)


def last_row_forgotten(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.cat([outputs[0][:-1], torch.zeros_like(outputs[0][:1])]),)


def a_row_too_few(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][:-1],)


def no_output(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (off_by_a_percent, "output 0 is off by"),
        (a_nan_far_from_the_ends, "output 0 is not finite"),
        (rounded_to_bfloat16, "output 0 is off by"),
        (last_row_forgotten, "output 0 is off by"),
        (a_row_too_few, r"output 0 has shape \(199, 32\), expected 200 tokens"),
        (no_output, "output 0 is missing"),
    ],
)
def test_refuses_wrong_outputs(spoil: object, complaint: str) -> None:
    right = eager.prepare(FORWARD)
    verdict = gate(FORWARD).check(lambda inputs: spoil(right(inputs)))
    assert not verdict.passed
    assert not verdict.failed
    assert re.search(complaint, verdict.reason)


class Spoilt(torch.autograd.Function):
    """Identity whose gradient is wrong in a chosen way."""

    @staticmethod
    def forward(ctx, tensor: Tensor, spoil: object) -> Tensor:
        ctx.spoil = spoil
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.spoil(gradient.clone()), None


@pytest.mark.parametrize("name", ["sources", "query", "key_weight", "out_weight"])
@pytest.mark.parametrize(
    "spoil", [lambda g: 1.01 * g, lambda g: g + 1e-2, lambda g: g * float("nan")]
)
def test_refuses_wrong_gradients(name: str, spoil: object) -> None:
    right = eager.prepare(BACKWARD)

    def wrong(inputs: Inputs) -> tuple[Tensor, ...]:
        return right(
            inputs.map(lambda n, t: Spoilt.apply(t, spoil) if n == name and t.requires_grad else t)
        )

    verdict = gate(BACKWARD).check(wrong)
    assert not verdict.passed
    assert f"gradient of {name}" in verdict.reason


def test_refuses_a_missing_gradient() -> None:
    right = eager.prepare(BACKWARD)
    verdict = gate(BACKWARD).check(
        lambda inputs: right(inputs.map(lambda n, t: t.detach() if n == "query" else t))
    )
    assert not verdict.passed
    assert verdict.reason == "gradient of query is missing"


def test_gradients_are_added_to_what_is_there() -> None:
    case = Case("depth_attention", 3, 200, 32, "float32", gradients="accumulate")
    inputs = make_inputs(case)
    before = {name: leaf.grad.clone() for name, leaf in inputs.leaves().items()}
    held_to = Gate(case, inputs)
    assert held_to.check(eager.prepare(case)).passed
    for name, leaf in inputs.leaves().items():
        assert torch.equal(leaf.grad, before[name])

    right = eager.prepare(case)

    def overwrites(inputs: Inputs) -> tuple[Tensor, ...]:
        inputs.sources[1].grad.zero_()
        return right(inputs)

    verdict = held_to.check(overwrites)
    assert not verdict.passed
    assert (
        verdict.reason == "gradient of sources[1] changed in rows whose incoming gradient is zero"
    )


def test_an_error_is_a_failure_of_that_contestant_alone() -> None:
    def explode(inputs: Inputs) -> tuple[Tensor, ...]:
        raise RuntimeError("no such kernel\nand a long trace")

    verdict = gate(FORWARD).check(explode)
    assert verdict.failed
    assert not verdict.passed
    assert verdict.reason == "RuntimeError: no such kernel"


@pytest.mark.parametrize("tokens", [1, 2, 128, 129, 1000])
def test_sampled_rows(tokens: int) -> None:
    rows = sample_rows(tokens).tolist()
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert rows[-1] == tokens - 1
    assert len(rows) == min(tokens, 128)


def test_copies_are_equal_and_elsewhere() -> None:
    case = Case("depth_attention", 2, 5, 8, layout="padded", gradients="accumulate")
    inputs = make_inputs(case)
    copies = copy_inputs(inputs).leaves()
    for name, leaf in inputs.leaves().items():
        assert torch.equal(copies[name], leaf)
        assert copies[name].data_ptr() != leaf.data_ptr()
        assert copies[name].stride() == leaf.stride()
        assert copies[name].requires_grad
        assert torch.equal(copies[name].grad, leaf.grad)
