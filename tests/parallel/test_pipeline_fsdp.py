"""Stages of a pipeline whose parameters are sharded over replicas."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.parallel.test_pipeline import Case, alone, pipeline, step


def train_sharded(rank, case):
    """Losses and gradients of a step; both replicas have the same microbatches, so that the mean of
    their gradients has the bits of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    model = case.model()
    keep = model.keep

    def sharded(stage):
        return fully_shard(keep(stage), mesh=mesh["dp"])

    model.keep = sharded
    stages, schedule = pipeline(case, case.plan(), mesh["pp"].get_group(), model)
    return step(case, stages, schedule, 1), {
        name: parameter.grad.full_tensor()
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_fsdp_inside(four, schedule):
    case = Case(schedule, num_ranks=2)
    losses, gradients = alone(case, steps=(1,))
    for its_losses, its_gradients in four.run(train_sharded, case):
        assert all(map(torch.equal, its_losses, losses))
        for name, gradient in its_gradients.items():
            assert torch.equal(gradient, gradients[0, name]), name
