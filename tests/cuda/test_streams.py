"""Work goes to the caller's current stream, and the host waits for nothing."""

from __future__ import annotations

import time

import pytest
import torch

from tests.cuda.calls import CALLS, DIRECTIONS, make_arguments, refill, tensors_of
from tests.helpers import assert_same_bits
from tests.module import naive_residual
from tests.module.naive_residual import gradients
from tests.module.test_residual import assert_same, embed, toy

pytestmark = pytest.mark.cuda

#: Clock cycles: half a second on any GPU that these kernels run on.
LONG = 1_000_000_000


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_side_stream(name: str, direction: str) -> None:
    """A kernel on another stream than the caller's would read what is not written yet."""
    call = DIRECTIONS[direction](CALLS[name])
    values, arguments = make_arguments("cuda"), make_arguments("cuda")
    expected = call(values)
    call(arguments)  # whatever is done once is done
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG // 10)
        refill(arguments, values)
        actual = call(arguments)
    side.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name: str, direction: str) -> None:
    """The call returns while the stream is still busy with what came before it."""
    call = DIRECTIONS[direction](CALLS[name])
    arguments = make_arguments("cuda")
    for _ in range(3):  # memory is in the allocator's cache
        call(arguments)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # torch's own waits raise
    try:
        torch.cuda._sleep(LONG)
        slept = torch.cuda.Event()
        slept.record()
        start = time.perf_counter()
        call(arguments)
        seconds = time.perf_counter() - start
        busy = not slept.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    assert busy, f"the call took {seconds:.3f} s and came back when the stream was idle"


@pytest.mark.parametrize("name", CALLS)
def test_two_streams_at_once(name: str) -> None:
    """Calls that overlap share no scratch memory."""
    call = DIRECTIONS["forward-backward"](CALLS[name])
    inputs = [make_arguments("cuda", rows=1000) for _ in range(2)]
    expected = [call(arguments) for arguments in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for _ in range(10):
        for stream, arguments in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(arguments))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        for a, b in zip(result, expected[i % 2], strict=True):
            assert_same_bits(name, a, b)


def test_arguments_stay_as_they_are() -> None:
    arguments = make_arguments("cuda")
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    for call in CALLS.values():
        DIRECTIONS["forward-backward"](call)(arguments)
    for tensor, copy in zip(tensors_of(arguments), before, strict=True):
        assert_same_bits("argument", tensor.detach(), copy)


@pytest.mark.parametrize("two_phase", [False, True])
def test_reads_on_several_streams(two_phase: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of a read runs on the stream of its forward; what gathers there gathers in turn.

    Every other site is late, so that whoever does not wait for it is seen.
    """
    monkeypatch.setattr(naive_residual, "device", "cuda")
    model = toy(dtype=torch.float32, sublayers_per_block=3, two_phase=two_phase)
    x = embed(64, dtype=torch.float32)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()

    def forward(embedding: torch.Tensor) -> torch.Tensor:
        state = model.residual.start(embedding)
        for site in range(model.residual.num_sublayers):
            stream = side if site % 2 else main
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                hidden = state.read(site, model.norms[site], model.norm_eps)
            main.wait_stream(stream)
            hidden.record_stream(main)
            if stream is side:
                hidden.register_hook(lambda _: torch.cuda._sleep(LONG // 100))
            state.write(model.sublayer(site, hidden))
        return state.read_output(model.norms[-1], model.norm_eps)

    expected = gradients(model, x, model)
    assert_same(gradients(model, x, forward), expected, 0)
