"""Matrices in shared memory, their products and the copy engine's stores, on their own."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from .build import runner_or_skip
from .cases import DTYPES, KINDS, ORDERS, encode_output, encode_tensor

ROWS, COLUMNS, RESULTS = 16, 64, 8


@pytest.mark.parametrize("flavour", ["plain", "sanitized"])
def test_products_and_copies(flavour: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        for order, ctas, pitch in [("forward", 1, 144), ("backward", 2, 144), ("random", 3, 128)]:
            # Integers: sums of products are exact.
            tiles = torch.randint(-8, 9, (ctas, ROWS, COLUMNS)).to(dtype)
            factors = torch.randint(-2, 3, (RESULTS, ROWS)).to(dtype)
            cases.append((order, ctas, pitch, tiles, factors))
    encoded = b""
    for order, ctas, pitch, tiles, factors in cases:
        encoded += struct.pack(
            "=5q", KINDS["matrices"], DTYPES[tiles.dtype], ORDERS[order], ctas, pitch
        )
        outputs = [torch.empty(ctas, ROWS, ROWS), torch.empty_like(tiles)]
        outputs.append(tiles.new_empty(ctas, RESULTS, COLUMNS))
        for tensor in (tiles, factors):
            encoded += encode_tensor(tensor, 1, 0, 0)
        for tensor in outputs:
            encoded += encode_output(tuple(tensor.shape), tensor.dtype, tensor.shape[-1])
    (tmp_path / "cases").write_bytes(encoded)
    runner_or_skip(flavour)(tmp_path / "cases", tmp_path / "results")
    data = bytearray((tmp_path / "results").read_bytes())
    position = 0

    def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nonlocal position
        count = torch.Size(shape).numel()
        taken = torch.frombuffer(data, dtype=dtype, count=count, offset=position)
        position += count * dtype.itemsize
        return taken.reshape(shape)

    for _, ctas, pitch, tiles, factors in cases:
        matrices, wavefronts = take(torch.int64, 2).tolist()
        # Rows 128 bytes apart meet in banks, 8 at a time; a pitch of 16 bytes more ends that.
        assert wavefronts == matrices * (1 if pitch % 128 else 8)
        wide = tiles.double()
        gram = take(torch.float32, ctas, ROWS, ROWS)
        assert torch.equal(gram.double(), wide @ wide.mT)
        assert torch.equal(take(tiles.dtype, *tiles.shape), tiles)
        mixes = take(tiles.dtype, ctas, RESULTS, COLUMNS)
        assert torch.equal(mixes, (factors.double() @ wide).to(tiles.dtype).roll(1, 0))
    assert position == len(data)
