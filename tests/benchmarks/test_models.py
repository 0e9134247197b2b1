"""Whole models: the stacks, who connects their layers, the gate, and what is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attnres_ext import AttentionResiduals, BlockCache
from attnres_ext.benchmarks.model_gate import ModelGate
from attnres_ext.benchmarks.model_registry import ModelCase
from attnres_ext.benchmarks.model_stack import action, configuration, make_stack
from attnres_ext.benchmarks.model_variants import VARIANTS, Variant
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM

TRAIN = ModelCase(
    "train", 4, 32, 48, heads=2, head_dim=8, sublayers_per_block=3, tokens=70, batch=2
)
PREFILL = replace(TRAIN, work="prefill")
DECODE = replace(TRAIN, work="decode", tokens=1, context=20)
READS = replace(DECODE, work="reads")
HERE = tuple(variant for variant in VARIANTS if variant.baseline != "fla")


def test_stacks_are_what_a_user_would_build() -> None:
    """The stack's own residual, exchanged for its own, is the model of its configuration."""
    stack = make_stack(TRAIN, "cpu", HERE)
    block = next(variant for variant in HERE if variant.name == "block, ours")
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
    ours = next(a for a in HERE if a.residual == mode and a.baseline in ("ours", "standard"))
    eager = next(a for a in HERE if (a.residual, a.baseline) == (mode, "eager"))
    stack = make_stack(TRAIN, "cpu", HERE)
    stack.model.double()
    stack.residuals.double()
    losses, gradients = [], []
    for variant in (ours, eager):
        with stack.connected_by(variant) as model:
            loss = model(stack.tokens, labels=stack.tokens).loss
        own = list(stack.residuals[variant.name].parameters())
        losses.append(loss)
        gradients.append(
            torch.autograd.grad(loss, [model.lm_head.weight, model.model.embed_tokens.weight, *own])
        )
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


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

    variant = Variant("block", "halved", Wrong)
    gate = ModelGate(make_stack(TRAIN, "cpu", (*HERE, variant)))
    verdict = gate.check(variant)
    assert not verdict.passed
    assert verdict.reason.startswith("gradient of the embedding is off by")


@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=lambda case: case.work)
def test_the_gate_looks_at_the_block_cache(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inference reads comes from there; without a state it would not be looked at."""
    gate = ModelGate(make_stack(case, "cpu", HERE))
    block = next(variant for variant in HERE if variant.name == "block, ours")
    assert gate.check(block).passed
    attend = BlockCache.attend
    monkeypatch.setattr(BlockCache, "attend", lambda *a, **k: attend(*a, **k).mul_(1.001))
    assert not gate.check(block).passed


def test_a_training_step_changes_the_layers_and_its_own_queries_alone() -> None:
    stack = make_stack(TRAIN, "cpu", HERE)
    block = next(variant for variant in HERE if variant.name == "block, ours")
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
    # The variants of a mode share their parameters, which are listed under the first of them.
    assert changed == {"block, ours"}
    assert all(p.grad is None for p in stack.parameters())


def test_reads_alone_call_no_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(READS, "cpu", HERE)
    called: list[nn.Module] = []
    for layer in stack.model.model.layers:
        for module in (layer.self_attn, layer.feed_forward):
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    results = {}
    for variant in HERE:
        timed = action(stack, variant, None)
        with timed.context():
            results[variant.name] = timed.run(0).clone()
            assert torch.equal(timed.run(1), results[variant.name])
    assert called == []
    assert len(stack.written) == 2 * READS.layers
    torch.testing.assert_close(results["block, ours"], results["block, eager"])
    assert not torch.allclose(results["block, ours"], results["standard, standard"])
    # What was put in their place is gone.
    stack.model(stack.tokens)
    assert len(called) == 2 * READS.layers
