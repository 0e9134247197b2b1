"""What goes in and out of stages, for any pipeline: one process plays all ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_ext.parallel import RankBlocks, StageBlocks, plan_pipeline
from tests.parallel.pipelines import pipelines
from tests.parallel.staged import batch, loss_of, make, train_alone


class Loop:
    """A loop of one's own: a dictionary stands in for the network."""

    def __init__(self, plan, model):
        ranks = [RankBlocks() for _ in range(plan.num_ranks)]
        self.blocks = [StageBlocks(plan, s.index, ranks[s.rank]) for s in plan.stages]
        self.modules = [model.keep(stage) for stage in plan.stages]
        self.ranks, self.plan, self.network, self.kept = ranks, plan, {}, {}

    def forward(self, index, microbatch, x):
        sent = self.network.pop((index, microbatch), ())
        received = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in sent]
        entered = self.blocks[index].enter(microbatch, received)
        output = self.modules[index](x if entered is None else entered)
        output = self.blocks[index].leave(microbatch, output)
        self.kept[index, microbatch] = received, output
        if index + 1 < self.plan.num_stages:
            self.network[index + 1, microbatch] = output
        return output

    def backward(self, index, microbatch, loss):
        received, output = self.kept.pop((index, microbatch))
        leaves = self.blocks[index].leaves(microbatch)
        outputs, gradients = (loss,), (None,)
        if index + 1 < self.plan.num_stages:
            back = self.network.pop((index, microbatch))
            not_sent = self.blocks[index].not_sent(microbatch)
            assert len(back) == len(output) + len(not_sent)
            outputs, gradients = self.blocks[index].begin_backward(
                microbatch, output, back[: len(output)], back[len(output) :]
            )
        roots = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        if roots:
            torch.autograd.backward(*zip(*roots, strict=True))
        more = self.blocks[index].end_backward(microbatch, [leaf.grad for leaf in leaves])
        if index > 0:
            self.network[index - 1, microbatch] = [tensor.grad for tensor in received] + more

    def train(self, num_microbatches):
        stages, losses = range(self.plan.num_stages), []
        pieces = list(zip(*(t.split(2) for t in batch(num_microbatches)), strict=True))
        for microbatch, (tokens, _) in enumerate(pieces):
            for index in stages:
                output = self.forward(index, microbatch, tokens)
            losses.append(loss_of(output, pieces[microbatch][1]))
        for microbatch in range(num_microbatches):
            for index in reversed(stages):
                self.backward(index, microbatch, losses[microbatch])
        return losses


@settings(deadline=None, max_examples=25)
@given(
    pipeline=pipelines(most_ranks=4, most_stages=3),
    cache=st.sampled_from(["own", "received", "nothing"]),
    gradients=st.sampled_from(["chained", "gathered"]),
    frozen=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_pipeline_has_the_gradients_of_one_process(pipeline, cache, gradients, frozen, dtype):
    num_sublayers, block, first_sites, ranks = pipeline
    plan = plan_pipeline(
        num_sublayers,
        block,
        first_sites,
        ranks,
        cache=cache,
        gradients=gradients,
        embedding_gradient=not frozen,
    )
    model = make(num_sublayers, block, dtype, frozen)
    loop = Loop(plan, model)
    losses = loop.train(2)
    assert all(map(torch.equal, losses, train_alone(model, 2)))
    assert not any(len(rank) for rank in loop.ranks)
    assert not any(len(stage) for stage in loop.blocks)
    assert not any(rank._gradients for rank in loop.ranks), "every gradient found its way"
    whole = dict(model.named_parameters())
    for module in loop.modules:
        for name, parameter in module.named_parameters():
            expected = whole[name].grad
            if expected is None:
                assert parameter.grad is None
            elif gradients == "chained":
                assert torch.equal(parameter.grad, expected), name
            else:
                # Sums of the same terms in another order.
                tolerance = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance)


def test_a_block_that_a_hop_lacks_is_not_made_up():
    plan = plan_pipeline(4, 2, (0, 2, 4), (0, 1, 0))
    blocks = [StageBlocks(plan, index, RankBlocks()) for index in range(3)]
    with pytest.raises(ValueError, match="shorter"):
        blocks[1].enter(0, [torch.zeros(2, 16)])
