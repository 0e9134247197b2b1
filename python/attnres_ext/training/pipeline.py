"""A model whose layers are spread over processes, stage by stage.

Every process knows the whole model by its names and has values of its own stages alone: all other
parameters are on the meta device. So names, their order and their number are those of one process
everywhere, and so are, bit for bit, losses, the gradient norm, and what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.stages import KimiLinearStage
from attnres_ext.parallel import PipelinePlan, StagePlan, first_sites_of, plan_pipeline
from attnres_ext.parallel.pipeline import pipeline_stages
from attnres_ext.suspended import SuspendedPass
from attnres_ext.training.distributed import World
from attnres_ext.training.split import Split

__all__ = ["Pipeline"]


class Pipeline:
    """The stages of ``model`` that this process runs, and the schedule of all.

    Every process makes it, of a model that was initialised alike everywhere, and calls each of its
    methods.

    Args:
        model: The whole model, on the CPU. Its values stay for the stages of this process, which
            go to the process's device; the others go to the meta device.
        world: The processes, and how they share the model.
        num_microbatches: Parts of a batch.
        loss: Of logits and targets of a microbatch; a batch's loss is the sum of them.
        autocast: Makes what forwards run in.

    Attributes:
        modules: The modules of this process's stages; parameters have their names in ``model``.
    """

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        world: World,
        num_microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        split = world.split
        plan = _plan(model, split, num_microbatches)

        def make_module(stage: StagePlan) -> nn.Module:
            return _Stage(model, stage, autocast).to(world.device)

        stages = pipeline_stages(make_module, plan, world.device)
        self.modules: list[nn.Module] = [stage.submod for stage in stages]
        _leave_out(model, self.modules)
        self._world, self._model = world, model
        self._begins = any(stage.is_first for stage in stages)
        self._ends = any(stage.is_last for stage in stages)
        self._last_rank = plan.stages[-1].rank
        self._schedule = get_schedule_class(split.schedule)(
            stages[0] if split.stages_per_rank == 1 else stages,
            num_microbatches,
            loss_fn=loss,
            scale_grads=False,
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch on every process; where gradients are enabled, they add up in the
        parameters.

        Args:
            inputs: The whole batch of token ids, ``[B, T]``.
            targets: The tokens after them, ``[B, T]``.
        """
        device = self._world.device
        losses: list[Tensor] = []
        run = self._schedule.step if torch.is_grad_enabled() else self._schedule.eval
        run(
            *((inputs.to(device),) if self._begins else ()),
            target=targets.to(device),
            losses=losses,
            return_outputs=False,
        )
        total = torch.zeros((), device=device)
        for loss in losses:  # in the order of microbatches, as one process adds them
            total += loss.detach()
        dist.broadcast(total, src=self._last_rank)
        return total

    def clip_gradients(self, most: float) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` of the whole model, which it returns the norm of.

        The norm is that of the norms of all parameters in the order of the model, as there.
        """
        parameters = list(self._model.parameters())
        gradients = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        norms = torch.zeros(2, len(parameters), device=self._world.device)
        for i, gradient in gradients.items():
            norms[0, i], norms[1, i] = nn.utils.get_total_norm([gradient]), 1
        dist.all_reduce(norms)  # each has one addend that is not zero
        # A parameter without a gradient is none of the addends: it would move the others.
        norm = torch.linalg.vector_norm(norms[0, norms[1] > 0])
        nn.utils.clip_grads_with_norm_([parameters[i] for i in gradients], most, norm)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of this process, as in the ``state_dict`` of the model."""
        return {name: t for module in self.modules for name, t in module.state_dict().items()}

    def collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` of all processes, on the CPU of the one that leads; the others get their
        own."""
        rank, device = self._world.rank, self._world.device
        collected = {name: tensor.cpu() for name, tensor in tensors.items()}
        described = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        for source, theirs in enumerate(self._gathered(described)):
            if source == 0:
                continue
            for name, shape, dtype in theirs:
                if rank == source:
                    dist.send(tensors[name].to(device).contiguous(), dst=0)
                elif self._world.leads:
                    received = torch.empty(shape, dtype=dtype, device=device)
                    dist.recv(received, src=source)
                    collected[name] = received.cpu()
        return collected

    def merged(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """The entries of all processes, on every one."""
        return {key: value for each in self._gathered(values) for key, value in each.items()}

    def _gathered(self, value: Any) -> list[Any]:
        values = [None] * self._world.size
        dist.all_gather_object(values, value)
        return values


class _Stage(KimiLinearStage):
    """A stage whose forward runs in ``autocast()``; its backward does not, as in one process."""

    def __init__(
        self,
        model: KimiLinearForCausalLM,
        stage: StagePlan,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__(model, stage)
        self._autocast = autocast

    def forward(self, x: Tensor | SuspendedPass) -> SuspendedPass | Tensor:
        with self._autocast():
            return super().forward(x)


def _plan(model: KimiLinearForCausalLM, split: Split, num_microbatches: int) -> PipelinePlan:
    config, residual = model.config, model.residual
    return plan_pipeline(
        config.num_sublayers,
        residual.sublayers_per_block if residual.num_blocks else None,
        first_sites_of([2 * layers for layers in split.layers(config)]),
        split.ranks,
        num_microbatches=num_microbatches,
    )


def _leave_out(model: nn.Module, kept: list[nn.Module]) -> None:
    """Gives up the values of all parameters and buffers of ``model`` that ``kept`` has not."""
    own = {id(t) for module in kept for t in (*module.parameters(), *module.buffers())}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in own:
                    continue
                empty = torch.empty_like(tensor, device="meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                tensors[name] = empty
