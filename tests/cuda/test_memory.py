"""Memory: none is kept, and tensors may have more elements than 32 bits count."""

from __future__ import annotations

import gc

import pytest
import torch

from attnres_ext import ops, reference
from tests.cuda.calls import CALLS, DIRECTIONS, make_arguments
from tests.helpers import assert_as_good_as, assert_same_bits
from tests.ops.cases import make_weights

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_kept(name: str, direction: str) -> None:
    call = DIRECTIONS[direction](CALLS[name])
    arguments = make_arguments("cuda")
    for _ in range(3):
        call(arguments)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        call(arguments)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_the_driver_gives_nothing_beside_torch() -> None:
    """Free memory shrinks by what torch reserves alone: kernels take none of their own."""
    call = DIRECTIONS["forward-backward"](CALLS["depth_attention"])
    arguments = make_arguments("cuda", rows=4000)
    for _ in range(3):
        call(arguments)

    def taken_beside_torch() -> int:
        torch.cuda.synchronize()
        free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        for _ in range(50):
            call(arguments)
        torch.cuda.synchronize()
        taken = free - torch.cuda.mem_get_info()[0]
        return taken - (torch.cuda.memory_reserved() - reserved)

    # Other processes may take memory of the same GPU meanwhile, but hardly every time; what 50
    # calls leak of a kernel's scratch is more than this, every time.
    assert any(taken_beside_torch() < 32 * 2**20 for _ in range(10))


def rows_past_32_bits(hidden: int) -> int:
    """So many rows that the last ones start beyond element 2**31."""
    return 2**31 // hidden + 40


def need(num_bytes: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 1.1 * num_bytes:
        gib = 2**30
        pytest.skip(f"needs {num_bytes / gib:.0f} GiB of free GPU memory, found {free / gib:.0f}")


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward-backward"])
def test_more_elements_than_32_bits_count(gradients: bool) -> None:
    hidden = 4096
    tokens = rows_past_32_bits(hidden)
    x = tokens * hidden * torch.bfloat16.itemsize
    need((7 if gradients else 4) * x)
    sources = [torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    weights = make_weights(hidden, device="cuda")
    ends = torch.arange(8, device="cuda")
    middle = ends + tokens // 2
    sample = torch.cat([ends, middle, ends + tokens - 8])
    picked = [source[sample] for source in sources]
    if not gradients:
        out = ops.depth_attention(sources, **weights)
        # A row depends on itself alone, to the bit.
        assert_same_bits("output", out[sample], ops.depth_attention(picked, **weights))
        return

    upstream = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    upstream[sample] = torch.randn(len(sample), hidden, device="cuda").bfloat16()
    leaves = [*(source.requires_grad_() for source in sources), weights["query"].requires_grad_()]
    found = torch.autograd.grad(ops.depth_attention(sources, **weights), leaves, upstream)

    def small(module, dtype=None):
        inputs = [s.detach().to(dtype or s.dtype).requires_grad_() for s in picked]
        given = {n: w.detach().to(dtype or w.dtype) for n, w in weights.items()}
        given["query"].requires_grad_()
        out = module.depth_attention(inputs, **given)
        return torch.autograd.grad(out, [*inputs, given["query"]], upstream[sample].to(out.dtype))

    for name, whole, part in zip(("a", "b"), found, small(ops), strict=False):
        assert_same_bits(name, whole[sample], part)
        # Rows whose incoming gradient is zero get none.
        between = whole[8 : middle[0]]
        assert not bool(between.count_nonzero())
    assert_as_good_as(
        "gradient of query",
        found[2],
        small(reference)[2],
        small(reference, torch.float64)[2],
        terms=hidden * len(sample) * 2,
    )
