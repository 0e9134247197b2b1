"""A GPT in a pipeline whose ranks keep blocks for later stages, beside the same in one process.

    torchrun --nproc-per-node 4 examples/pipeline.py --schedule ZBVZeroBubble

Every rank also trains the whole model by itself and shows both losses: they are the same bits.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional as F

from attnres_ext import AttentionResiduals, SuspendedPass
from attnres_ext.parallel import (
    StagePlan,
    count_traffic,
    first_sites_of,
    place_stages,
    plan_pipeline,
    split_evenly,
)
from attnres_ext.parallel.pipeline import pipeline_stages

VOCABULARY, HIDDEN, LENGTH = 64, 32, 16
# Stages of a rank, and how they are placed.
SCHEDULES = {
    "GPipe": (1, "loop"),
    "1F1B": (1, "loop"),
    "Interleaved1F1B": (2, "loop"),
    "ZBVZeroBubble": (2, "v"),
    "DualPipeV": (2, "v"),
}


class Mixer(nn.Module):
    """A sublayer: every position sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x + x.cumsum(-2) / LENGTH)))


class Stretch(nn.Module):
    """The sites of a model that a stage has; all of them, without a stage.

    Names of parameters are the same in every split.
    """

    def __init__(self, num_sublayers: int, stage: StagePlan | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.residual = AttentionResiduals(HIDDEN, num_sublayers, sublayers_per_block=3)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.sublayers = nn.ModuleDict({str(site): Mixer() for site in range(num_sublayers)})
        self.norms = nn.ModuleDict({str(site): nn.RMSNorm(HIDDEN) for site in self.residual.sites})
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        if stage is not None:
            self.keep(stage)

    def keep(self, stage: StagePlan) -> None:
        """Drops what other stages have."""
        for parts in (self.sublayers, self.norms):
            for site in [site for site in parts if int(site) not in stage.sites]:
                del parts[site]
        if stage.index > 0:
            self.embedding = None
        if self.residual.num_sublayers not in stage.sites:
            self.head = None
        self.residual.keep_sites(stage.sites)

    def forward(self, x: Tensor | SuspendedPass) -> Tensor | SuspendedPass:
        if isinstance(x, SuspendedPass):
            state = self.residual.resume(x)
        else:
            state = self.residual.start(self.embedding(x))
        for site, sublayer in self.sublayers.items():
            state.write(sublayer(state.read(int(site), self.norms[site].weight)))
        if self.head is None:
            return state.suspend()
        return self.head(state.read_output(self.norms[str(state.site)].weight))


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(size: int, step: int) -> tuple[Tensor, Tensor]:
    """Sequences that count up, from anywhere: the next token is one more."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (size, 1), generator=generator)
    tokens = (first + torch.arange(LENGTH + 1)) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=SCHEDULES, default="Interleaved1F1B")
    parser.add_argument("--sublayers", type=int, default=22)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    num_ranks = dist.get_world_size()

    stages_per_rank, placement = SCHEDULES[options.schedule]
    num_stages = num_ranks * stages_per_rank
    num_microbatches = 2 * num_stages
    plan = plan_pipeline(
        options.sublayers,
        3,
        first_sites_of(split_evenly(options.sublayers, num_stages)),
        place_stages(num_ranks, stages_per_rank, placement),
        num_microbatches=num_microbatches,
    )
    stages = pipeline_stages(lambda stage: Stretch(options.sublayers, stage), plan, "cpu")
    schedule = get_schedule_class(options.schedule)(
        stages[0] if stages_per_rank == 1 else stages, num_microbatches, loss_fn=loss_of
    )
    alone = Stretch(options.sublayers)
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=1e-2)
        for module in (alone, *(stage.submod for stage in stages))
    ]
    # The losses are where the last stage is: not on rank 0, unless stages are placed in a V.
    shows = any(stage.is_last for stage in stages)
    traffic = count_traffic(plan)
    if shows:
        print(
            f"{options.schedule}: {num_stages} stages on {num_ranks} ranks; hops carry "
            f"{traffic.forward} tensors a microbatch, {traffic.naive} without a cache"
        )
    for step in range(options.steps):
        tokens, target = batch(2 * num_microbatches, step)
        losses: list[Tensor] = []
        inputs = (tokens,) if any(stage.is_first for stage in stages) else ()
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        expected = []
        for part, its_target in zip(tokens.split(2), target.split(2), strict=True):
            expected.append(loss_of(alone(part), its_target))
            expected[-1].backward()
        for parameter in alone.parameters():
            parameter.grad.div_(num_microbatches)  # as the schedule does
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if shows:
            mean, its_mean = (torch.stack(part).mean().item() for part in (expected, losses))
            same = "the same bits" if all(map(torch.equal, expected, losses)) else "other bits"
            print(f"step {step + 1}: {mean:.4f} alone, {its_mean:.4f} in parts, {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
