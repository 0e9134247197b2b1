"""Timing on a GPU that the test plays: what is captured and replayed, and what cannot be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from attnres_ext.benchmarks import runner
from attnres_ext.benchmarks.cuda_timing import CudaTimer
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.timing import Action, Effort


class Gpu:
    """Stands in for ``torch.cuda``: time passes only when work is launched or replayed."""

    def __init__(self, capturable: bool = True, gap: float = 0.0) -> None:
        self.capturable = capturable
        self.gap = gap  # seconds between two launches of the host, not between nodes of a graph
        self.now = 0.0
        self.capturing: Any = None
        self.graphs: list[Any] = []
        self.log: list[str] = []
        gpu = self

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[tuple[str, float]] = []
                gpu.graphs.append(self)

            def replay(self) -> None:
                for name, seconds in self.work:
                    gpu.log.append(name)
                    gpu.now += seconds

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                assert self.at is not None

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        self.CUDAGraph, self.Event, self.Stream = CUDAGraph, Event, Stream
        self.current: object = Stream()

    @contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        if not self.capturable:
            self.current = self.Stream()  # torch does not put the old one back, either
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        yield
        self.capturing = None

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def current_stream(self) -> object:
        return self.current

    def set_stream(self, stream: object) -> None:
        self.current = stream

    def synchronize(self) -> None: ...

    def launch(self, name: str, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.work.append((name, seconds))
            return
        self.log.append(name)
        self.now += seconds + self.gap


def test_a_graph_rotates_inputs_and_lasts_long_enough() -> None:
    gpu = Gpu()
    action = Action(lambda call: gpu.launch(f"input {call % 3}", 1e-5), period=3)
    sampler = CudaTimer(gpu).load(action, shortest=1e-3)
    assert sampler.timer == "graph"
    captured = gpu.graphs[-1].work
    assert len(captured) == 402  # whole periods that last four milliseconds
    assert len(gpu.graphs) == 1  # a capture takes a while
    assert [name for name, _ in captured[:4]] == ["input 0", "input 1", "input 2", "input 0"]
    gpu.log.clear()
    assert sampler.sample(1) == pytest.approx(1e-5)
    assert len(gpu.log) == 402
    assert sampler.sample(403) == pytest.approx(1e-5)
    assert len(gpu.log) == 3 * 402


def test_graphs_have_a_largest_size() -> None:
    gpu = Gpu()
    CudaTimer(gpu).load(Action(lambda _: gpu.launch("it", 1e-9), period=5), shortest=1.0)
    assert len(gpu.graphs[-1].work) == 2045
    # Inputs that outnumber it all take part.
    CudaTimer(gpu).load(Action(lambda _: gpu.launch("it", 1e-9), period=3000), shortest=1.0)
    assert len(gpu.graphs[-1].work) == 3000


def test_graphs_leave_out_what_launching_takes() -> None:
    gpu = Gpu(gap=2e-5)
    action = Action(lambda _: gpu.launch("it", 5e-6))
    sampler = CudaTimer(gpu).load(action, shortest=5e-4)
    assert sampler.sample(1) == pytest.approx(5e-6)
    # Long enough, although a call looked five times as long when it was launched by itself.
    assert len(gpu.graphs[-1].work) * 5e-6 > 0.5 * 5e-4


def test_what_cannot_be_captured_is_timed_between_events() -> None:
    gpu = Gpu(capturable=False, gap=5e-6)
    seen: list[int] = []

    def run(call: int) -> None:
        seen.append(call)
        gpu.launch("it", 1e-5)

    stream = gpu.current_stream()
    sampler = CudaTimer(gpu).load(Action(run, period=2), shortest=1e-3)
    assert sampler.timer == "events"
    assert gpu.current_stream() is stream
    seen.clear()
    assert sampler.sample(4) == pytest.approx(1.5e-5)
    assert sampler.sample(2) == pytest.approx(1.5e-5)
    # Inputs rotate on from where they were.
    assert seen == list(range(seen[0], seen[0] + 6))


def test_what_comes_before_a_call_is_done_and_the_context_is_entered() -> None:
    gpu = Gpu()
    inside: list[bool] = []
    prepared: list[int] = []

    @contextmanager
    def context() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def run(call: int) -> None:
        assert inside
        assert prepared[-1] == call
        gpu.launch("it", 1e-4)

    action = Action(run, before=prepared.append, context=context, period=2)
    CudaTimer(gpu).load(action, shortest=1e-3)
    assert not inside


class ClockedGpu(Gpu):
    """Runs what is launched at once, on the host, and takes the host's time for it."""

    def __init__(self) -> None:
        super().__init__()
        gpu = self

        class Event(self.Event):
            def record(self) -> None:
                self.at = time.perf_counter()

        class CUDAGraph(self.CUDAGraph):
            def replay(self) -> None:
                gpu.log.append("replay")

        self.Event, self.CUDAGraph = Event, CUDAGraph


@pytest.mark.parametrize("gradients", ["none", "graph", "fresh", "accumulate"])
def test_cases_run_under_the_timer_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gradients: str
) -> None:
    """Everything but the device: every way to handle gradients is captured, and only once."""
    gpu = ClockedGpu()
    monkeypatch.setattr(runner.Options, "timer", lambda self, case=None: CudaTimer(gpu))
    monkeypatch.setattr(runner, "_sets_past_cache", lambda num_bytes, device: 3)
    case = Case("accumulate_depth_attention", 3, 20, 16, gradients=gradients)
    effort = Effort(rounds=2, turn=1, shortest=1e-4, budget=0.1)
    options = runner.Options(effort, names=("ours", "eager"), cold=True)
    rows = runner.run_case(case, options)
    assert [(row.contestant, row.status, row.timer) for row in rows] == [
        (name, "timed", "graph") for name in ("copy", "ours", "eager")
    ]
    assert "replay" in gpu.log


def test_errors_of_what_is_timed_are_not_swallowed() -> None:
    gpu = Gpu()

    def run(call: int) -> None:
        raise ValueError("wrong input")

    with pytest.raises(ValueError, match="wrong input"):
        CudaTimer(gpu).load(Action(run), shortest=1e-3)
