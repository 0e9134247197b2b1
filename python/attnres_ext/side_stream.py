"""Work beside the current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["SideStream", "new_stream"]


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the current one of a device; None where a device has none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class SideStream:
    """Runs work on a stream of its own, after all that the current stream was given before it.

    Without a stream, which is what a CPU has, work simply runs: same calls, same order of results.

    Args:
        stream: Where work runs; None means where the caller is.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream
        self._done: torch.cuda.Event | None = None

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

    def join(self) -> None:
        """Makes the current stream wait for what was started; the host waits for nothing."""
        done, self._done = self._done, None
        if done is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(done)
