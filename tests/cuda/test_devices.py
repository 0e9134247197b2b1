"""Several devices in one process, and the same errors on each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import ops
from tests.cuda.calls import CALLS, DIRECTIONS, make_arguments, tensors_of
from tests.helpers import assert_same_bits

pytestmark = pytest.mark.cuda

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)
D = 24


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_another_than_the_current_device(name: str, direction: str) -> None:
    call = DIRECTIONS[direction](CALLS[name])
    arguments = make_arguments("cuda:0")
    expected = call(arguments)
    away = {
        key: [v.detach().to("cuda:1") for v in value]
        if isinstance(value, list)
        else value.detach().to("cuda:1")
        for key, value in arguments.items()
    }
    assert torch.cuda.current_device() == 0
    actual = call(away)
    assert torch.cuda.current_device() == 0
    for a, b in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert_same_bits(name, a.cpu(), b.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_sources_on_two_gpus() -> None:
    sources = [torch.randn(3, D, device=f"cuda:{i}") for i in range(2)]
    with pytest.raises(ERRORS, match=r"sources\[1\].*cuda:1.*cuda:0"):
        ops.depth_attention(sources, torch.randn(D, device="cuda:0"))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_two_kinds_of_device(name: str) -> None:
    """Any one tensor elsewhere is refused, before anything is launched."""
    count = len(tensors_of(make_arguments("cuda")))
    for away in range(count):
        arguments = make_arguments("cuda")
        moved = [t.cpu() if i == away else t for i, t in enumerate(tensors_of(arguments))]
        num_sources = len(arguments["sources"])
        names = [key for key in arguments if key != "sources"]
        changed = {
            "sources": moved[:num_sources],
            **dict(zip(names, moved[num_sources:], strict=True)),
        }
        if name == "inter_block_attention" and names[away - num_sources :][:1] == ["out_weight"]:
            continue  # it takes none
        with pytest.raises(ERRORS, match="cpu"):
            CALLS[name](changed)
    torch.cuda.synchronize()


def t(device: str, *shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, device=device, **options)


def rows(device: str, **options: Any) -> Tensor:
    return t(device, 3, D, **options)


#: Mistakes, as functions of the device.
MISTAKES: dict[str, Callable[[str], object]] = {
    "query-size": lambda d: ops.depth_attention([rows(d)], t(d, D + 1)),
    "query-dtype": lambda d: ops.depth_attention([rows(d)], t(d, D, dtype=torch.int64)),
    "no-sources": lambda d: ops.depth_attention([], t(d, D)),
    "source-shape": lambda d: ops.depth_attention([rows(d), t(d, 4, D)], t(d, D)),
    "source-dtype": lambda d: ops.depth_attention([rows(d, dtype=torch.int32)], t(d, D)),
    "eps": lambda d: ops.depth_attention([rows(d)], t(d, D), eps=-1.0),
    "too-many": lambda d: ops.depth_attention([rows(d)] * 257, t(d, D)),
    "delta-shape": lambda d: ops.accumulate_depth_attention(
        rows(d), t(d, 2, D), [rows(d)], t(d, D)
    ),
    "queries-rank": lambda d: ops.inter_block_attention([rows(d)], t(d, D)),
    "lse-shape": lambda d: ops.merge_partial(rows(d), t(d, 4), rows(d), rows(d), t(d, D)),
    "lse-dtype": lambda d: ops.merge_partial(
        rows(d), t(d, 3, dtype=torch.int64), rows(d), rows(d), t(d, D)
    ),
    "out-overlaps": lambda d: torch.ops.attnres.block_cache_write(
        t(d, 2, 3, D), t(d, 2, 3), rows(d), 5, False, 1e-6
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_same_sentence_as_on_the_cpu(mistake: str) -> None:
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(ERRORS) as caught:
            MISTAKES[mistake](device)
        messages.append(str(caught.value).replace("cuda:0", "cpu"))
    assert messages[0] == messages[1]
