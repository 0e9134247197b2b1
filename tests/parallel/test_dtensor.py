"""The operators and the module on ``DTensor``: the same numbers as on one device."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import attnres_ext
from attnres_ext.parallel import support_dtensor
from tests.parallel.sharded_model import HIDDEN, SUBLAYERS, whole_model

BATCH, LENGTH = 2, 5  # of which four ranks have 2, 2, 1 and none
LAYOUTS = [[Shard(1)], [Shard(0)], [Replicate()]]


def close(actual, expected):
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tokens(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=dtype)


def vectors(seed, *leading):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, HIDDEN, generator=generator, dtype=torch.float64)


def operators():
    """Calls of each function with tensors like tokens, and vectors."""
    f = attnres_ext
    stack = torch.stack
    return {
        "depth_attention": lambda t, v: f.depth_attention(
            t, v[0], v[1], out_weight=v[2], return_weights=True
        ),
        "weights alone": lambda t, v: f.depth_attention(t, v[0], v[1], return_weights=True)[1],
        "saved mix": lambda t, v: f.depth_attention(t, v[0], out_weight=v[1], save="output"),
        "recomputed": lambda t, v: f.depth_attention(t, v[0], save="nothing"),
        "accumulate": lambda t, v: f.accumulate_depth_attention(
            t[0], t[1], t[2:], v[0], v[1], out_weight=v[2]
        ),
        "first of a block": lambda t, v: f.accumulate_depth_attention(None, t[0], t[1:], v[0]),
        "two phases": lambda t, v: two_phases(t, v, stack),
        "direct": lambda t, v: torch.ops.attnres.depth_attention(t, v[0], v[1]),
        "direct with statistics": lambda t, v: torch.ops.attnres.depth_attention_with_stats(
            t, v[0], v[1]
        )[0],
        "direct accumulation": lambda t, v: torch.ops.attnres.accumulate_depth_attention(
            t[0], t[1], t[2:], v[0], v[1]
        ),
    }


def two_phases(t, v, stack):
    f = attnres_ext
    out, lse = f.inter_block_attention(t[2:], stack(v[:2]), stack(v[1:]))
    return f.merge_partial(out[1], lse[1], t[0], t[1], v[1], v[2], out_weight=v[0])


def results_of(call, t, v):
    found = call(t, v)
    return found if isinstance(found, tuple) else (found,)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def operator_agrees(call, mesh, placements):
    plain = [tokens(seed).requires_grad_() for seed in range(4)]
    weights = [vectors(seed).requires_grad_() for seed in range(10, 13)]
    shards = [distribute_tensor(x.detach(), mesh, placements).requires_grad_() for x in plain]
    everywhere = [Replicate()] * mesh.ndim
    copies = [distribute_tensor(w.detach(), mesh, everywhere).requires_grad_() for w in weights]

    expected = results_of(call, plain, weights)
    actual = results_of(call, shards, copies)
    for one, other in zip(actual, expected, strict=True):
        assert isinstance(one, DTensor)
        assert one.shape == other.shape
        close(whole(one), other)
    if actual[0].shape == shards[0].shape:
        assert actual[0].placements == tuple(placements)
    with torch.no_grad():  # another way through the library
        for one, other in zip(results_of(call, shards, copies), expected, strict=True):
            close(whole(one), other)

    def scalar(results):
        return sum((result * result).sum() for result in results)

    scalar(expected).backward()
    total = scalar([whole(result) for result in actual])
    total.backward()
    close(total, scalar(expected))
    for one, other in zip([*shards, *copies], [*plain, *weights], strict=True):
        if other.grad is None:
            assert one.grad is None
            continue
        close(whole(one.grad), other.grad)
    for one in copies:  # partial sums, that nothing was sent for
        if one.grad is not None:
            wanted = [Partial() if isinstance(p, Shard) else Replicate() for p in placements]
            assert list(one.grad.placements) == wanted


def module_agrees(mesh, placements, options):
    """A model whose sublayers work on tokens alone, so that their inputs may stay sharded."""
    alone = whole_model(**options)
    model = copy.deepcopy(alone)
    distribute_module(model, mesh)

    def forward(model, embedding):
        state = model.residual.start(embedding)
        for site in range(SUBLAYERS):
            norm, mixer = model.norms[site], model.sublayers[site]
            state.write(mixer.down(mixer.up(state.read(site, norm.weight, norm.eps)).tanh()))
        return state.read_output(model.norms[-1].weight, model.norms[-1].eps)

    x = tokens(3).requires_grad_()
    shard = distribute_tensor(x.detach(), mesh, placements).requires_grad_()
    expected, actual = forward(alone, x), forward(model, shard)
    assert actual.placements == tuple(placements)
    close(whole(actual), expected)
    expected.square().sum().backward()
    whole(actual).square().sum().backward()
    close(whole(shard.grad), x.grad)
    for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        if name.startswith(("embed", "head")):
            continue
        close(whole(one.grad), other.grad)


def refuses(rank):
    support_dtensor()
    mesh = line()
    plain = tokens(1)
    rows = distribute_tensor(plain, mesh, [Shard(1)])
    columns = distribute_tensor(plain, mesh, [Shard(2)])
    query = distribute_tensor(vectors(2), mesh, [Replicate()])
    op = attnres_ext.depth_attention
    with pytest.raises(RuntimeError, match=r"sources\[0\] has placements .* sharded along D"):
        op([columns, columns], query)
    with pytest.raises(RuntimeError, match=r"sources\[1\] has placements .*Shard\(dim=2\)"):
        op([rows, columns], query)
    with pytest.raises(RuntimeError, match=r"sources\[1\] has placements .*redistribute it first"):
        op([rows, distribute_tensor(plain, mesh, [Replicate()])], query)
    with pytest.raises(RuntimeError, match=r"sources\[1\] is a plain tensor"):
        op([rows, plain], query)
    with pytest.raises(RuntimeError, match=r"query is a plain tensor.*Replicate"):
        op([rows], vectors(2))
    with pytest.raises(RuntimeError, match=r"query has placements .*Shard\(dim=0\)"):
        op([rows], distribute_tensor(vectors(2), mesh, [Shard(0)]))
    sums = DTensor.from_local(plain, mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"sources\[0\] has .* expected no partial sum"):
        op([sums], query)
    cache = attnres_ext.BlockCache(2, (BATCH, LENGTH), HIDDEN, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a block cache takes no DTensor"):
        cache.write(rows)


def line():
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def operators_agree(rank, placements):
    support_dtensor()
    support_dtensor()  # again does nothing
    mesh = line()
    for call in operators().values():
        operator_agrees(call, mesh, placements)


def modules_agree(rank, options):
    support_dtensor()
    module_agrees(line(), [Shard(1)], options)


def on_a_plane(rank):
    """Sequences over one dimension of the mesh, their tokens over the other."""
    support_dtensor()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
    placements = [Shard(0), Shard(1)]
    for name in ("depth_attention", "two phases"):
        operator_agrees(operators()[name], mesh, placements)


@pytest.mark.parametrize("placements", LAYOUTS, ids=str)
def test_operators(four, placements):
    four.run(operators_agree, placements)


@pytest.mark.parametrize(
    "options", [{"two_phase": False}, {"two_phase": True}, {"mode": "standard"}], ids=str
)
def test_modules(four, options):
    four.run(modules_agree, options)


def test_two_dimensions(four):
    four.run(on_a_plane)


def test_what_would_need_communication_is_refused(four):
    four.run(refuses)
