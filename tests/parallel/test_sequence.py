"""Blocks sharded along the sequence: the same model on one device and on several ranks."""

import time

import pytest
import torch
import torch.distributed as dist

from attnres_ext import AttentionResiduals
from attnres_ext.parallel import SequenceParallel
from tests.parallel.sharded_model import (
    HIDDEN,
    SUBLAYERS,
    VOCABULARY,
    own_channels,
    part_of,
    whole_model,
)
from tests.tool import load_tool

MODES = [
    {"mode": "standard"},
    {"two_phase": False},
    {"two_phase": True, "save": "nothing"},
    {"mode": "full", "save": "output"},
]
# Over four ranks: equal parts, a short one, and ranks without tokens.
LENGTHS = (8, 7, 2)
WORLD = 4


def close(actual, expected):
    # Sums over ranks are taken in another order, in float64; query and gains' are float32.
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def examples(length, microbatches=1, batch=2):
    generator = torch.Generator().manual_seed(length)
    draw = torch.randint(VOCABULARY, (microbatches, 2, batch, length), generator=generator)
    return [tuple(pair) for pair in draw]


def trains_as_one(rank, options, length, checkpointing=False, microbatches=1):
    whole = whole_model(**options)
    part = part_of(whole, rank, WORLD, **options)
    parallel = SequenceParallel(part.residual)
    shards = parallel.shards(length)
    for ids, targets in examples(length, microbatches):
        expected = whole(whole.residual.start(whole.embed(ids)))
        whole.loss(expected, targets).backward()
        state = parallel.start(part.embed(shards.part(ids, 1)), shards)
        hidden = part(state, checkpointing)
        assert hidden.shape == (2, len(shards.own), HIDDEN)
        close(hidden, shards.part(expected))
        close(shards.gather(hidden), expected)
        part.loss(hidden, shards.part(targets, 1)).backward()
    parallel.reduce_gradients(part.used_on_shards())
    for (name, actual), expected in zip(part.named_parameters(), whole.parameters(), strict=True):
        close(actual.grad, own_channels(name, expected.grad, rank, WORLD))


def leaves_frozen_parameters_alone(rank):
    part = part_of(whole_model(), rank, WORLD)
    part.embed.requires_grad_(False)
    part.residual.queries[1].requires_grad_(False)
    parallel = SequenceParallel(part.residual)
    shards = parallel.shards(6)
    ((ids, targets),) = examples(6)
    state = parallel.start(part.embed(shards.part(ids, 1)), shards)
    part.loss(part(state), shards.part(targets, 1)).backward()
    parallel.reduce_gradients(part.used_on_shards())
    assert part.embed.weight.grad is None
    assert part.residual.queries[1].grad is None
    assert part.residual.queries[2].grad.abs().max() > 0


def goes_on_elsewhere(rank):
    """In two pieces, as the stages of a pipeline whose ranks are themselves groups."""
    whole = whole_model()
    part = part_of(whole, rank, WORLD)
    ((ids, targets),) = examples(7)
    whole.loss(whole(whole.residual.start(whole.embed(ids))), targets).backward()
    parallel = SequenceParallel(part.residual)
    shards = parallel.shards(7)
    state = parallel.start(part.embed(shards.part(ids, dim=1)), shards)
    for site in range(3):
        part.layer(state, site)
    suspended = state.suspend()
    received = suspended.detach()
    with pytest.raises(ValueError, match=r"resume: suspended.tensors\[0\] has shape"):
        parallel.resume(received, parallel.shards(40))
    state = parallel.resume(received, shards)
    for site in range(3, SUBLAYERS):
        part.layer(state, site)
    hidden = state.read_output(part.norms[-1].weight, part.norms[-1].eps)
    part.loss(hidden, shards.part(targets, dim=1)).backward()
    suspended.backward(received.gradients)
    parallel.reduce_gradients(part.used_on_shards())
    for (name, actual), expected in zip(part.named_parameters(), whole.parameters(), strict=True):
        close(actual.grad, own_channels(name, expected.grad, rank, WORLD))


def other_layouts(rank):
    """Tokens first, as Megatron has them; tokens alone; a mesh in the place of a group."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    x = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    residual = AttentionResiduals(4, 2, sublayers_per_block=1)
    for whole, dim in ((x, 0), (x[:, 0], 0), (x[:, 0], -2), (x.transpose(0, 1), 1)):
        shards = SequenceParallel(residual, mesh, dim=dim).shards(7)
        part = shards.part(whole).clone().requires_grad_()
        gathered = shards.gather(part)
        assert torch.equal(gathered, whole)
        (gathered * whole).sum().backward()
        close(part.grad, WORLD * shards.part(whole))
        addend = whole.clone().requires_grad_()
        summed = shards.scatter_sum((rank + 1) * addend)
        close(summed, shards.part(whole) * sum(range(1, WORLD + 1)))
        (summed * shards.part(whole)).sum().backward()
        close(addend.grad, (rank + 1) * whole)


def settled(kept, wanted):
    """What is kept; a thread of gloo may take a moment to let go of what it has sent."""
    for _ in range(100):
        if kept.live() <= wanted:
            break
        time.sleep(0.02)
    return kept.live()


def keeps_its_part(rank):
    """Each rank holds N * (T/P) * D values, in training and in a cache."""
    batch, length = 2, 4096
    part = part_of(whole_model(save="nothing"), rank, WORLD, save="nothing")
    parallel = SequenceParallel(part.residual)
    shards = parallel.shards(length)

    def written():
        return torch.zeros(batch, length // WORLD, HIDDEN, dtype=torch.float64)

    embedding = written().requires_grad_()
    KeptBytes = load_tool("training_memory").KeptBytes  # noqa: N806
    with KeptBytes(embedding) as kept:
        state = parallel.start(embedding, shards)
        for site in range(SUBLAYERS):
            assert state.read(site).shape == (batch, length, HIDDEN)
            state.local.write(written())
        # A sum for each sublayer, which a standard residual keeps, too, and no gathered tensor.
        assert settled(kept, SUBLAYERS * embedding.nbytes) == SUBLAYERS * embedding.nbytes
    with KeptBytes(embedding) as kept:
        hidden = part(parallel.start(embedding, shards), checkpointing=True)
        # Sublayers are repeated with their reads: the same sums, the result, and small change.
        most = (SUBLAYERS + 1.1) * embedding.nbytes
        assert hidden.nbytes + SUBLAYERS * embedding.nbytes <= settled(kept, most) <= most
    # In a cache the embedding has a slot, and each token of a slot its 1/rms.
    cache = parallel.new_cache((batch, length), dtype=torch.bfloat16)
    assert cache.shape == (batch, length // WORLD, HIDDEN)
    slots = part.residual.num_blocks + 1
    assert cache.nbytes == slots * batch * (length // WORLD) * (HIDDEN * 2 + 4)
    # Kimi K3, in sizes without values.
    big = AttentionResiduals(7168, 186, sublayers_per_block=24, device="meta")
    whole = SequenceParallel(big).new_cache(2**17, dtype=torch.bfloat16, device="meta")
    tokens = 2**17 // WORLD
    assert whole.nbytes == 9 * tokens * (7168 * 2 + 4)


def refuses(rank):
    part = part_of(whole_model(), rank, WORLD)
    parallel = SequenceParallel(part.residual)
    shards = parallel.shards(8)
    with pytest.raises(ValueError, match="start: embedding has shape .2, 8, 12., expected 2 tokens "
                       f"along dimension -2: rank {rank}'s part of 8 over 4"):  # fmt: skip
        parallel.start(torch.zeros(2, 8, HIDDEN), shards)
    state = parallel.start(torch.zeros(2, 2, HIDDEN), shards)
    assert state.site == 0
    assert state.read(0).shape == (2, 8, HIDDEN)
    assert state.site == 1
    with pytest.raises(ValueError, match=r"write: x has shape .2, 2, 12., expected 8 tokens"):
        state.write(torch.zeros(2, 2, HIDDEN))
    with pytest.raises(TypeError, match="write: x is a NoneType, expected a tensor"):
        state.write(None)
    with pytest.raises(ValueError, match="length is -1"):
        parallel.shards(-1)
    with pytest.raises(ValueError, match="dim is -1, the hidden size"):
        SequenceParallel(part.residual, dim=-1)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_checkpointed_training(four, options):
    four.run(trains_as_one, options, 7, True)


@pytest.mark.parametrize("length", LENGTHS)
def test_training(four, length):
    """The gradients of several microbatches are reduced together."""
    four.run(trains_as_one, {}, length, False, max(1, length // 3))


@pytest.mark.parametrize(
    "function",
    [leaves_frozen_parameters_alone, goes_on_elsewhere, other_layouts, keeps_its_part, refuses],
)
def test_shards(four, function):
    four.run(function)


def prefill(rank):
    for options in MODES:
        for side in ({}, {"reuse_result": True}):
            in_chunks(rank, options, side)


@torch.no_grad()
def in_chunks(rank, options, cache_options):
    """A prompt of 13 tokens in chunks of 8: each chunk goes through all layers, in one cache."""
    whole = whole_model(**options)
    part = part_of(whole, rank, WORLD, **options)
    parallel = SequenceParallel(part.residual)
    chunk, batch = 8, 2
    ((ids, _),) = examples(13)
    cache = parallel.new_cache((batch, chunk), dtype=torch.float64, **cache_options)
    if options.get("mode") != "standard":
        assert cache.capacity == whole.residual.num_blocks + 1
    for begin in range(0, 13, chunk):
        part_ids = ids[:, begin : begin + chunk]
        expected = whole(whole.residual.start(whole.embed(part_ids)))
        shards = parallel.shards(part_ids.shape[1])
        own = shards.part(part_ids, 1)
        state = parallel.start(part.embed(own), shards, cache.resized(own.shape))
        close(shards.gather(part(state)), expected)


def test_prefill(four):
    four.run(prefill)


def test_no_process_group():
    with pytest.raises(RuntimeError, match="there is no process group"):
        SequenceParallel(AttentionResiduals(4, 2))


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_layer_is_compiled_in_one_graph():
    model = whole_model(two_phase=False)
    parallel = SequenceParallel(model.residual)
    shards = parallel.shards(6)
    ((ids, targets),) = examples(6)
    expected = whole_model(two_phase=False)
    expected.loss(expected(expected.residual.start(expected.embed(ids))), targets).backward()
    eager, compiled = model.layer, torch.compile(model.layer, backend="aot_eager", fullgraph=True)
    model.layer = lambda state, site: (compiled if site == 2 else eager)(state, site)
    model.loss(model(parallel.start(model.embed(ids), shards)), targets).backward()
    for actual, one in zip(model.parameters(), expected.parameters(), strict=True):
        close(actual.grad, one.grad)
