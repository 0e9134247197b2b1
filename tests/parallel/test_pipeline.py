"""Pipelines of several processes, against one process that runs the same microbatches."""

from dataclasses import dataclass, field
from functools import reduce

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import get_schedule_class

from attnres_ext.parallel import first_sites_of, place_stages, plan_pipeline
from attnres_ext.parallel.pipeline import pipeline_stages
from tests.parallel.staged import batch, loss_of, make, train_alone

# Stages of a rank, placement, microbatches of four ranks.
SCHEDULES = {
    "GPipe": (1, "loop", 3),
    "1F1B": (1, "loop", 4),
    "Interleaved1F1B": (2, "loop", 4),
    "ZBVZeroBubble": (2, "v", 4),
    "DualPipeV": (2, "v", 8),
}


@dataclass
class Case:
    """A pipeline: stages of unlike sizes, which blocks of three do not fit."""

    schedule: str
    block: int | None = 3
    num_ranks: int = 4
    cache: str = "own"
    gradients: str = "chained"
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.stages_per_rank, self.placement, self.num_microbatches = SCHEDULES[self.schedule]
        num_stages = self.num_ranks * self.stages_per_rank
        self.sizes = [(1, 3, 2)[stage % 3] for stage in range(num_stages)]
        if self.schedule == "1F1B":
            self.sizes[0] = 0  # the first stage has the embedding alone

    def plan(self):
        return plan_pipeline(
            sum(self.sizes),
            self.block,
            first_sites_of(self.sizes),
            place_stages(self.num_ranks, self.stages_per_rank, self.placement),
            num_microbatches=self.num_microbatches,
            cache=self.cache,
            gradients=self.gradients,
            embedding_gradient=not self.frozen,
        )

    def model(self):
        return make(sum(self.sizes), self.block, self.dtype, self.frozen, **self.options)


def pipeline(case, plan, group, model):
    """This rank's stages, and the schedule that runs them."""
    stages = pipeline_stages(model.keep, plan, "cpu", group)
    one = case.stages_per_rank == 1
    schedule = get_schedule_class(case.schedule)(
        stages[0] if one else stages,
        n_microbatches=case.num_microbatches,
        loss_fn=loss_of,
        scale_grads=False,
    )
    return stages, schedule


def step(case, stages, schedule, seed, call="step"):
    """A step; the losses, where the last stage is."""
    tokens, target = batch(case.num_microbatches, seed)
    losses = []
    inputs = (tokens,) if any(stage.is_first for stage in stages) else ()
    last = {"target": target, "losses": losses} if any(stage.is_last for stage in stages) else {}
    getattr(schedule, call)(*inputs, **last)
    return [loss.detach() for loss in losses]


_groups = {}


def group_of(num_ranks):
    if num_ranks not in _groups:
        _groups[num_ranks] = dist.new_group(range(num_ranks))
    return _groups[num_ranks]


def train(rank, case):
    """Losses and gradients of two steps."""
    group = group_of(case.num_ranks)
    if rank >= case.num_ranks:
        return [], {}
    stages, schedule = pipeline(case, case.plan(), group, case.model())
    losses = [loss for seed in (1, 2) for loss in step(case, stages, schedule, seed)]
    for stage in stages:
        assert not len(stage.blocks), "blocks go with their microbatch"
        assert not stage._runs
        assert not stage._to_send
    return losses, {
        (stage.stage_index, name): parameter.grad
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }


def alone(case, in_pieces=False):
    """The same in one process; in pieces, where a cut block's phase 1 runs in each of them."""
    model = case.model()
    if in_pieces:
        parts = [model.keep(stage) for stage in case.plan().stages]
        runs = lambda x: reduce(lambda x, part: part(x), parts, x)  # noqa: E731
    else:
        parts, runs = [model], model
    losses = [loss for seed in (1, 2) for loss in train_alone(runs, case.num_microbatches, seed)]
    return losses, {
        (index, name): parameter.grad
        for index, part in enumerate(parts)
        for name, parameter in part.named_parameters()
    }


def compare(four, case, in_pieces=False, tolerance=0.0):
    losses, gradients = alone(case, in_pieces)
    found = 0
    for its_losses, its_gradients in four.run(train, case):
        if its_losses:
            assert all(map(torch.equal, its_losses, losses))
        for (stage, name), gradient in its_gradients.items():
            expected = gradients[stage if in_pieces else 0, name]
            if expected is None:
                assert gradient is None
            elif tolerance:
                scale = expected.abs().max().item()
                torch.testing.assert_close(
                    gradient, expected, rtol=0, atol=tolerance * scale, msg=name
                )
            else:
                assert torch.equal(gradient, expected), f"{name} of stage {stage}"
            found += 1
    assert found == len(gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", ["own", "received", "nothing"])
def test_one_process_has_the_same_bits(four, schedule, cache):
    compare(four, Case(schedule, cache=cache))


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("block", [None, 1, 4], ids=["standard", "full", "block"])
def test_in_bfloat16(four, schedule, block):
    compare(four, Case(schedule, block=block, dtype=torch.bfloat16))


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_in_two_phases(four, schedule):
    """Cut blocks run phase 1 in pieces: one process that is cut alike has the same bits."""
    compare(four, Case(schedule, options={"two_phase": True}), in_pieces=True)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("gradients", ["chained", "gathered"])
def test_a_frozen_embedding(four, schedule, gradients):
    case = Case(schedule, frozen=True, gradients=gradients)
    compare(four, case, tolerance=0.0 if gradients == "chained" else 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", ["own", "received"])
def test_gathered_gradients(four, schedule, cache):
    """Another order of adding; where a rank has one stage, there is but one."""
    case = Case(schedule, gradients="gathered", cache=cache)
    compare(four, case, tolerance=1e-5 if case.stages_per_rank > 1 else 0.0)
    (_, first), *_ = four.run(train, case)
    (_, again), *_ = four.run(train, case)
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_two_of_four_ranks(four, schedule):
    """The pipeline is a group of the world."""
    compare(four, Case(schedule, num_ranks=2))
