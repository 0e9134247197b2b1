"""Layers that are compiled one by one, with their reads and writes: equal layers share a graph."""

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from attnres_ext.residual_graph import Reads
from tests.module.naive_residual import gradients, sublayer
from tests.module.test_residual import assert_same, embed, toy
from tests.module.test_residual_autograd import OPTIONS, every_mode

pytestmark = pytest.mark.slow
every_block = pytest.mark.parametrize("options", OPTIONS[2:])


@pytest.fixture(autouse=True)
def counter():
    """A backend that counts the graphs it is given."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


class Layer(nn.Module):
    """Two sublayers with their norms. Sites are attributes that nothing is computed with."""

    def __init__(self, model, first):
        super().__init__()
        self.first, self.second = first, first + 1
        self.norms, self.weights = model.norms[first : first + 2], model.weights[first : first + 2]
        self.eps = model.norm_eps

    def forward(self, state):
        for site, norm, weight in zip(
            (self.first, self.second), self.norms, self.weights, strict=True
        ):
            state.write(sublayer(weight, state.read(site, norm, self.eps)))


def by_layer(model, compile=nn.Module.compile):
    """A forward of ``model`` whose layers ``compile`` was called for."""
    sublayers = model.residual.num_sublayers
    layers = [Layer(model, first) for first in range(0, sublayers, 2)]
    for layer in layers:
        compile(layer)

    def forward(embedding, cache=None):
        state = model.residual.start(embedding, cache=cache)
        for layer in layers:
            layer(state)
        return state.read_output(model.norms[-1], model.norm_eps)

    return forward


def compiling(backend):
    return partial(nn.Module.compile, backend=backend, fullgraph=True)


@every_mode
def test_two_graphs_for_any_depth(options, counter):
    """One for the first layer and one for all others, and the bits of eager mode."""
    model = toy(10, **options)
    actual = gradients(model, embed(4), by_layer(model, compiling(counter)))
    assert_same(actual, gradients(model, embed(4), model), 0)
    assert counter.frame_count == 2
    deeper = toy(14, **options)
    actual = gradients(deeper, embed(4), by_layer(deeper, compiling(counter)))
    assert_same(actual, gradients(deeper, embed(4), deeper), 0)
    assert counter.frame_count <= 3, "at most the first layer's, which hands on all queries"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_wherever_blocks_end(size, counter):
    model = toy(12, sublayers_per_block=size)
    actual = gradients(model, embed(4), by_layer(model, compiling(counter)))
    assert_same(actual, gradients(model, embed(4), model), 0)
    assert counter.frame_count == 2


@every_mode
@torch.no_grad()
def test_one_graph_for_inference(options, counter):
    for sublayers in (4, 10):
        model = toy(sublayers, **options)
        forward = by_layer(model, compiling(counter))
        assert torch.equal(forward(embed(4)), model(embed(4)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("reuse", [False, True])
@torch.no_grad()
def test_a_cache_keeps_blocks(reuse, counter):
    model = toy(10, torch.float32, sublayers_per_block=3, two_phase=True)
    cache = model.residual.new_cache(4, reuse_result=reuse)
    x = embed(4, dtype=torch.float32)
    forward = by_layer(model, compiling(counter))
    for _ in range(2):
        assert torch.equal(forward(x, cache), model(x, model.residual.new_cache(4)))
    assert counter.frame_count == 1


def test_any_number_of_tokens(counter):
    model = toy(8, sublayers_per_block=3)
    forward = by_layer(model, compiling(counter))
    for tokens in (4, 7, 11):
        x = embed(tokens)
        assert_same(gradients(model, x, forward), gradients(model, x, model), 0)
    assert counter.frame_count == 4, "each once more, for any number"


def test_inductor():
    """It reuses the memory of what a graph has no more use for."""
    model = toy(8, torch.float32, sublayers_per_block=3, two_phase=True)
    x = embed(4, dtype=torch.float32)
    forward = by_layer(model, compiling("inductor"))
    assert_same(gradients(model, x, forward), gradients(model, x, model), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), model(x), rtol=1e-5, atol=1e-5)


@every_mode
@pytest.mark.parametrize("compiled", [(0, 2), (2, 4, 8)])
def test_some_layers_alone(options, compiled, counter):
    """Reads in graphs and in eager mode hand each other what they need."""
    model = toy(10, **options)

    def compile(layer):
        if layer.first in compiled:
            compiling(counter)(layer)

    forward = by_layer(model, compile)
    assert_same(gradients(model, embed(4), forward), gradients(model, embed(4), model), 0)


@every_block
def test_low_precision(options, counter):
    model = toy(8, torch.bfloat16, **options)
    model.residual.float()
    x = embed(4, dtype=torch.bfloat16)
    forward = by_layer(model, compiling(counter))
    assert_same(gradients(model, x, forward), gradients(model, x, model), 0)


@pytest.mark.parametrize("frozen", ["embedding", "weights", "residual", "norms"])
def test_frozen(frozen, counter):
    model = toy(6, sublayers_per_block=3, two_phase=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    def run(forward):
        model.zero_grad()
        x = embed(4).requires_grad_(frozen != "embedding")
        forward(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    for a, b in zip(run(by_layer(model, compiling(counter))), run(model), strict=True):
        assert a is None if b is None else torch.equal(a, b)


@every_block
def test_several_backward_passes(options, counter):
    model, x = toy(8, **options), embed(4).requires_grad_()
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    forward = by_layer(model, compiling(counter))
    losses = [forward(x).square().sum() for _ in range(2)]
    for loss in losses:
        for _ in range(2):
            for a, b in zip(
                torch.autograd.grad(loss, inputs, retain_graph=True), expected, strict=True
            ):
                assert torch.equal(a, b)
    for i in range(0, len(inputs), 5):
        (alone,) = torch.autograd.grad(losses[1], inputs[i], retain_graph=True)
        assert torch.equal(alone, expected[i])
    losses[0].backward()
    assert torch.equal(x.grad, expected[0])


def test_a_loss_inside(counter):
    """Of what a layer wrote: what is read later has no gradient."""
    model = toy(6, sublayers_per_block=3)

    def inside(compile):
        model.zero_grad()
        layers = [Layer(model, first) for first in (0, 2, 4)]
        state, x = model.residual.start(embed(4)), None
        for layer in layers:
            compile(layer)
            layer(state)
            x = state.pending if x is None else x
        x.square().sum().backward()
        # A graph that begins all sites has a gradient of 0 where eager mode has none.
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    expected = inside(lambda layer: None)
    for a, b in zip(inside(compiling(counter)), expected, strict=True):
        assert torch.equal(a, b)


def test_weights_are_recorded(counter):
    model = toy(6, sublayers_per_block=2)
    with model.residual.recording() as expected:
        model(embed(4))
    with model.residual.recording() as record:
        by_layer(model, compiling(counter))(embed(4))
    assert record.weights.keys() == expected.weights.keys()
    for site, weights in expected.weights.items():
        assert torch.equal(record.weights[site], weights)


def test_one_dtype_is_written(counter):
    model = toy(6, torch.float32, sublayers_per_block=3)
    layer = Layer(model, 2)
    compiling(counter)(layer)
    state = model.residual.start(embed(4, dtype=torch.float32))
    state.read(0)
    state.write(embed(4, dtype=torch.float32))
    state.read(1)
    state.write(embed(4))
    with pytest.raises(RuntimeError, match=r"what is written .* must have one dtype"):
        layer(state)


def test_layers_too_many_and_too_few(counter):
    model = toy(4, sublayers_per_block=3)
    layers = [Layer(model, first) for first in (0, 2)]
    for layer in layers:
        compiling(counter)(layer)
    state = model.residual.start(embed(4))
    layers[0](state)
    with pytest.raises(RuntimeError, match="site 4 was asked for, but site 2 is next"):
        state.read_output()
    layers[1](state)
    with pytest.raises(RuntimeError, match="every site is read"):
        layers[1](state)


def test_a_checkpoint_around_a_compiled_layer_is_an_error(counter):
    model = toy(4, sublayers_per_block=3)
    forward_of = Layer(model, 0)
    compiling(counter)(forward_of)
    state = model.residual.start(embed(4).requires_grad_())
    checkpoint(forward_of, state, use_reentrant=False)
    with pytest.raises(RuntimeError, match="must not be compiled"):
        state.read(2).sum().backward()


@every_block
def test_what_graphs_read_dies_with_their_result(options, counter):
    model = toy(6, **options)
    forward = by_layer(model, compiling(counter))
    forward(embed(4).requires_grad_())  # what is compiled may keep
    gc.collect()
    before = len(Reads._all)
    out = forward(embed(4).requires_grad_())
    assert len(Reads._all) == before + 1
    del out
    assert len(Reads._all) == before, "without the garbage collector's help"


def test_profilers_see_sites(counter):
    model = toy(4, sublayers_per_block=3)
    forward = by_layer(model, compiling(counter))
    forward(embed(4)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward(embed(4).requires_grad_()).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    for site in range(4):
        for what in ("read", "differentiate"):
            assert f"AttentionResiduals: {what} site {site}" in names
    assert "AttentionResiduals: read site 4" in names
    assert any(name.startswith("attnres::") for name in names)
