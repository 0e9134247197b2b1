"""Phase 1 on a side stream, which here runs as late as it may: only when somebody waits for it.

What is tested is who waits for whom.
"""

import pytest
import torch

from attnres_ext import side_stream
from attnres_ext.cache import BlockCache
from tests.late_stream import late_phase1
from tests.module.test_residual import D, embed, toy


@pytest.fixture
def fake(monkeypatch):
    """``(side stream, log)`` of a machine where phase 1 is late."""
    with late_phase1(monkeypatch) as streams:
        yield streams


OPTIONS = [{"sublayers_per_block": size, "two_phase": True} for size in (1, 2, 3, 7, 9)]


@pytest.mark.parametrize("options", OPTIONS)
def test_results_are_those_of_one_stream(options, fake):
    side, log = fake
    model = toy(**options).float()
    caches = [model.residual.new_cache(4, side_stream=stream) for stream in (side, None)]
    expected = toy(**options).float()
    for seed in range(3):  # the memory is used again
        x = embed(4, dtype=torch.float32, seed=seed)
        actual = model(x, cache=caches[0])
        torch.testing.assert_close(actual, expected(x), rtol=1e-5, atol=1e-5)
    assert log[:3] == ["side waits for main", "phase 1 starts", "main waits for side"]
    assert log.count("phase 1 starts") == 3 * model.residual.num_blocks
    assert log.count("main waits for side") == log.count("phase 1 starts")


def test_a_sublayer_hides_it(fake):
    """Phase 1 starts when a block is closed, and is waited for at the next read."""
    side, log = fake
    model = toy(4, sublayers_per_block=2, two_phase=True).float()
    dense = model.sublayer

    def sublayer(site, x):
        log.append(f"sublayer {site}")
        return dense(site, x)

    model.sublayer = sublayer
    model(embed(4, dtype=torch.float32), cache=model.residual.new_cache(4, side_stream=side))
    start, wait = ["side waits for main", "phase 1 starts"], ["main waits for side"]
    expected = [*start, "sublayer 0", *wait, "sublayer 1", *start, "sublayer 2", *wait]
    assert log == [*expected, "sublayer 3"]


def test_memory_in_use_is_known_to_the_allocator(fake):
    side, _ = fake
    cache = BlockCache(3, 4, D, side_stream=side)
    cache.write(torch.randn(4, D))
    cache.close()
    queries, gains = torch.randn(2, D), torch.rand(2, D)
    cache.inter(queries, gains)
    used = {tensor.data_ptr() for tensor in side.used}
    assert {queries.data_ptr(), gains.data_ptr(), cache._slots.data_ptr()} <= used
    assert {scratch.data_ptr() for scratch in cache._phase1} <= used


def test_what_was_started_is_waited_for_before_its_memory_is_used_again(fake):
    side, log = fake
    cache = BlockCache(3, 4, D, side_stream=side)
    for reuse in (cache.reset, lambda: cache.inter(torch.zeros(1, D)), cache.resized(3).reset):
        cache.reset()
        cache.write(torch.randn(4, D))
        cache.close()
        cache.inter(torch.randn(2, D))
        log.clear()
        reuse()
        assert log[0] == "main waits for side"


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_capture_cannot_wait_for_is_forgotten(captured, fake, monkeypatch):
    """A forward stopped with phase 1 under way; the next one is on the other side of a capture's
    begin or end."""
    side, log = fake
    cache = BlockCache(3, 4, D, side_stream=side)
    cache.write(torch.randn(4, D))
    cache.close()
    for then in (not captured, captured):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
        cache.inter(torch.randn(2, D))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda then=then: then)
        log.clear()
        cache.inter(torch.randn(2, D))
        assert ("main waits for side" in log) == (then == captured)


def test_a_stream_of_another_device(fake):
    side, _ = fake
    side.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match="side_stream is on cuda:1, expected cpu as the slots"):
        BlockCache(3, 4, D, side_stream=side)


def test_streams_are_where_there_are_any(monkeypatch):
    assert side_stream.new_stream(torch.device("cpu")) is None
    assert side_stream.new_stream(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream of", device))
    device = torch.device("cuda", 1)
    assert side_stream.new_stream(device) == ("stream of", device)
