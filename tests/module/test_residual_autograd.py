"""AttentionResiduals in the ways training uses autograd."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attnres_ext import residual_training
from tests.module import naive_residual
from tests.module.naive_residual import gradients, on_device
from tests.module.test_residual import assert_same, embed, toy

OPTIONS = [
    pytest.param({"mode": "standard"}, id="standard"),
    pytest.param({"mode": "full"}, id="full"),
    pytest.param({"sublayers_per_block": 3, "two_phase": False}, id="single-pass"),
    pytest.param({"sublayers_per_block": 3, "two_phase": True}, id="two-phase"),
]
every_mode = pytest.mark.parametrize("options", OPTIONS)


@on_device
@every_mode
@pytest.mark.parametrize("save", ["nothing", "stats", "output"])
def test_what_is_saved_changes_no_gradient(options, save):
    model = toy(save=save, **options)
    assert_same(gradients(model, embed(4), model), gradients(model, embed(4), model.naive))


@on_device
@every_mode
def test_buffers_equal_autograds_adds(options, monkeypatch):
    model = toy(**options)
    buffered = gradients(model, embed(4), model)
    monkeypatch.setattr(residual_training, "can_tap", lambda tensor: False)
    monkeypatch.setattr(residual_training, "can_gather", lambda: False)
    assert_same(buffered, gradients(model, embed(4), model))


class CountFullSize(TorchDispatchMode):
    """Counts PyTorch's own calls that make or change tensors of at least ``numel`` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.calls = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aten = function.namespace == "aten" and not function.is_view
        made = result if isinstance(result, torch.Tensor) else None
        if aten and made is not None and made.numel() >= self.numel:
            self.calls.append(function.name())
        return result


class Constant(torch.autograd.Function):
    """A sublayer of given output and given gradient: it calls nothing of PyTorch's."""

    @staticmethod
    def forward(ctx, hidden, output, gradient):
        ctx.gradient = gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        assert gradient is not None
        return ctx.gradient, None, None


@on_device
@every_mode
@pytest.mark.parametrize("save", ["nothing", "stats"])
def test_gradients_are_added_in_the_kernels(options, save):
    """Autograd adds no gradients of blocks or sums, and nothing gathers those of phase 1."""
    model = toy(save=save, **options)
    anchor = embed(1).sum().zero_().requires_grad_()
    state = model.residual.start(Constant.apply(anchor, embed(4), torch.ones_like(anchor)))
    for site in range(7):
        hidden = state.read(site, model.norms[site])
        state.write(Constant.apply(hidden, embed(4, seed=site), embed(4, seed=site)))
    out = state.read_output(model.norms[-1])
    gradient = embed(4, seed=9)
    with CountFullSize(4 * 12) as counter:
        out.backward(gradient)
    assert anchor.grad == 1, "the embedding is reached"
    assert set(counter.calls) <= {"aten::empty.memory_format", "aten::empty_like", "aten::detach"}


@every_mode
def test_blocks_are_tapped_in_training_alone(options):
    residual = toy(**options).residual
    with torch.no_grad():
        frozen = residual.start(embed(4).requires_grad_())
        frozen.read(0)
    training = residual.start(embed(4).requires_grad_())
    training.read(0)
    blocks = 0 if residual.mode == "standard" else 1
    assert frozen._buffers == [None] * blocks
    assert len(training._buffers) == blocks
    assert None not in training._buffers


@on_device
@every_mode
def test_checkpointed_sublayers(options):
    model = toy(**options)

    def run(function, x):
        return checkpoint(function, x, use_reentrant=False)

    actual = gradients(model, embed(4), lambda x: model(x, run=run))
    assert_same(actual, gradients(model, embed(4), model))


@every_mode
def test_checkpointed_model(options):
    model = toy(**options)
    actual = gradients(model, embed(4), lambda x: checkpoint(model, x, use_reentrant=False))
    assert_same(actual, gradients(model, embed(4), model))


@every_mode
@pytest.mark.parametrize("checkpointed", [False, True])
def test_backward_in_another_thread(options, checkpointed):
    """As that of a GPU's tensors always is: nothing may be found by the forward's thread."""
    model = toy(**options)

    run = partial(checkpoint, model, use_reentrant=False) if checkpointed else model
    expected = gradients(model, embed(4), run)
    model.zero_grad()
    x = embed(4).requires_grad_()
    out = run(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    with ThreadPoolExecutor(1) as pool:
        pool.submit((out * weight).sum().backward).result()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same((out.detach(), {"embedding": x.grad, **grads}), expected, 0)


@on_device
@every_mode
def test_microbatches_accumulate(options):
    model = toy(**options)
    whole = embed(6)
    model(whole).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in whole.chunk(3):
        model(part).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-11)


@on_device
@every_mode
def test_two_forwards_before_their_backwards(options):
    model = toy(**options)
    first, second = embed(3, seed=1).requires_grad_(), embed(3, seed=2).requires_grad_()
    losses = [model(x).square().sum() for x in (first, second)]
    (losses[0] + losses[1]).backward()
    for x in (first, second):
        alone = x.detach().clone().requires_grad_()
        model(alone).square().sum().backward()
        torch.testing.assert_close(x.grad, alone.grad, rtol=1e-11, atol=1e-11)


@on_device
@every_mode
def test_retained_graph_twice(options):
    model, x = toy(**options), embed(4).requires_grad_()
    inputs = [x, *model.parameters()]
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_device
def test_a_freed_graph_is_an_error():
    model, x = toy(sublayers_per_block=3, two_phase=True), embed(4).requires_grad_()
    state = model.residual.start(x)
    hidden = []
    for site in range(3):
        hidden.append(state.read(site))
        state.write(embed(4, seed=site))
    del state
    hidden[1].sum().backward()
    with pytest.raises(RuntimeError, match=r"its graph is freed.* pass retain_graph=True"):
        hidden[2].sum().backward()


@on_device
@every_mode
def test_gradients_of_some_inputs(options):
    model, x = toy(**options), embed(4).requires_grad_()
    everything = [x, *model.parameters()]
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, everything, retain_graph=True)
    for i in range(0, len(everything), 5):
        (alone,) = torch.autograd.grad(loss, everything[i], retain_graph=True)
        torch.testing.assert_close(alone, expected[i], rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(loss, everything)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


@on_device
@every_mode
def test_aborted_backward(options):
    model, x = toy(**options), embed(4).requires_grad_()
    inputs = [x, *model.parameters()]
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)

    def fail(gradient):
        raise ZeroDivisionError

    handle = model.weights[2].register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    x.grad = None
    for a, b in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert torch.equal(a, b)


@on_device
@every_mode
def test_frozen_embedding(options):
    model, x = toy(**options), embed(4)
    model(x).square().sum().backward()
    assert x.grad is None
    frozen = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x.clone().requires_grad_()).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, frozen[name], rtol=1e-12, atol=1e-12)


@on_device
@every_mode
def test_frozen_residual_parameters(options):
    model = toy(**options)
    _, expected = gradients(model, embed(4), model)
    model.residual.requires_grad_(False)
    _, actual = gradients(model, embed(4), model)
    for name, grad in actual.items():
        if name.startswith("residual."):
            assert grad is None
        else:
            torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


@on_device
@every_mode
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(options, mode):
    model = toy(**options)
    expected = model(embed(4)).detach()
    with mode():
        out = model(embed(4))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@on_device
@every_mode
def test_written_tensor_used_elsewhere(options):
    """A sublayer's output may have readers of its own, and hooks see its whole gradient."""
    model = toy(3, **options)
    x = embed(4).requires_grad_()
    seen = {}

    def run(forward_of):
        x.grad = None
        written = []

        def sublayer(function, h):
            out = function(h)
            mine = seen.setdefault(len(written), [])
            out.register_hook(mine.append)
            written.append(out)
            return out

        out = forward_of(sublayer)
        (out.sum() + sum(w.square().sum() for w in written)).backward()
        return x.grad

    ours = run(lambda sublayer: model(x, run=sublayer))
    original = model.sublayer

    def hooked(call):
        model.sublayer = lambda site, h: call(lambda v: original(site, v), h)
        return model.naive(x)

    theirs = run(hooked)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert sorted(seen) == [0, 1, 2]
    for pair in seen.values():
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


@on_device
@every_mode
def test_autocast(options):
    model = toy(dtype=torch.float32, **options)
    x = embed(4, dtype=torch.float32)

    def run(x):
        with torch.autocast(naive_residual.device, dtype=torch.bfloat16):
            return model(x)

    out, grads = gradients(model, x, run)
    expected_out, expected_grads = gradients(model, x, model)
    assert out.dtype == torch.float32, "float32 embeddings keep reads in float32"
    # Matrix products round to 8 bits; seven tanh layers keep that error of its size.
    torch.testing.assert_close(out, expected_out, rtol=0.1, atol=0.1)
    for name, grad in grads.items():
        assert grad.dtype == expected_grads[name].dtype
        assert (grad - expected_grads[name]).norm() <= 0.1 * expected_grads[name].norm() + 1e-6


@on_device
@every_mode
def test_bfloat16(options):
    model = toy(dtype=torch.bfloat16, **options)
    model.residual.float()
    out, grads = gradients(model, embed(4, dtype=torch.bfloat16), model)
    assert out.dtype == torch.bfloat16
    assert all(
        grad.dtype == torch.float32 for name, grad in grads.items() if name.startswith("residual")
    )


@every_mode
def test_where_saved_tensors_must_not_have_hooks(options):
    model = toy(**options)
    expected = gradients(model, embed(4), model)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same(gradients(model, embed(4), model), expected)


@every_mode
def test_forward_mode(options):
    model, x, tangent = toy(3, **options), embed(4), embed(4, seed=8)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    with torch.no_grad():
        expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@every_mode
def test_func_grad(options):
    model, x = toy(3, **options), embed(4)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads, x_grad = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    model(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(x_grad, x.grad, rtol=1e-11, atol=1e-11)
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-11, atol=1e-11)


@every_mode
def test_replicas_of_data_parallel(options, monkeypatch):
    """Their parameters are copies, which hand their gradients to the module's."""
    model = toy(**options)
    expected = gradients(model, embed(4), model)

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    replication = import_module("torch.nn.parallel.replicate")  # a function has its name
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replication, "_get_device_index", lambda device, _: device)

    def forward(x):
        replicas = replication.replicate(model, [0, 1])
        halves = zip(replicas, x.chunk(2), strict=True)
        return torch.cat([replica(half) for replica, half in halves])

    assert_same(gradients(model, embed(4), forward), expected)
