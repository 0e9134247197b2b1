"""AttentionResiduals under torch.compile: one graph for a model, or graphs beside checkpoints."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.module.naive_residual import gradients
from tests.module.test_residual import assert_same, embed, toy
from tests.module.test_residual_autograd import every_mode

SITES = 4
#: What a repeated function does to the state is done once: the graph repeats its operators alone.
REPLAY_NO_SIDE_EFFECTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"


@pytest.fixture
def counter():
    """A backend that counts the graphs it is given."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


class Layer(nn.Module):
    """Two sublayers of a model, as a module of their own."""

    def __init__(self, model, first, sublayer=None):
        super().__init__()
        self.model, self.first = [model], first
        self.sublayer = sublayer or model.sublayer

    def forward(self, state):
        (model,) = self.model
        for site in (self.first, self.first + 1):
            hidden = state.read(site, model.norms[site], model.norm_eps)
            state.write(self.sublayer(site, hidden))


def again(layer):
    return lambda state: checkpoint(layer, state, use_reentrant=False)


def stack(model, layers):
    def forward(embedding):
        state = model.residual.start(embedding)
        for layer in layers:
            layer(state)
        return state.read_output(model.norms[-1], model.norm_eps)

    return forward


@pytest.mark.slow
@every_mode
def test_compiles_as_one_graph(options, counter):
    model = toy(4, **options)
    expected = gradients(model, embed(4), model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same(gradients(model, embed(4), compiled), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_for_any_number_of_tokens(counter):
    model = toy(4, sublayers_per_block=2)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for tokens in (4, 7, 11):
        x = embed(tokens)
        assert_same(gradients(model, x, compiled), gradients(model, x, model))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "another number of tokens compiled again"


@pytest.mark.slow
@every_mode
def test_compiled_sublayers_under_checkpoints(options, counter):
    """Reads stay outside of the graphs: any checkpoint may go around them."""
    model = toy(SITES, **options)
    compiled = [
        torch.compile(lambda x, site=site: model.sublayer(site, x), backend=counter, fullgraph=True)
        for site in range(SITES)
    ]
    layers = [
        again(Layer(model, first, lambda site, x: compiled[site](x)))
        for first in range(0, SITES, 2)
    ]
    assert_same(gradients(model, embed(4), stack(model, layers)), gradients(model, embed(4), model))
    assert counter.frame_count == SITES


@pytest.mark.slow
@every_mode
@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, REPLAY_NO_SIDE_EFFECTS), reason="this torch cannot"
)
def test_checkpoints_inside_of_graphs(options, counter):
    model = toy(SITES, **options)
    layers = [again(Layer(model, first)) for first in range(0, SITES, 2)]
    expected = gradients(model, embed(4), model)
    with torch._dynamo.config.patch(**{REPLAY_NO_SIDE_EFFECTS: True}):
        whole = torch.compile(stack(model, layers), backend=counter, fullgraph=True)
        assert_same(gradients(model, embed(4), whole), expected)
        assert counter.frame_count == 1
        each = [torch.compile(layer, backend=counter, fullgraph=True) for layer in layers]
        assert_same(gradients(model, embed(4), stack(model, each)), expected)
        assert counter.frame_count == 1 + 2


@pytest.mark.slow
def test_a_compiled_read_under_a_checkpoint_is_an_error(counter):
    model = toy(SITES, sublayers_per_block=3)
    layer = again(torch.compile(Layer(model, 0), backend=counter))
    state = model.residual.start(embed(4).requires_grad_())
    layer(state)
    with pytest.raises(RuntimeError, match="must not be compiled"):
        state.read(2).sum().backward()


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_breaks_the_graph_and_changes_no_result(counter):
    model, x = toy(2, torch.float32, sublayers_per_block=2), embed(4, dtype=torch.float32)
    expected = model(x, cache=model.residual.new_cache(4))
    cache = model.residual.new_cache(4, reuse_result=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="CacheState"):
        torch.compile(model, backend=counter, fullgraph=True)(x, cache=cache)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend=counter)(x, cache=cache), expected)
