"""Samples on a GPU: replays of a CUDA graph between two events.

A graph leaves out what the host does between launches, so that kernels are compared and not
launchers. Calls in a graph rotate through the action's inputs, as many as it takes to throw them
out of the L2 cache. What cannot be captured (it waits for the device, or allocates outside of
torch) is timed between events as it is called, and its results say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .timing import Action, Sampler

#: Calls in one graph; each is a handful of kernels.
_MOST_CALLS = 2048
#: How many times as long as a sample must last a graph is meant to be.
_HEADROOM = 4
#: Calls before a capture: libraries load, plans are made, memory is taken.
_WARM_UP = 3


class CudaTimer:
    """Graph replays, or events where there is no graph.

    Args:
        cuda: ``torch.cuda``, or what stands in for it under test.
        graphs: whether to capture at all. Calls of many milliseconds hide their launches, and
            graphs of several would each keep a call's memory.
    """

    def __init__(self, cuda: Any = torch.cuda, graphs: bool = True):
        self._cuda = cuda
        self._graphs = graphs

    def load(self, action: Action, shortest: float) -> Sampler:
        """Captures as many calls as last ``shortest`` seconds or more, in whole periods of the
        inputs."""
        cuda = self._cuda
        launches = _Launches(cuda, action)
        launches.warm_up()
        if not self._graphs:
            return launches
        # Launching may take longer than the work, so the graph is made longer than it looks.
        once = launches.sample(action.period)
        periods = math.ceil(_HEADROOM * shortest / max(once * action.period, 1e-9))
        calls = action.period * max(1, min(periods, _MOST_CALLS // action.period))
        stream = cuda.current_stream()
        try:
            return _Replays(cuda, action, calls)
        except RuntimeError:
            # Whatever stopped the capture: the baseline is right, its gate has seen to that.
            # torch leaves the capture's stream behind as the current one.
            cuda.set_stream(stream)
            cuda.synchronize()
            return launches


class _Replays:
    timer = "graph"

    def __init__(self, cuda: Any, action: Action, calls: int):
        self._cuda = cuda
        self._calls = calls
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph), action.context():
            for call in range(calls):
                _call(action, call)

    def sample(self, repeats: int) -> float:
        replays = math.ceil(repeats / self._calls)
        seconds = _between_events(self._cuda, lambda _: self._graph.replay(), range(replays))
        return seconds / (replays * self._calls)


class _Launches:
    timer = "events"

    def __init__(self, cuda: Any, action: Action):
        self._cuda = cuda
        self._action = action
        self._calls = 0

    def warm_up(self) -> None:
        """Calls it on a side stream, as a capture will."""
        side = self._cuda.Stream()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side), self._action.context():
            for call in range(_WARM_UP):
                _call(self._action, call)
        self._cuda.current_stream().wait_stream(side)
        self._cuda.synchronize()

    def sample(self, repeats: int) -> float:
        calls = range(self._calls, self._calls + repeats)
        self._calls += repeats
        with self._action.context():
            call = self._action
            return _between_events(self._cuda, lambda n: _call(call, n), calls) / repeats


def _call(action: Action, call: int) -> None:
    # What comes before a call is work of the host alone: the device does not wait for it longer
    # than for any launch.
    if action.before is not None:
        action.before(call)
    action.run(call)


def _between_events(cuda: Any, run: Callable[[int], object], calls: range) -> float:
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        run(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
