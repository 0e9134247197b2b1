"""FSDP2 with a bfloat16 policy around the model, and float32 queries and key gains in it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from attnres_ext.parallel import SequenceParallel, support_dtensor
from tests.parallel.sharded_model import HIDDEN, VOCABULARY, own_channels, part_of, whole_model

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Trained(nn.Module):
    def __init__(self, model, checkpointing):
        super().__init__()
        self.model, self.checkpointing = model, checkpointing

    def forward(self, ids):
        model = self.model
        assert model.residual.queries[1].dtype == torch.float32
        assert model.norms[0].weight.dtype == torch.bfloat16
        hidden = model(model.residual.start(model.embed(ids)), self.checkpointing)
        assert hidden.dtype == torch.bfloat16
        return model.loss(hidden, ids)


def shard(trained, mesh):
    residual = trained.model.residual
    fully_shard(residual, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(residual, "start")
    for sublayer in trained.model.sublayers:
        fully_shard(sublayer, mesh=mesh, mp_policy=BF16)
    fully_shard(trained, mesh=mesh, mp_policy=BF16)


def gradients_of_one(model, batches):
    """Float32 sums of the gradients of a model in bfloat16 but for its residual's parameters."""
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if not name.startswith("residual"):
            parameter.data = parameter.data.bfloat16()
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for ids in batches:
        half.zero_grad()
        Trained(half, False)(ids).backward()
        for total, parameter in zip(sums, half.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad.float()
    return sums


def trains_as_one(rank, options, checkpointing, frozen):
    world = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(VOCABULARY, (2 * world, 2, 6), generator=generator).unbind()
    model = whole_model(dtype=torch.float32, **options)
    model.embed.requires_grad_(not frozen)
    expected = gradients_of_one(model, batches)
    trained = Trained(model, checkpointing)
    shard(trained, mesh)
    for _ in range(2):  # the second step finds everything as the first did
        trained.zero_grad()
        trained.set_requires_gradient_sync(False)
        trained(batches[rank]).backward()
        assert all(parameter.grad is None for parameter in trained.parameters())
        trained.set_requires_gradient_sync(True)
        trained(batches[world + rank]).backward()
        for parameter, total in zip(trained.parameters(), expected, strict=True):
            if not parameter.requires_grad:
                assert parameter.grad is None
                continue
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(
                parameter.grad.full_tensor(), total / world, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(
    ("two_phase", "checkpointing", "frozen"),
    [(False, False, False), (True, False, True), (True, True, False), (False, True, True)],
)
def test_float32_queries_in_a_bfloat16_policy(four, two_phase, checkpointing, frozen):
    four.run(trains_as_one, {"two_phase": two_phase}, checkpointing, frozen)


class Sequences(nn.Module):
    """A part of a model on a sequence's part; gradients are its group's, and its replicas'."""

    def __init__(self, part, parallel):
        super().__init__()
        self.part, self.parallel = part, parallel

    def forward(self, ids):
        shards = self.parallel.shards(ids.shape[1])
        own = shards.part(ids, 1)
        hidden = self.part(self.parallel.start(self.part.embed(own), shards))
        return self.part.loss(hidden, own)


def on_a_plane(rank):
    """Replicas over one dimension of a mesh, tensor and sequence parallelism over the other."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    replica, place = mesh.get_coordinate()
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(VOCABULARY, (2, 2, 5), generator=generator).unbind()
    whole = whole_model()
    for ids in batches:
        (whole.loss(whole(whole.residual.start(whole.embed(ids))), ids) / 2).backward()
    part = part_of(whole, place, 2)
    parallel = SequenceParallel(part.residual, mesh["tensor"])
    sequences = Sequences(part, parallel)
    fully_shard(part.residual, mesh=mesh["data"], reshard_after_forward=False)
    register_fsdp_forward_method(part.residual, "start")
    fully_shard(sequences, mesh=mesh["data"])
    sequences(batches[replica]).backward()
    parallel.reduce_gradients(part.used_on_shards())
    for (name, actual), expected in zip(part.named_parameters(), whole.parameters(), strict=True):
        expected = own_channels(name, expected.grad, place, 2)
        tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            actual.grad.full_tensor(), expected, rtol=tolerance, atol=tolerance
        )


def test_with_sequence_parallelism(four):
    four.run(on_a_plane)


class Stack(nn.Module):
    """Sublayers that work on tokens alone, so that they stay sharded throughout."""

    def __init__(self, model):
        super().__init__()
        self.residual, self.norms, self.sublayers = model.residual, model.norms, model.sublayers

    def forward(self, x):
        state = self.residual.start(x)
        for site, sublayer in enumerate(self.sublayers):
            norm = self.norms[site]
            hidden = state.read(site, norm.weight, norm.eps)
            state.write(sublayer.down(sublayer.up(hidden).tanh()))
        return state.read_output(self.norms[-1].weight, self.norms[-1].eps)


def on_dtensors(rank):
    """Gradients of queries are partial over tokens and over replicas: FSDP reduces both."""
    support_dtensor()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    replica, _ = mesh.get_coordinate()
    generator = torch.Generator().manual_seed(7)
    batches = torch.randn(2, 2, 5, HIDDEN, generator=generator, dtype=torch.float64).unbind()
    whole, stack = Stack(whole_model()), Stack(whole_model())
    for x in batches:
        (whole(x).square().sum() / 2).backward()
    distribute_module(stack, mesh["tensor"])
    fully_shard(stack.residual, mesh=mesh["data"], reshard_after_forward=False)
    register_fsdp_forward_method(stack.residual, "start")
    fully_shard(stack, mesh=mesh["data"])
    shard = distribute_tensor(batches[replica], mesh["tensor"], [Shard(1)])
    hidden = stack(shard)
    assert hidden.placements == (Shard(1),)
    hidden.full_tensor().square().sum().backward()
    for actual, expected in zip(stack.parameters(), whole.parameters(), strict=True):
        tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            actual.grad.full_tensor(), expected.grad, rtol=tolerance, atol=tolerance
        )


def test_with_dtensor(four):
    four.run(on_dtensors)
