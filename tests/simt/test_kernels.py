"""No kernel is left out: each one that the library holds is what some operator launches."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnres_ext import depth_attention, inter_block_attention, merge_partial
from tests.ops.cases import make_sources
from tests.ops.ways import ROWS

from .device import DEVICES, Device, Simulator

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100 = DEVICES["h100"]
#: Kernels of a set, and the devices that launch them: on one multiprocessor rows are never few
#: enough to be shared.
SETS = {"sm80": [DEVICES["a100"]], "sm90": [H100, replace(H100, multiprocessors=1)]}

#: N, D and dtypes: short and long tables of sources, few and many values a thread.
DEPTH = [
    *itertools.product((3, 20), (264, 8200), ([BF16], [FP16])),
    *itertools.product((3, 20), (264,), ([FP32], [BF16, FP32])),
    # Enough to be shared by a cluster where tokens are few.
    *itertools.product((9, 20), (2304,), ([BF16], [FP16], [FP32], [BF16, FP32])),
    *itertools.product((3,), (67,), ([BF16], [FP64])),
    # So narrow, and so wide, that a warp of a tile has few columns or many.
    *itertools.product((3,), (72, 7168), ([BF16], [FP16])),
]
#: Wider than the eight CTAs of a cluster have room for.
WIDE = [*itertools.product((2, 17), (65544,), ([BF16], [FP16]))]
#: N, S, D and dtypes.
PHASE_ONE = [
    *itertools.product((3, 20), (3,), (264,), ([BF16], [FP16], [FP32], [BF16, FP32])),
    *itertools.product((3,), (3,), (67,), ([BF16], [FP64])),
    # Two tokens to a stage of the tile or one, and warps of all widths.
    *itertools.product((3, 9), (3,), (128, 192, 448), ([BF16], [FP16])),
]
#: D and dtypes: as many values of a row a thread as merging has kernels for.
MERGING = [*itertools.product((72, 2048, 2304), ([BF16], [FP16]))]


def launched_on(
    device: Device, simulator: Simulator, calls: Sequence[Any], merging: Sequence[Any] = ()
) -> set[str]:
    """Kernels of all those calls, forward and backward."""
    # More tokens than multiprocessors are not few.
    tokens = 2 if device.multiprocessors == 1 else 1
    found = set()
    with simulator.using(device, order="forward"):
        for count, *queries, hidden, dtypes in calls:
            sources = make_sources(count, (tokens, hidden), dtype=dtypes)
            leaves = [source.requires_grad_() for source in sources]
            query = (0.01 * torch.randn(*queries, hidden)).requires_grad_()
            if queries:
                out, _ = inter_block_attention(leaves, query)
            else:
                # With an output norm, too.
                gain = torch.ones(hidden, requires_grad=True)
                out = depth_attention(leaves, query, out_weight=gain)
                torch.autograd.grad(out.sum(), [*leaves, query, gain])
                out = depth_attention(leaves, query)
            torch.autograd.grad(out.sum(), [*leaves, query])
            found |= {launched.kernel for launched in simulator.launches()}
        for hidden, dtypes in merging:
            tensors = [t.requires_grad_() for t in make_sources(3, (tokens, hidden), dtype=dtypes)]
            query, lse = torch.zeros(hidden, requires_grad=True), torch.zeros(tokens)
            out, _ = merge_partial(tensors[0], lse, *tensors[1:], query)
            torch.autograd.grad(out.sum(), [*tensors, query])
            found |= {launched.kernel for launched in simulator.launches()}
    return found


def kernels_in(simulator: Simulator, name: str) -> set[str]:
    """Those that the library has in a set's namespace."""
    printed = subprocess.run(
        ["nm", "-DC", "--defined-only", simulator.path], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split(" ", 2)[2] for line in printed.splitlines() if line.count(" ") > 1}
    start = f"void attnres::cuda::{name}::"
    return {s for s in symbols if s.startswith(start) and "_kernel<" in s.split("(")[0]}


@pytest.mark.parametrize("name", SETS)
def test_every_kernel_is_launched(
    simulator: Simulator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator.launches()
    launched = set()
    for device in SETS[name]:
        monkeypatch.delenv("ATTNRES_CUDA_CONFIG", raising=False)
        launched |= launched_on(device, simulator, DEPTH + WIDE + PHASE_ONE, MERGING)
        monkeypatch.setenv("ATTNRES_CUDA_CONFIG", ROWS)
        launched |= launched_on(device, simulator, DEPTH + PHASE_ONE)
    kernels = kernels_in(simulator, name)
    assert kernels
    assert sorted(kernels - launched) == []
    assert sorted(launched - kernels) == []
