"""What a trained model does with its depth: where sites look, how large things are and grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.training.model import site_names, source_names


@dataclass(frozen=True)
class Site:
    """What one read attends to, over all tokens looked at.

    Attributes:
        name: What it feeds, such as "3 kda".
        sources: Names of what it may attend to.
        weights: Mean weight of each source.
        top_shares: Share of tokens that give each source the largest weight.
        entropy: Mean entropy of a token's weights, nats.
    """

    name: str
    sources: Sequence[str]
    weights: Sequence[float]
    top_shares: Sequence[float]
    entropy: float

    @property
    def evenness(self) -> float | None:
        """Entropy as a share of its maximum, ln N; None with a single source."""
        return self.entropy / math.log(len(self.sources)) if len(self.sources) > 1 else None

    @property
    def top(self) -> int:
        """Which source has the largest mean weight."""
        return max(range(len(self.weights)), key=self.weights.__getitem__)


@dataclass(frozen=True)
class Depth:
    """Magnitudes behind the embedding or behind one sublayer.

    Magnitudes are root mean squares over tokens and channels.

    Attributes:
        name: "embedding", or the sublayer's name.
        block: Which block it writes to, counted from 1; 0 for the embedding, None in standard mode.
        output: Of what it wrote.
        state: Of the sum that it wrote to, with what it wrote: the residual stream, or the open
            block (paper, Fig. 5b).
        gradient: Of the gradient of the tokens' summed losses with respect to what it wrote,
            which is that of the sum, too (paper, Fig. 5c). Each loss is in nats, so this does not
            depend on how many tokens there are.
    """

    name: str
    block: int | None
    output: float
    state: float
    gradient: float


@dataclass(frozen=True)
class Inspection:
    """Of one arm.

    Attributes:
        arm: Its name.
        loss: Mean cross entropy over the tokens looked at, nats.
        tokens: How many.
        sites: In order of depth; empty in standard mode, which attends to nothing.
        depths: The embedding and every sublayer, in order of depth.
    """

    arm: str
    loss: float
    tokens: int
    sites: list[Site]
    depths: list[Depth]


def inspect_model(
    arm: str, model: KimiLinearForCausalLM, batches: Sequence[tuple[Tensor, Tensor]]
) -> Inspection:
    """Runs ``model`` forward and backward over ``batches`` and looks at its depth.

    Args:
        arm: Name to carry along.
        model: On the device of the batches; its parameters' gradients are left as they were.
        batches: Inputs and next-token targets, int64 ``[B, T]`` each; at least one.
    """
    model.eval()
    residual = model.residual
    names = ["embedding", *site_names(model.config)[:-1]]
    meter = _Meter(len(names))
    loss, tokens = 0.0, 0
    with residual.recording() as record, _outputs(model) as outputs, _frozen(model):
        for inputs, targets in batches:
            outputs.clear()
            logits = model(inputs).logits
            logits = logits.float().flatten(0, 1)
            value = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(value, outputs)
            meter.add(outputs, gradients, residual.closes_block)
            loss, tokens = loss + value.item(), tokens + targets.numel()
    sites = []
    if residual.variant.attends:
        sites = [
            Site(*named, weights.tolist(), tops.tolist(), entropy)
            for named, weights, tops, entropy in zip(
                zip(site_names(model.config), source_names(model.config, residual), strict=True),
                record.weights.values(),
                record.top_shares.values(),
                record.entropies.values(),
                strict=True,
            )
        ]
    depths = [
        Depth(name, block if residual.num_blocks else None, *magnitudes)
        for name, block, magnitudes in zip(names, _blocks(residual), meter.means(), strict=True)
    ]
    return Inspection(arm, loss / tokens, tokens, sites, depths)


def _blocks(residual: nn.Module) -> list[int]:
    """The block that the embedding and each sublayer write to."""
    return [0, *map(residual.num_blocks_before, range(1, residual.num_sites))]


class _Meter:
    """Sums of squares of outputs, states and gradients at every depth."""

    def __init__(self, count: int) -> None:
        self._sums = torch.zeros(count, 3, dtype=torch.float64)
        self._elements = 0

    def add(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], closes_block) -> None:
        state: Tensor | None = None
        for depth, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
            output = output.detach().float()
            # What is written after site ``depth - 1`` begins a block if that site read whole ones.
            begins = depth == 0 or closes_block(depth - 1)
            state = output if begins or state is None else state + output
            row = (output, state, gradient.float())
            self._sums[depth] += torch.stack([x.square().sum().double() for x in row]).cpu()
        self._elements += outputs[0].numel()

    def means(self) -> list[list[float]]:
        return (self._sums / self._elements).sqrt().tolist()


@contextmanager
def _outputs(model: KimiLinearForCausalLM) -> Iterator[list[Tensor]]:
    """Collects what the embedding and every sublayer write, in the order of the forward."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        # Parameters need no gradient here, so the graph begins at the embedding's output.
        if not output.requires_grad:
            output.requires_grad_()
        outputs.append(output)
        return output

    backbone = model.model
    modules = [backbone.embed_tokens]
    modules += [m for layer in backbone.layers for m in (layer.self_attn, layer.feed_forward)]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: they would cost as much again, and nobody looks at them."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learnt:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
