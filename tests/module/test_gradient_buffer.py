"""Taps and gradient buffers: gradients deposited by readers equal the gradients autograd adds."""

import weakref

import pytest
import torch

from attnres_ext import gradient_buffer, phase_one, side_stream
from attnres_ext.gradient_buffer import GradientBuffer, can_tap, tap
from attnres_ext.phase_one import PhaseOneResults


class Scale(torch.autograd.Function):
    """``x * factor``, whose gradient goes into a buffer when there is one."""

    @staticmethod
    def forward(ctx, x, factor, buffer):
        ctx.factor, ctx.buffer = factor, buffer
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        if ctx.buffer is None:
            return grad * ctx.factor, None, None
        gradient, accumulate = ctx.buffer.slot(grad)
        if accumulate:
            gradient.add_(grad * ctx.factor)
        else:
            gradient.copy_(grad * ctx.factor)
        return None, None, None


class Fail(torch.autograd.Function):
    """Identity whose backward raises while ``Fail.now`` is set."""

    now = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if Fail.now:
            raise RuntimeError("aborted")
        return grad


def leaf():
    return torch.randn(3, 4, requires_grad=True)


def test_deposits_are_summed_and_handed_on():
    x, buffer = leaf(), GradientBuffer()
    tapped = tap(x * 2, buffer)
    sum(Scale.apply(tapped, factor, buffer) for factor in (1.0, 3.0, 5.0)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 18))
    assert buffer.take() is None


def test_readers_without_a_buffer_are_added():
    x, buffer = leaf(), GradientBuffer()
    tapped = tap(x, buffer)
    out = Scale.apply(tapped, 3.0, buffer) + tapped * 4 + Scale.apply(tapped, 5.0, None)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 12))


def test_only_readers_without_a_buffer():
    x = leaf()
    (tap(x, GradientBuffer()) * 4).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4))


def test_unread():
    x = leaf()
    tapped = tap(x, GradientBuffer())
    (x * 2).sum().backward()
    assert tapped.requires_grad
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_retained_graph_twice():
    x, buffer = leaf(), GradientBuffer()
    tapped = tap(x, buffer)
    loss = (Scale.apply(tapped, 2.0, buffer) + Scale.apply(tapped, 3.0, buffer)).sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(gradient, torch.full_like(x, 5))


def test_a_pass_that_never_reaches_the_tap_leaves_nothing_behind():
    x, other, buffer = leaf(), leaf(), GradientBuffer()
    tapped = tap(x, buffer)
    loss = Scale.apply(tapped + 0 * other, 2.0, None) + Scale.apply(tapped, 3.0, buffer)
    # Asking for the other input alone still runs readers, which deposit for a tap that does not
    # run.
    torch.autograd.grad(loss.sum(), other, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 5))


def test_an_aborted_pass_leaves_nothing_behind():
    x, buffer = leaf(), GradientBuffer()
    tapped = tap(Fail.apply(x), buffer)
    early = Fail.apply(tapped)
    late = Scale.apply(tapped, 3.0, buffer)
    loss = (Scale.apply(early, 2.0, None) + late).sum()
    Fail.now = True
    with pytest.raises(RuntimeError, match="aborted"):
        loss.backward(retain_graph=True)
    Fail.now = False
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.full_like(x, 5))


def test_the_gradient_is_not_shared_with_the_next_pass():
    x, buffer = leaf(), GradientBuffer()
    tapped = tap(x, buffer)
    loss = Scale.apply(tapped, 2.0, buffer).sum()
    loss.backward(retain_graph=True)
    first = x.grad
    x.grad = None
    loss.backward()
    first.zero_()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_the_graph_dies_with_its_result():
    x, buffer = leaf(), GradientBuffer()
    out = Scale.apply(tap(x, buffer), 2.0, buffer)
    node = weakref.ref(out.grad_fn)
    del out, buffer
    assert node() is None


def test_double_backward_is_an_error():
    x, buffer = leaf(), GradientBuffer()
    loss = Scale.apply(tap(x * x, buffer), 2.0, buffer).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_slots_are_contiguous_and_like_the_tensor():
    wide = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    gradient, accumulate = GradientBuffer().slot(wide.t())
    assert gradient.shape == (3, 4)
    assert gradient.is_contiguous()
    assert gradient.dtype == torch.bfloat16
    assert not accumulate


def test_where_taps_are_possible():
    assert can_tap(leaf())
    assert not can_tap(torch.zeros(2))
    with torch.no_grad():
        assert not can_tap(leaf())
    seen = []
    torch.func.grad(lambda x: (seen.append(can_tap(x)), x.sum())[1])(torch.zeros(2))
    assert seen == [False]


class Late:
    """A stream that does what it is given only when another one waits for it."""

    current = None

    def __init__(self):
        self.work = []

    def wait_stream(self, other):
        work, other.work = other.work, []
        self.work.extend(work)

    def synchronize(self):
        for call in self.work:
            call()


@pytest.fixture
def streams(monkeypatch):
    """Three of them, in a backward pass; ``record_stream`` is noted."""
    monkeypatch.setattr(side_stream, "current_stream", lambda device: Late.current)
    used = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *use: used.append(use))
    for module in (gradient_buffer, phase_one):
        monkeypatch.setattr(module, "backward_pass", lambda: 1)
    yield Late(), Late(), Late(), used
    Late.current = None


def test_streams_that_deposit_follow_one_another(streams):
    """A read on a stream of its own has its backward there; autograd orders nothing here."""
    first, second, last, used = streams
    buffer, like = GradientBuffer(), torch.zeros(3)
    gradient, _ = buffer.slot(like, first)
    first.work.append(lambda: gradient.fill_(1))
    gradient, accumulate = buffer.slot(like, second)
    assert accumulate
    second.work.append(lambda: gradient.add_(1))
    Late.current = last
    assert buffer.take() is gradient
    last.synchronize()
    assert gradient.tolist() == [2, 2, 2]
    assert [stream for _, stream in used] == [second, last]


def test_streams_that_merge_follow_one_another(streams):
    first, second, last, _ = streams
    Late.current = first
    results = PhaseOneResults([torch.randn(4, 8)], torch.randn(3, 8), torch.ones(3, 8), 1e-6)
    for index, stream in ((0, first), (2, second)):
        Late.current = stream
        results.get()
        rows = results.gradient_rows(index)
        stream.work.append(lambda rows=rows, value=index + 1: [row.fill_(value) for row in rows])
    Late.current = last
    mixes, weights = results.take_gradients()
    last.synchronize()
    assert mixes[:, 0, 0].tolist() == weights[:, 0].tolist() == [1, 0, 3]
