"""What the CTAs of a cluster tell one another, on its own."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
import torch

from .build import runner_or_skip
from .cases import KINDS, ORDERS

TEAMS, ROUNDS = 2, 6


@pytest.mark.parametrize("flavour", ["plain", "sanitized"])
def test_every_cta_gets_every_number(flavour: str, tmp_path: Path) -> None:
    ways = itertools.cycle(itertools.product((1, 33), (False, True)))
    cases = [
        (order, size, count, all_read)
        for (order, size), (count, all_read) in zip(
            [*itertools.product(ORDERS, (2, 4, 8)), ("random", 1)], ways, strict=False
        )
    ]
    encoded = [
        struct.pack("=5q", KINDS["exchange"], ORDERS[order], size, count, all_read)
        for order, size, count, all_read in cases
    ]
    (tmp_path / "cases").write_bytes(b"".join(encoded))
    runner_or_skip(flavour)(tmp_path / "cases", tmp_path / "results")
    data = bytearray((tmp_path / "results").read_bytes())
    position = 0
    for _, size, count, _ in cases:
        shape = (TEAMS, size, ROUNDS, count)
        numel = torch.Size(shape).numel()
        got = torch.frombuffer(data, dtype=torch.float32, count=numel, offset=position)
        position += numel * 4
        # CTA c gives (c + 1) * (round + i), and 1 beside it.
        ranks = torch.arange(1, TEAMS * size + 1).reshape(TEAMS, size).sum(1)
        steps = torch.arange(ROUNDS)[:, None] + torch.arange(count)
        want = ranks[:, None, None, None] * steps + size
        assert torch.equal(got.reshape(shape), want.expand(shape).float())
    assert position == len(data)
