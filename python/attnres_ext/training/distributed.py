"""Data-parallel training under ``torchrun``: which process this is, and models in shards (FSDP2).

Every process holds a shard of each parameter and of its optimizer state, and computes on its share
of each batch. Parameters are gathered for as long as they are used: those of an attention or
feed-forward sublayer, of the embedding and of the head, while that module computes; everything
that is read outside of them, which is the norms' gains and all pseudo-queries and key gains, in one
group that is gathered once per forward. These are a few vectors a layer: gathering them one by one
would cost a collective per site for some kilobytes, and leaving them out would cost an all-reduce
of their gradients all the same, and an optimizer state that is not sharded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.training.errors import UserError


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: Which of them this is; 0 writes files and talks to people.
        size: How many there are.
        device: This one's device.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All of them, for collectives; None where there is one alone."""
        return dist.group.WORLD if self.size > 1 else None

    def wait(self) -> None:
        """Returns once all processes are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch: Tensor) -> Tensor:
        """This process's share of the rows of ``batch``."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all processes, on every one of them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in some process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started, or is a world of one.

    Args:
        device: As the user named it: under ``torchrun`` without an index, for each process has its
            own.

    Raises:
        UserError: Under ``torchrun``, ``device`` has an index.
    """
    if not launched():
        yield World(device=device)
        return
    if ":" in device:
        raise UserError(
            f"--device {device} is one device; under torchrun each process takes its own of "
            f"--device {device.partition(':')[0]}"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield World(rank, size, device)
    # Not after an exception: the others may be waiting in a collective, and torchrun ends them.
    dist.destroy_process_group()


def shard(model: KimiLinearForCausalLM, world: World) -> None:
    """Shards ``model`` over the processes in place; all must hold the same values."""
    mesh = dist.device_mesh.init_device_mesh(world.device.partition(":")[0], (world.size,))
    modules: list[nn.Module] = []
    if not model.config.tie_word_embeddings:
        modules += [model.model.embed_tokens, model.lm_head]
    for layer in model.model.layers:
        modules += [layer.self_attn, layer.feed_forward]
    for module in modules:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def as_shards(model: nn.Module) -> None:
    """Gives up gathered parameters, so that ``named_parameters`` are those of the optimizer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronize_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over the processes, or only adds them up."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
