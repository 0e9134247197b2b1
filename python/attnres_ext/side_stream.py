"""Work beside the current stream, and streams that take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["SideStream", "current_stream", "follow", "new_stream"]


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the current one of a device; None where a device has none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that work for ``device`` goes to; None where a device has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def follow(
    stream: torch.cuda.Stream | None, last: torch.cuda.Stream | None, uses: Iterable[Tensor]
) -> None:
    """What ``stream`` is given from here on runs after what ``last`` was given so far.

    For memory that several nodes of a backward pass write and read, each on the stream of its
    forward: autograd orders streams along the edges that gradients travel, and only there.

    Args:
        stream: Who works on ``uses`` next; None on a device without streams.
        last: Who did before; None if nobody has.
        uses: The memory. It is not given away before ``stream`` is through with it.
    """
    if stream is None or last is None or stream == last:
        return
    stream.wait_stream(last)
    for tensor in uses:
        tensor.record_stream(stream)


class SideStream:
    """Runs work on a stream of its own, after all that the current stream was given before it.

    Without a stream, which is what a CPU has, work simply runs: same calls, same order of results.

    Args:
        stream: Where work runs; None means where the caller is.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream
        self._done: torch.cuda.Event | None = None
        self._captured = False  # whether what was started is part of a CUDA graph

    def run(self, work: Callable[[], None], uses: Sequence[Tensor]) -> None:
        """Starts ``work``, which reads and writes ``uses``; :meth:`join` before touching them.

        Their memory is not given away before the side stream is through with it, even if they are
        dropped without a join.
        """
        stream = self.stream
        if stream is None:
            work()
            return
        self.join()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            work()
        for tensor in uses:
            tensor.record_stream(stream)
        self._done = stream.record_event()
        self._captured = torch.cuda.is_current_stream_capturing()

    def join(self) -> None:
        """Makes the current stream wait for what was started; the host waits for nothing.

        A capture cannot wait for what ran before it began, nor anybody for what was captured and
        never ran: what a forward left on the other side of a capture's begin or end is forgotten.
        """
        done, self._done = self._done, None
        if done is not None and self._captured == torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.stream.device).wait_event(done)
