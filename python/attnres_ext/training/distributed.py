"""Training under ``torchrun``: which process this is, and models in shards (FSDP2).

In a pipeline every process has layers of its own (``pipeline.py``). Without one it holds a shard of
each parameter and of its optimizer state, and computes on its share of each batch. Parameters are
gathered for as long as they are used: those of an attention or feed-forward sublayer, of the
embedding and of the head, while that module computes; everything that is read outside of them,
which is the norms' gains and all pseudo-queries and key gains, in one group that is gathered once
per forward. These are a few vectors a layer: gathering them one by one
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
from attnres_ext.training.split import Split


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: Which of them this is; 0 writes files and talks to people.
        size: How many there are.
        device: This one's device.
        split: How they share the layers of a model; None if each has a shard of all of them, and
            a share of every batch.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    split: Split | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """In how many shares a batch is computed at the same time."""
        return 1 if self.split else self.size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Those with other shares of a batch, for collectives; None where there is none."""
        return dist.group.WORLD if self.shares > 1 else None

    def wait(self) -> None:
        """Returns once all processes are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch: Tensor) -> Tensor:
        """This process's share of the rows of ``batch``."""
        return batch.chunk(self.shares)[self.rank if self.shares > 1 else 0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all shares of a batch, on every process."""
        if self.shares > 1:
            dist.all_reduce(values)
            values /= self.shares
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


def num_processes() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


@contextmanager
def joined(device: str, split: Split | None = None) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started, or is a world of one.

    Args:
        device: As the user named it: under ``torchrun`` without an index, for each process has its
            own.
        split: How they share a model's layers, checked; None if they do not.

    Raises:
        UserError: Under ``torchrun``, ``device`` has an index; or inside, another process is gone.
    """
    if not launched():
        yield World(device=device)
        return
    if ":" in device:
        raise UserError(
            f"--device {device} is one device; under torchrun each process takes its own of "
            f"--device {device.partition(':')[0]}"
        )
    rank, size = int(os.environ["RANK"]), num_processes()
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(rank, size, device, split)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise UserError(
            "another process is gone, and training cannot go on without it; --resume continues "
            f"from the last checkpoint ({str(error).partition('. ')[0]})"
        ) from error
    # Not after an exception: the others may be waiting in a collective, and torchrun ends them.
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    # NCCL has an exception of its own; gloo says in which of its files it was.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


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
