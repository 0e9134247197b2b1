"""Attention Residuals on DTensor: torch's own tensor parallelism around the sublayers, depth
attention on each rank's part of the sequence.

    torchrun --nproc-per-node 2 examples/dtensor_residual.py

trains a stack of feed-forward layers on a made-up task, whole and in parts, and prints both losses.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from attnres_ext import AttentionResiduals
from attnres_ext.parallel import support_dtensor

HIDDEN, SUBLAYERS = 32, 6


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual = AttentionResiduals(HIDDEN, SUBLAYERS, sublayers_per_block=2)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(SUBLAYERS + 1))
        self.sublayers = nn.ModuleList(FeedForward() for _ in range(SUBLAYERS))

    def forward(self, x: Tensor) -> Tensor:
        state = self.residual.start(x)
        for site, (norm, sublayer) in enumerate(zip(self.norms, self.sublayers, strict=False)):
            state.write(sublayer(state.read(site, norm.weight, norm.eps)))
        return state.read_output(self.norms[-1].weight, self.norms[-1].eps)


def parallelize(stack: Stack, mesh: dist.DeviceMesh) -> None:
    """Splits sublayers over their channels; tokens are sharded wherever depth attention runs."""
    distribute_module(stack.residual, mesh)  # replicated
    distribute_module(stack.norms, mesh)
    for sublayer in stack.sublayers:
        plan = {
            # Gathers the normalised input ...
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            # ... and reduces and scatters the output.
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(sublayer, mesh, plan)


def main() -> None:
    dist.init_process_group("gloo")
    support_dtensor()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = Stack()
    parts = copy.deepcopy(whole)
    parallelize(parts, mesh)
    turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (whole, parts)]
    for step in range(5):
        x = torch.randn(2, 16, HIDDEN)
        losses = []
        for model, optimizer in zip((whole, parts), optimizers, strict=True):
            given = x if model is whole else distribute_tensor(x, mesh, [Shard(1)])
            hidden = model(given)
            if isinstance(hidden, DTensor):
                assert hidden.placements == (Shard(1),)
                hidden = hidden.redistribute(placements=[Replicate()]).to_local()
            loss = (hidden - x @ turn).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step}: {losses[0]:.5f} alone, {losses[1]:.5f} in parts")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
