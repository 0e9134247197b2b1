"""Another variant is a class and an entry in a table."""

from functools import partial

import pytest
import torch

from attnres_ext import residual_variants
from attnres_ext.residual_variants import VARIANTS
from tests.module.naive_residual import gradients
from tests.module.test_residual import assert_same, embed, toy

# Where blocks of one, two, three and four sublayers end.
ENDS = (0, 1, 3, 6, 10)


class Growing(residual_variants.Block):
    """Blocks that grow by a sublayer each."""

    sized = False

    @classmethod
    def of(cls, num_sublayers, sublayers_per_block):
        return cls(num_sublayers, 1)

    def closes_block(self, site):
        return site in ENDS

    def num_blocks_before(self, site):
        return sum(end < site for end in ENDS)

    def sites_of_block(self, block):
        return range(ENDS[block - 1] + 1, min(ENDS[block], self.num_sublayers) + 1)


@pytest.mark.parametrize("num_sublayers", [1, 3, 8])
@pytest.mark.parametrize("two_phase", [False, True])
def test_a_variant_of_ones_own(monkeypatch, num_sublayers, two_phase):
    """Whole, in two pieces, and with a cache: what the paper's listing gives, cut as it says."""
    monkeypatch.setitem(VARIANTS, "growing", Growing)
    model = toy(num_sublayers, mode="growing", two_phase=two_phase)
    residual = model.residual
    assert residual.num_blocks == {1: 1, 3: 2, 8: 4}[num_sublayers]
    sites = [s for b in range(1, residual.num_blocks + 1) for s in residual.sites_of_block(b)]
    assert sites == list(range(1, residual.num_sites))
    assert residual.num_sources_at(num_sublayers) == len(residual.sources_at(num_sublayers))
    x = embed(2, 3)
    expected = gradients(model, x, partial(model.naive, closing=ENDS))
    assert_same(gradients(model, x, model), expected)
    assert_same(gradients(model, x, partial(cut, model, num_sublayers // 2)), expected)
    with torch.no_grad():
        cached = model(x, cache=residual.new_cache(x.shape[:-1], dtype=x.dtype))
    torch.testing.assert_close(cached, expected[0], rtol=1e-11, atol=1e-11)


def cut(model, last, embedding):
    """The forward pass, suspended after the write of sublayer ``last``."""
    state = model.residual.start(embedding)
    for site in range(model.residual.num_sublayers):
        state.write(model.sublayer(site, state.read(site, model.norms[site], model.norm_eps)))
        if site == last:
            state = model.residual.resume(state.suspend())
    return state.read_output(model.norms[-1], model.norm_eps)


def test_names_of_variants():
    with pytest.raises(
        ValueError, match="mode is 'growing', expected one of standard, block, full"
    ):
        toy(3, mode="growing")
