"""A machine with two streams, for tests: the side stream runs as late as it may, only when somebody
waits for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class Event:
    """Something that happens when it is waited for."""

    def __init__(self, work):
        self.work, self.happened = work, False

    def happen(self):
        if not self.happened:
            self.happened = True
            for call in self.work:
                call()


class Stream:
    """A stream of the fake device. The main stream computes at once; the side stream's work is put
    off until an event of it is waited for."""

    def __init__(self, log):
        self.device = torch.device("cpu")
        self.log, self.queue, self.used = log, [], []

    def wait_stream(self, stream):
        self.log.append("side waits for main")

    def record_event(self):
        event, self.queue = Event(self.queue), []
        return event

    def wait_event(self, event):
        self.log.append("main waits for side")
        event.happen()


@contextmanager
def late_phase1(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stream, list[str]]]:
    """``(side stream, log)``: what ``BlockCache.inter`` starts on the side stream is late."""
    log, current = [], []
    main, side = Stream(log), Stream(log)
    inter = torch.ops.attnres.block_cache_inter

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def late(*arguments):
        assert current == [side]
        log.append("phase 1 starts")
        side.queue.append(lambda: inter(*arguments))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.ops.attnres, "block_cache_inter", late)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: stream.used.append(self)
    )
    with torch.no_grad():
        yield side, log
