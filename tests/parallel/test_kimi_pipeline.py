"""Kimi Linear in a pipeline, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import get_schedule_class

from attnres_ext.models.kimi_linear import KimiLinearStage, next_token_loss
from attnres_ext.parallel import first_sites_of, place_stages, plan_pipeline
from attnres_ext.parallel.pipeline import pipeline_stages
from tests.models.test_kimi_modeling import make_ids, make_model

MICROBATCHES = 4
# Ranks, stages of a rank, placement; a layer a stage.
SCHEDULES = {
    "1F1B": (4, 1, "loop"),
    "Interleaved1F1B": (2, 2, "loop"),
    "ZBVZeroBubble": (2, 2, "v"),
}


def train(rank, schedule, recompute):
    """Names of parameters whose bits differ from one process's, and whether losses and the experts'
    loads are the same."""
    num_ranks, stages_per_rank, placement = SCHEDULES[schedule]
    group = dist.new_group(range(num_ranks))
    if rank >= num_ranks:
        return [], True
    model, ids = make_model("block", queries=0.3).float(), make_ids(batch=MICROBATCHES)
    plan = plan_pipeline(
        model.config.num_sublayers,
        model.residual.sublayers_per_block,
        first_sites_of([2] * (num_ranks * stages_per_rank)),
        place_stages(num_ranks, stages_per_rank, placement),
        num_microbatches=MICROBATCHES,
    )
    part = make_model("block", queries=0.3).float()
    part.model.checkpoint_sublayers = recompute
    stages = pipeline_stages(lambda stage: KimiLinearStage(part, stage), plan, "cpu", group)
    run = get_schedule_class(schedule)(
        stages[0] if stages_per_rank == 1 else stages,
        n_microbatches=MICROBATCHES,
        loss_fn=next_token_loss,
        scale_grads=False,
    )
    losses = []
    inputs = (ids,) if any(stage.is_first for stage in stages) else ()
    run.step(*inputs, target=ids, losses=losses)
    expected = []
    for row in ids.split(1):
        expected.append(model(row, labels=row).loss)
        expected[-1].backward()
    same = all(map(torch.equal, losses, expected))
    whole, differ = dict(model.named_modules()), []
    for stage in stages:
        stage.submod.update_router_bias()
    model.update_router_bias()
    for stage in stages:
        for name, module in stage.submod.named_modules():
            if hasattr(module, "load"):
                theirs = whole[name].e_score_correction_bias
                same &= torch.equal(module.e_score_correction_bias, theirs)
        for name, parameter in stage.submod.named_parameters():
            gradient = model.get_parameter(name).grad
            if not torch.equal(parameter.grad, gradient):
                differ.append((name, (parameter.grad - gradient).abs().max().item()))
    return differ, same


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_kimi_linear(four, schedule, recompute):
    for differ, same in four.run(train, schedule, recompute):
        assert same
        assert not differ
