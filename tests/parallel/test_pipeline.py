"""Pipelines of several processes, against one process that runs the same microbatches."""

from dataclasses import dataclass, field, replace
from functools import partial, reduce

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import stage as stage_module
from torch.distributed.pipelining.schedules import get_schedule_class

from attnres_ext.parallel import first_sites_of, place_stages, plan_pipeline
from attnres_ext.parallel.pipeline import pipeline_stages
from attnres_ext.torch_internals import pipeline_stage
from tests.parallel.staged import WIDTH, batch, loss_of, make, train_alone

# Stages of a rank, placement, microbatches of four ranks.
SCHEDULES = {
    "GPipe": (1, "loop", 3),
    "1F1B": (1, "loop", 4),
    "Interleaved1F1B": (2, "loop", 4),
    "ZBVZeroBubble": (2, "v", 4),
    "DualPipeV": (2, "v", 8),
}


@dataclass
class Case:
    """A pipeline: stages of unlike sizes, which blocks of three do not fit."""

    schedule: str
    block: int | None = 3
    num_ranks: int = 4
    cache: str = "own"
    gradients: str = "chained"
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.stages_per_rank, self.placement, self.num_microbatches = SCHEDULES[self.schedule]
        num_stages = self.num_ranks * self.stages_per_rank
        self.sizes = [(1, 3, 2)[stage % 3] for stage in range(num_stages)]
        if self.schedule == "1F1B":
            self.sizes[0] = 0  # the first stage has the embedding alone

    def plan(self):
        return plan_pipeline(
            sum(self.sizes),
            self.block,
            first_sites_of(self.sizes),
            place_stages(self.num_ranks, self.stages_per_rank, self.placement),
            num_microbatches=self.num_microbatches,
            cache=self.cache,
            gradients=self.gradients,
            embedding_gradient=not self.frozen,
        )

    def model(self):
        return make(sum(self.sizes), self.block, self.dtype, self.frozen, **self.options)


def pipeline(case, plan, group, model):
    """This rank's stages, and the schedule that runs them."""
    stages = pipeline_stages(model.keep, plan, "cpu", group)
    one = case.stages_per_rank == 1
    schedule = get_schedule_class(case.schedule)(
        stages[0] if one else stages,
        n_microbatches=case.num_microbatches,
        loss_fn=loss_of,
        scale_grads=False,
    )
    return stages, schedule


def step(case, stages, schedule, seed, call="step", length=3):
    """A step; the losses, where the last stage is."""
    tokens, target = batch(case.num_microbatches, seed, length)
    losses = []
    inputs = (tokens,) if any(stage.is_first for stage in stages) else ()
    last = {"target": target, "losses": losses} if any(stage.is_last for stage in stages) else {}
    getattr(schedule, call)(*inputs, **last)
    return [loss.detach() for loss in losses]


_groups = {}


def group_of(num_ranks):
    if num_ranks not in _groups:
        _groups[num_ranks] = dist.new_group(range(num_ranks))
    return _groups[num_ranks]


def train(rank, case):
    """Losses and gradients of two steps."""
    group = group_of(case.num_ranks)
    if rank >= case.num_ranks:
        return [], {}
    stages, schedule = pipeline(case, case.plan(), group, case.model())
    for stage in stages:
        stage._runtime_validate = True  # as TORCH_DISTRIBUTED_DEBUG=DETAIL has it
    losses = [loss for seed in (1, 2) for loss in step(case, stages, schedule, seed)]
    for stage in stages:
        assert not len(stage.blocks), "blocks go with their microbatch"
        assert not len(stage.blocks._kept)
        assert not stage._to_send
    return losses, {
        (stage.stage_index, name): parameter.grad
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }


def alone(case, in_pieces=False, steps=(1, 2)):
    """The same in one process; in pieces, where a cut block's phase 1 runs in each of them."""
    model = case.model()
    if in_pieces:
        parts = [model.keep(stage) for stage in case.plan().stages]
        runs = lambda x: reduce(lambda x, part: part(x), parts, x)  # noqa: E731
    else:
        parts, runs = [model], model
    losses = [loss for seed in steps for loss in train_alone(runs, case.num_microbatches, seed)]
    return losses, {
        (index, name): parameter.grad
        for index, part in enumerate(parts)
        for name, parameter in part.named_parameters()
    }


def compare(four, case, in_pieces=False, tolerance=0.0):
    losses, gradients = alone(case, in_pieces)
    found = 0
    for its_losses, its_gradients in four.run(train, case):
        if its_losses:
            assert all(map(torch.equal, its_losses, losses))
        for (stage, name), gradient in its_gradients.items():
            expected = gradients[stage if in_pieces else 0, name]
            if expected is None:
                assert gradient is None
            elif tolerance:
                scale = expected.abs().max().item()
                torch.testing.assert_close(
                    gradient, expected, rtol=0, atol=tolerance * scale, msg=name
                )
            else:
                assert torch.equal(gradient, expected), f"{name} of stage {stage}"
            found += 1
    assert found == len(gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", ["own", "received", "nothing"])
def test_one_process_has_the_same_bits(four, schedule, cache):
    compare(four, Case(schedule, cache=cache))


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("block", [None, 1, 4], ids=["standard", "full", "block"])
def test_in_bfloat16(four, schedule, block):
    compare(four, Case(schedule, block=block, dtype=torch.bfloat16))


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_in_two_phases(four, schedule):
    """Cut blocks run phase 1 in pieces: one process that is cut alike has the same bits."""
    compare(four, Case(schedule, options={"two_phase": True}), in_pieces=True)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("gradients", ["chained", "gathered"])
def test_a_frozen_embedding(four, schedule, gradients):
    case = Case(schedule, frozen=True, gradients=gradients)
    compare(four, case, tolerance=0.0 if gradients == "chained" else 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", ["own", "received"])
def test_gathered_gradients(four, schedule, cache):
    """Another order of adding; where a rank has one stage, there is but one."""
    case = Case(schedule, gradients="gathered", cache=cache)
    compare(four, case, tolerance=1e-5 if case.stages_per_rank > 1 else 0.0)


def test_gathered_gradients_are_the_same_in_every_run(four):
    first, again = (four.run(train, Case("ZBVZeroBubble", gradients="gathered")) for _ in "12")
    for (_, gradients), (_, others) in zip(first, again, strict=True):
        assert all(torch.equal(gradient, others[key]) for key, gradient in gradients.items())


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_two_of_four_ranks(four, schedule):
    """The pipeline is a group of the world."""
    compare(four, Case(schedule, num_ranks=2))


def evaluate(rank, case):
    """Losses of a step without gradients, between two with them."""
    stages, schedule = pipeline(case, case.plan(), None, case.model())
    losses = []
    for call in ("step", "eval", "step"):
        with torch.set_grad_enabled(call == "step"):
            losses.append(step(case, stages, schedule, 1, call))
        assert not any(len(stage.blocks) or len(stage.blocks._kept) for stage in stages)
    return losses


@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B", "ZBVZeroBubble"])
def test_evaluation(four, schedule):
    case = Case(schedule)
    expected = train_alone(case.model(), case.num_microbatches, seed=1)
    answers = four.run(evaluate, case)
    assert any(losses for losses in answers[0] + answers[-1])
    for losses in (losses for calls in answers for losses in calls if losses):
        assert all(map(torch.equal, losses, expected))


def count_sent(rank, case):
    """Bytes of activations and gradients that this rank sends in one step."""
    stages, schedule = pipeline(case, case.plan(), None, case.model())
    step(case, stages, schedule, 1)
    sent = {"get_fwd_send_ops": 0, "get_bwd_send_ops": 0}

    def counted(get_ops, name, microbatch):
        ops = get_ops(microbatch)
        sent[name] += sum(op.tensor.untyped_storage().nbytes() for op in ops)
        return ops

    for stage in stages:
        for name in sent:
            setattr(stage, name, partial(counted, getattr(stage, name), name))
    step(case, stages, schedule, 2)
    return list(sent.values())


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("gradients", ["chained", "gathered"])
def test_bytes_are_those_of_the_plan(four, schedule, gradients):
    """Counted at the send: one tensor a block, and the sum."""
    case = Case(schedule, gradients=gradients)
    plan, tensor = case.plan(), 2 * 3 * WIDTH * 4
    hops = [hop for hop in plan.hops if hop.crosses]
    forward = sum(len(hop.blocks) + 1 for hop in hops)
    backward = sum(len(hop.gradients) + 1 for hop in hops)
    naive = sum(len(hop.closed) + 1 for hop in hops)
    sent = [sum(ways) for ways in zip(*four.run(count_sent, case), strict=True)]
    assert sent == [case.num_microbatches * tensor * count for count in (forward, backward)]
    assert forward < naive or case.stages_per_rank == 1


def live_tensors(rank, case):
    """The most memory that one step has at a time beyond what is there before it, and what is left
    after it, in units of one microbatch's ``[tokens, D]``."""
    length = 1024
    stages, schedule = pipeline(case, case.plan(), None, case.model())
    step(case, stages, schedule, 1, length=length)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step(case, stages, schedule, 2, length=length)
    live = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    tensor = 2 * length * WIDTH * 4
    return peak / tensor, live / tensor


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_memory(four, schedule):
    """A block is there once a rank, and goes with its microbatch."""
    cases = {cache: Case(schedule, cache=cache) for cache in ("own", "nothing")}
    peaks, received = {}, {}
    for cache, case in cases.items():
        answers = four.run(live_tensors, case)
        peaks[cache] = [peak for peak, _ in answers]
        # Results of the last stage, which torch keeps until the next step.
        assert all(left < case.num_microbatches + 1 for _, left in answers)
        received[cache] = sum(len(hop.blocks) for hop in case.plan().hops)
    assert all(own <= more for own, more in zip(peaks["own"], peaks["nothing"], strict=True))
    # That much for each microbatch that is under way, and one is.
    saved = sum(peaks["nothing"]) - sum(peaks["own"])
    assert saved >= received["nothing"] - received["own"] > 0


def mistakes(rank):
    """What goes wrong before anything is run."""
    case = Case("Interleaved1F1B", num_ranks=4)
    model, plan = case.model(), case.plan()
    found = []
    other = Case("Interleaved1F1B", cache="received").plan() if rank == 3 else plan
    two = Case("Interleaved1F1B", num_ranks=2).plan()
    for wrong in (other, two):
        with pytest.raises(ValueError, match="pipeline_stages") as error:
            pipeline_stages(model.keep, wrong, "cpu")
        found.append(str(error.value))
    turned = Case("ZBVZeroBubble", num_ranks=4)
    stages, _ = pipeline(turned, plan, None, model)
    with pytest.raises(ValueError, match="runs stage") as error:
        stages[0]._prepare_forward_infra(1, ())
    found.append(str(error.value))
    return found


def test_mistakes_are_found_before_a_step(four):
    for rank, (plans, sizes, places) in enumerate(four.run(mistakes)):
        assert f"pipeline_stages: rank {rank} has plan" in plans
        assert f"rank {0 if rank == 3 else 3} has" in plans
        assert sizes == "pipeline_stages: the group has 4 ranks, expected 2 as the plan"
        assert places == (
            "pipeline: the schedule runs stage 4 on rank 3, expected 0 as the plan; place_stages "
            "places stages in a loop or in a V"
        )


def wrong_modules(rank):
    """What a stage's module can do wrong; the pipeline is one of this rank alone."""
    alone = [dist.new_group([other]) for other in range(4)][rank]
    found = []
    for frozen, change in (
        (False, lambda suspended: suspended.tensors),
        (False, lambda suspended: replace(suspended, site=2)),
        (False, lambda suspended: replace(suspended, partial=suspended.pending, pending=None)),
        (True, lambda suspended: suspended),
    ):
        plan = plan_pipeline(4, 3, (0, 3), (0, 0), embedding_gradient=not frozen)
        stage, _ = pipeline_stages(make(4, 3).keep, plan, "cpu", alone)
        run = stage.submod.forward
        stage.submod.forward = lambda x, run=run, change=change: change(run(x))
        with pytest.raises((TypeError, ValueError)) as error:
            stage.forward_maybe_with_nosync(batch(1)[0])
        found.append(str(error.value))
    return found


def test_wrong_modules_are_sentences(four):
    for kind, site, written, frozen in four.run(wrong_modules):
        assert kind == (
            "pipeline: the module of stage 0 returned a tuple, expected what its state's suspend "
            "returns"
        )
        assert "stopped before site 2, expected it to write what site 3 reads" in site
        assert "stopped before site 3 was written for, expected" in written
        assert "the embedding requires a gradient, expected none" in frozen


def test_another_torch_is_a_sentence(monkeypatch):
    monkeypatch.delattr(stage_module.PipelineStage, "_compute_outputs")
    with pytest.raises(ImportError, match=r"has no .*stage\.PipelineStage\._compute_outputs, on"):
        pipeline_stage()
