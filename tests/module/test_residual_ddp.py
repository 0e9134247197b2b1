"""AttentionResiduals inside DistributedDataParallel, which waits for every parameter's gradient."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tests.module.naive_residual import Toy
from tests.module.test_checkpointing import FORWARDS
from tests.module.test_residual import embed, toy
from tests.module.test_residual_autograd import OPTIONS, every_mode


class Model(nn.Module):
    """A model whose forward is one of several."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.run = model, partial(forward, model)

    def forward(self, x):
        return self.run(x)


def gradients_agree(options, forward, rank, world):
    """Gradients of microbatches gathered by a world of processes are those of one that has all."""
    alone = toy(**options)
    model = copy.deepcopy(alone)
    parallel = DistributedDataParallel(Model(model, forward))
    for _ in range(2):  # the reducer is ready for another step only if the one before was complete
        parts = [embed(3, seed=seed) for seed in range(3 * world)]
        mine = parts[rank::world]
        with parallel.no_sync():
            for part in mine[:-1]:
                parallel(part).square().sum().backward()
        parallel(mine[-1]).square().sum().backward()
        for part in parts:
            (alone(part).square().sum() / world).backward()
        for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@every_mode
@pytest.mark.parametrize("forward", [Toy.__call__, FORWARDS["layers"]], ids=["plain", "layers"])
def test_microbatches_without_synchronisation(options, forward):
    gradients_agree(options, forward, rank=0, world=1)


def in_every_mode(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    for options in OPTIONS:
        gradients_agree(*options.values, Toy.__call__, rank, world)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """Each has other microbatches; the last one's backward adds up over both."""
    # Forked: importing torch takes longer than all that they compute.
    store = str(tmp_path / "store")
    multiprocessing.start_processes(in_every_mode, (2, store), nprocs=2, start_method="fork")
