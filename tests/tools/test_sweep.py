"""The sweep over configurations: what it tries, leaves out and says. Timing needs a device."""

from __future__ import annotations

import os

import pytest

from tests.tool import load_tool

tool = load_tool("sweep")
SHAPE = tool.Shape(9, 8192, 2304)


class Device:
    """Pretends to time calls: a second each, and only clusters of up to 2 fit."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, config: str) -> float:
        assert os.environ["ATTNRES_CUDA_CONFIG"] == config
        self.now += 1
        if "cluster=4" in config or "cluster=8" in config:
            raise RuntimeError("ATTNRES_CUDA_CONFIG asks for what does not fit")
        if config == "cluster=2,columns=192,stages=3":
            return 100.0
        return {"": 120.0, "depth_attention=rows": 200.0}.get(config, 150.0)


def test_the_best_stands_beside_the_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNRES_CUDA_CONFIG", raising=False)
    device = Device()
    timings = tool.sweep(SHAPE, device, copy=90.0, seconds=1e6, clock=lambda: device.now)
    assert timings.left_out == 0
    assert not any("cluster=4" in config for config in timings.calls)
    line = timings.line()
    assert line.startswith("N9xD2304: copy 90.0 us, chosen 120.0 us (0.75 of copy), best 100.0 us")
    assert "with cluster=2,columns=192,stages=3, general body 200.0 us" in line
    assert "ATTNRES_CUDA_CONFIG" not in os.environ


def test_it_ends_in_time_and_says_what_it_has_not_reached() -> None:
    device = Device()
    timings = tool.sweep(SHAPE, device, copy=90.0, seconds=10, clock=lambda: device.now)
    assert device.now == 11
    assert timings.left_out == len(list(tool.configurations("depth_attention"))) - 11
    # The chosen one is timed however little time there is.
    timings = tool.sweep(SHAPE, device, copy=90.0, seconds=0, clock=lambda: device.now)
    assert list(timings.calls) == ["", "depth_attention=rows"]


def test_a_fault_is_not_taken_for_what_does_not_fit() -> None:
    def fails(config: str) -> float:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tool.sweep(SHAPE, fails, copy=1.0, seconds=1)


@pytest.mark.parametrize(
    ("operator", "count"),
    [("depth_attention", 4 * 4 * 4 * 3), ("inter_block_attention", 5 * 3 * 2 * 3 * 3)],
)
def test_every_configuration_is_asked_for_once(operator: str, count: int) -> None:
    configs = list(tool.configurations(operator))
    assert len(configs) == len(set(configs)) == 2 + count
    assert configs[1] == f"{operator}=rows"
    assert {shape.operator for shape in tool.SHAPES} == set(tool.WISHES)
    assert len({shape.name for shape in tool.SHAPES}) == len(tool.SHAPES)
