"""Whole models: the stacks, who connects their layers, the gate, and what is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attnres_ext import AttentionResiduals, BlockCache
from attnres_ext.benchmarks import memory, model_registry, model_runner
from attnres_ext.benchmarks.model_arms import ARMS, YARDSTICK, Arm
from attnres_ext.benchmarks.model_gate import ModelGate
from attnres_ext.benchmarks.model_registry import CASES, ModelCase
from attnres_ext.benchmarks.model_stack import action, configuration, make_stack
from attnres_ext.benchmarks.plain_residual import PlainResidual
from attnres_ext.benchmarks.timing import Action, HostTimer, measure_in_step
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM

TRAIN = ModelCase(
    "train", 4, 32, 48, heads=2, head_dim=8, sublayers_per_block=3, tokens=70, batch=2
)
PREFILL = replace(TRAIN, work="prefill")
DECODE = replace(TRAIN, work="decode", tokens=1, context=20)
READS = replace(DECODE, work="reads")
HERE = tuple(arm for arm in ARMS if arm.contestant != "fla")


def test_every_stack_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.origin in model_registry.ORIGINS
        assert " " not in case.name
        configuration(case).validate()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_axis_is_a_curve(kind: str) -> None:
    """Points of an axis differ in nothing else, and there are at least two."""
    fields = {
        "layers": {"layers"},
        "blocks": {"sublayers_per_block"},
        "tokens": {"tokens", "batch"},
        "hidden": {"hidden", "intermediate", "heads"},
    }
    training = model_registry.select("model", kind)
    assert {axis for case in training for axis in case.scaling} == set(fields)
    for work in ("train", "prefill", "decode", "reads"):
        for axis, free in fields.items():
            points = [
                case
                for case in model_registry.select("all", kind)
                if case.work == work and axis in case.scaling
            ]
            assert len(points) != 1
            fixed = {
                tuple(v for n, v in vars(case).items() if n not in {*free, "scaling"})
                for case in points
            }
            assert len(fixed) <= 1


def test_suites() -> None:
    assert {case.work for case in model_registry.select("model", "cpu")} == {"train"}
    for kind in ("cpu", "cuda"):
        works = {case.work for case in model_registry.select("decode", kind)}
        assert works == {"prefill", "decode", "reads"}
    assert model_registry.select("ops", "cpu") == []
    assert model_registry.select("all", "cpu", "train/L8*")
    large = [case for case in model_registry.select("model", "cuda") if case.layers >= 12]
    assert any((c.hidden, c.tokens, c.dtype) == (2304, 8192, "bfloat16") for c in large)
    with pytest.raises(model_registry.UnknownCaseError, match="suite 'slow' is not one of"):
        model_registry.select("slow", "cpu")


def test_stacks_are_what_a_user_would_build() -> None:
    """The stack's own residual, exchanged for its own, is the model of its configuration."""
    stack = make_stack(TRAIN, "cpu", HERE)
    block = next(arm for arm in HERE if arm.name == "block, ours")
    config = configuration(TRAIN).replace(residual="block", sublayers_per_block=3)
    model = KimiLinearForCausalLM(config)
    model.load_state_dict(
        {
            **{n: v for n, v in stack.model.state_dict().items() if "zero_query" not in n},
            **{
                f"model.residual.{name}": value
                for name, value in stack.residuals[block.name].state_dict().items()
            },
        }
    )
    before = stack.model.model.residual
    with stack.connected_by(block) as connected:
        assert torch.equal(connected(stack.tokens).logits, model(stack.tokens).logits)
    assert stack.model.model.residual is before


@pytest.mark.parametrize("mode", ["standard", "block", "full"])
def test_plain_residuals_compute_the_same(mode: str) -> None:
    ours = next(a for a in HERE if a.residual == mode and a.contestant in ("ours", "standard"))
    eager = next(a for a in HERE if (a.residual, a.contestant) == (mode, "eager"))
    stack = make_stack(TRAIN, "cpu", HERE)
    stack.model.double()
    stack.residuals.double()
    losses, gradients = [], []
    for arm in (ours, eager):
        with stack.connected_by(arm) as model:
            loss = model(stack.tokens, labels=stack.tokens).loss
        own = list(stack.residuals[arm.name].parameters())
        losses.append(loss)
        gradients.append(
            torch.autograd.grad(loss, [model.lm_head.weight, model.model.embed_tokens.weight, *own])
        )
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", [TRAIN, PREFILL, DECODE, READS], ids=lambda case: case.work)
def test_every_arm_passes_the_gate_and_is_timed(case: ModelCase) -> None:
    rows = model_runner.run_case(case, "cpu", turns=3)
    assert [(row.residual, row.contestant) for row in rows] == [
        (arm.residual, arm.contestant) for arm in ARMS
    ]
    for row in rows:
        assert row.case == case.name
        if row.contestant == "fla":
            assert row.status == "absent"
            continue
        assert row.status == "timed", row.reason
        assert row.error <= 1
        assert len(row.samples) == 3
        assert row.tokens_per_second == pytest.approx(case.batch * case.tokens / row.seconds)
        assert row.peak_bytes > 0
        if (row.residual, row.contestant) == ("standard", "standard"):
            assert row.overhead is None
        else:
            low, high = row.overhead_quartiles
            assert low <= row.overhead <= high


def test_named_contestants_run_beside_the_yardstick() -> None:
    rows = model_runner.run_case(DECODE, "cpu", names=("ours",), turns=2)
    assert [row.contestant for row in rows] == ["standard", "ours", "ours"]


@pytest.mark.parametrize("case", [TRAIN, DECODE], ids=lambda case: case.work)
def test_who_is_wrong_or_fails_is_not_timed(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(sources: list[Tensor], *rest: object) -> Tensor:
        return 1.01 * eager.mix(sources, *rest)

    def broken(sources: list[Tensor], *rest: object) -> Tensor:
        raise NotImplementedError("no kernel for this\nand a trace")

    def arm(name: str, mix: object) -> Arm:
        return Arm("block", name, lambda residual: PlainResidual(residual, mix))

    eager = PlainResidual(AttentionResiduals(8, 2), HERE[3].make(AttentionResiduals(8, 2)).mix)
    arms = (*HERE, arm("off", off), arm("broken", broken))
    monkeypatch.setattr(model_runner, "ARMS", arms)
    monkeypatch.setattr("attnres_ext.benchmarks.model_stack.ARMS", arms)
    real = model_runner.make_stack
    monkeypatch.setattr(model_runner, "make_stack", lambda c, d, a=arms: real(c, d, a))
    rows = {row.contestant: row for row in model_runner.run_case(case, "cpu", turns=2)}
    assert rows["off"].status == "wrong"
    assert "hidden states is off by" in rows["off"].reason
    assert rows["broken"].status == "failed"
    assert rows["broken"].reason == "NotImplementedError: no kernel for this"
    assert rows["off"].seconds is rows["broken"].seconds is None
    assert rows["ours"].status == "timed"


def test_the_gate_looks_at_gradients() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return 0.5 * gradient

    class Wrong(nn.Module):
        def __init__(self, residual: AttentionResiduals):
            super().__init__()
            self.residual = residual

        def start(self, embedding: Tensor, cache: object = None) -> object:
            state = self.residual.start(embedding)
            read = state.read
            state.read = lambda *arguments: Halved.apply(read(*arguments))
            return state

    arm = Arm("block", "halved", Wrong)
    gate = ModelGate(make_stack(TRAIN, "cpu", (*HERE, arm)))
    verdict = gate.check(arm)
    assert not verdict.passed
    assert verdict.reason.startswith("gradient of the embedding is off by")


@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=lambda case: case.work)
def test_the_gate_looks_at_the_block_cache(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inference reads comes from there; without a state it would not be looked at."""
    gate = ModelGate(make_stack(case, "cpu", HERE))
    block = next(arm for arm in HERE if arm.name == "block, ours")
    assert gate.check(block).passed
    attend = BlockCache.attend
    monkeypatch.setattr(BlockCache, "attend", lambda *a, **k: attend(*a, **k).mul_(1.001))
    assert not gate.check(block).passed


def test_a_training_step_changes_the_layers_and_its_own_queries_alone() -> None:
    stack = make_stack(TRAIN, "cpu", HERE)
    block = next(arm for arm in HERE if arm.name == "block, ours")
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2, fused=True)
    names = {name: p.detach().clone() for name, p in stack.residuals.named_parameters()}
    head = stack.model.lm_head.weight.detach().clone()
    action(stack, block, optimizer).run(0)
    assert not torch.equal(stack.model.lm_head.weight, head)
    changed = {
        name.split(".")[0]
        for name, p in stack.residuals.named_parameters()
        if not torch.equal(p, names[name])
    }
    # The arms of a mode share their parameters, which are listed under the first of them.
    assert changed == {"block, ours"}
    assert all(p.grad is None for p in stack.parameters())


def test_a_decoding_step_is_the_same_every_time() -> None:
    stack = make_stack(DECODE, "cpu", HERE)
    block = next(arm for arm in HERE if arm.name == "block, ours")
    step = action(stack, block, None)
    logits = []
    for call in range(3):
        with step.context():
            step.before(call)
            logits.append(step.run(call).clone())
    assert logits[0].shape == (2, 1, 1024)
    # Linear attention's memory moves on; the position in the sequence does not.
    assert all(bool(one.isfinite().all()) for one in logits)


def test_reads_alone_call_no_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(READS, "cpu", HERE)
    called: list[nn.Module] = []
    for layer in stack.model.model.layers:
        for module in (layer.self_attn, layer.feed_forward):
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    results = {}
    for arm in HERE:
        timed = action(stack, arm, None)
        with timed.context():
            results[arm.name] = timed.run(0).clone()
            assert torch.equal(timed.run(1), results[arm.name])
    assert called == []
    assert len(stack.written) == 2 * READS.layers
    torch.testing.assert_close(results["block, ours"], results["block, eager"])
    assert not torch.allclose(results["block, ours"], results["standard, standard"])
    # What was put in their place is gone.
    stack.model(stack.tokens)
    assert len(called) == 2 * READS.layers


def test_turns_are_taken_in_step_and_order_rotates() -> None:
    order: list[str] = []
    actions = {name: Action(lambda _, name=name: order.append(name)) for name in "abc"}
    timings = measure_in_step(actions, 1.0, HostTimer(), lambda *_: None, turns=3)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert {len(timing.samples) for timing in timings.values()} == {3}


def test_layers_that_do_not_fit_fail_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")

    monkeypatch.setattr(model_runner, "make_stack", explode)
    rows = model_runner.run_case(TRAIN, "cpu")
    assert {row.status for row in rows} == {"failed", "absent"}
    assert rows[0].reason == ("the layers do not fit: CUDA out of memory. Tried to allocate 7 GiB")


def test_runs_that_may_end_early_begin_with_what_is_cheap() -> None:
    cases = model_registry.cheapest_first(model_registry.select("all", "cuda"))
    assert cases[0].work == "decode"
    assert (cases[-1].work, cases[-1].layers) == ("train", 24)


def test_who_raises_an_error_is_left_out_of_the_turns() -> None:
    refused: dict[str, str] = {}

    def explode(_: int) -> None:
        raise torch.OutOfMemoryError("too large")

    timings = measure_in_step(
        {"large": Action(explode), "small": Action(lambda _: None)},
        1.0,
        HostTimer(),
        lambda name, error: refused.update({name: str(error)}),
        turns=2,
    )
    assert refused == {"large": "too large"}
    assert list(timings) == ["small"]


def test_peak_memory_of_a_call() -> None:
    kept = torch.zeros(1000)

    def call() -> Tensor:
        first = torch.zeros(2000)
        second = first + 1
        del first
        return second[:1000] + kept

    # 8000 for each of the two, or 8000 and the 4000 of the result: the first is more. Operators
    # may hold a few scalars beside.
    assert 16000 <= memory.peak_bytes(call, "cpu") < 16200


def test_the_yardstick_is_the_standard_residual() -> None:
    assert (YARDSTICK.residual, YARDSTICK.contestant) == ("standard", "standard")
