"""Misuse of AttentionResiduals is an error that says what came and what was wanted."""

import copy
import pickle

import pytest
import torch

from attnres_ext.residual import AttentionResiduals


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "hidden_size is 0, expected at least 1"),
        ((8, 0), {}, "num_sublayers is 0, expected at least 1"),
        ((8, 4), {"sublayers_per_block": 0}, "sublayers_per_block is 0, expected at least 1"),
        ((8, 4), {"mode": "blocks"}, "mode is 'blocks', expected one of standard, block, full"),
        ((8, 4), {"two_phase": "maybe"}, "two_phase is 'maybe', expected 'auto', True or False"),
        ((8, 4), {"save": "all"}, "save is 'all', expected one of nothing, stats, output"),
        ((8, 4), {"eps": -1.0}, "eps is -1.0"),
        ((8, 300), {"mode": "full"}, "300 blocks and the embedding make 301 sources, at most 256"),
    ],
)
def test_construction(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        AttentionResiduals(*arguments, **options)


@pytest.fixture
def residual():
    return AttentionResiduals(8, 3, sublayers_per_block=2)


def test_embedding(residual):
    with pytest.raises(ValueError, match=r"embedding has shape \(2, 7\), expected \[\.\.\., 8\]"):
        residual.start(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"embedding has dtype torch\.int64, expected a floating"):
        residual.start(torch.zeros(2, 8, dtype=torch.int64))


def test_order(residual):
    state = residual.start(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="site 0 is to be read first; start has written"):
        state.write(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="site 1 was asked for, but site 0 is next"):
        state.read(1)
    state.read(0)
    with pytest.raises(RuntimeError, match="site 0 was asked for, but site 1 is next"):
        state.read(0)
    with pytest.raises(RuntimeError, match="nothing was written since site 0 was read"):
        state.read(1)
    state.write(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="called twice before site 1 was read"):
        state.write(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="site 3 was asked for, but site 1 is next"):
        state.read_output()
    for site in (1, 2):
        state.read(site)
        state.write(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="site is 3, expected 0 to 2; read_output reads"):
        state.read(3)
    state.read_output()
    assert state.site == residual.num_sites
    with pytest.raises(RuntimeError, match="every site is read"):
        state.read_output()
    with pytest.raises(RuntimeError, match="this forward pass is over"):
        state.write(torch.zeros(2, 8))


def test_a_failed_read_leaves_the_state_as_it_was(residual):
    state = residual.start(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"norm_weight has shape \(7,\), expected \(8,\)"):
        state.read(0, torch.ones(7))
    assert state.read(0, torch.ones(8)).shape == (2, 8)


def test_written_tensors(residual):
    state = residual.start(torch.zeros(2, 8))
    state.read(0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\), expected \(2, 8\)"):
        state.write(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64, expected a floating"):
        state.write(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="x is on meta, expected cpu"):
        state.write(torch.zeros(2, 8, device="meta"))


def test_no_such_site(residual):
    with pytest.raises(IndexError, match="site is 4, expected 0 to 3"):
        residual.sources_at(4)


def test_cache_that_does_not_fit(residual):
    with pytest.raises(ValueError, match="cache has 2 slots, expected at least 3"):
        residual.start(torch.zeros(2, 8), cache=AttentionResiduals(8, 1).new_cache(2))
    with pytest.raises(RuntimeError, match=r"embedding has shape \(3, 8\), expected \(2, 8\)"):
        residual.start(torch.zeros(3, 8), cache=residual.new_cache(2))
    other = AttentionResiduals(8, 3, sublayers_per_block=2, eps=1e-3)
    with pytest.raises(
        ValueError, match=r"cache was made for eps 0\.001, expected the module's 1e-06"
    ):
        residual.start(torch.zeros(2, 8), cache=other.new_cache(2))


def test_what_is_no_tensor(residual):
    state = residual.start(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="write: site 0 is to be read first; start has written"):
        state.write(torch.zeros(2, 8))
    with pytest.raises(TypeError, match=r"norm_weight is a RMSNorm, expected its weight, a tensor"):
        state.read(0, torch.nn.RMSNorm(8))
    state.read(0, torch.ones(8))
    with pytest.raises(TypeError, match=r"write: x is a tuple, expected a tensor"):
        state.write((torch.zeros(2, 8), None))
    with pytest.raises(TypeError, match="start: embedding is a list, expected a tensor"):
        residual.start([0.0] * 8)


def test_a_stretch_without_gradients(residual):
    """Whether it is entered or left."""
    state = residual.start(torch.zeros(2, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="read: gradients are off, but"):
        state.read(0)
    state.read(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="write: gradients are off, but"):
        state.write(torch.zeros(2, 8))
    with torch.no_grad():
        state = residual.start(torch.zeros(2, 8))
        state.read(0)
    with pytest.raises(RuntimeError, match=r"write: gradients are on, but .* began without them"):
        state.write(torch.zeros(2, 8))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_state_is_one_forward_pass(residual, again):
    states = [residual.start(torch.zeros(2, 8))]
    with torch.no_grad():
        states.append(residual.start(torch.zeros(2, 8), cache=residual.new_cache(2)))
    for state in states:
        with pytest.raises(
            TypeError, match=r"state cannot be copied or pickled: .* call start for"
        ):
            again(state)


def test_an_embedding_that_comes_later(residual):
    x = torch.randn(2, 8)
    state = residual.start(None)
    with pytest.raises(RuntimeError, match="nothing was written"):
        state.read(0)
    with pytest.raises(
        ValueError, match=r"write: x has shape \(2, 7\), expected \[\.\.\., 8\], the"
    ):
        state.write(torch.zeros(2, 7))
    state.write(x)
    assert torch.equal(state.read(0), x)
    with pytest.raises(RuntimeError, match="pass_on: nothing was written since the last read"):
        state.pass_on(x)
    state.write(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\), expected \(2, 8\)"):
        state.pass_on(torch.zeros(3, 8))
    state.pass_on(x)
    assert state.pending is x
