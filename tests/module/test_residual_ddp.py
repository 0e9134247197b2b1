"""AttentionResiduals inside DistributedDataParallel, which waits for every parameter's gradient."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.module.naive_residual import Toy
from tests.module.test_checkpointing import FORWARDS
from tests.module.test_residual import embed, toy
from tests.module.test_residual_autograd import every_mode


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """A model whose forward is one of several."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.run = model, partial(forward, model)

    def forward(self, x):
        return self.run(x)


@every_mode
@pytest.mark.parametrize("forward", [Toy.__call__, FORWARDS["layers"]], ids=["plain", "layers"])
def test_microbatches_without_synchronisation(options, forward):
    alone = toy(**options)
    model = copy.deepcopy(alone)
    parallel = DistributedDataParallel(Model(model, forward))
    for _ in range(2):  # the reducer is ready for another step only if the one before was complete
        parts = [embed(3, seed=seed) for seed in range(3)]
        with parallel.no_sync():
            for part in parts[:-1]:
                parallel(part).square().sum().backward()
        parallel(parts[-1]).square().sum().backward()
        for part in parts:
            alone(part).square().sum().backward()
        for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-12, atol=1e-12)
