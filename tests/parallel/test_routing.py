"""The routing table of a pipeline: its figures, what follows it through, what it refuses."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnres_ext import AttentionResiduals
from attnres_ext.parallel import (
    check_world_size,
    count_traffic,
    first_sites_of,
    peak_blocks,
    place_stages,
    plan_pipeline,
    split_evenly,
    tensor_bytes,
)
from tests.parallel.pipelines import pipelines

EMBEDDING = -1  # its place among sublayers


def even_plan(layers, block_layers, num_ranks, stages_per_rank, placement="loop", **options):
    sizes = [2 * n for n in split_evenly(layers, num_ranks * stages_per_rank)]
    return plan_pipeline(
        2 * layers,
        2 * block_layers,
        first_sites_of(sizes),
        place_stages(num_ranks, stages_per_rank, placement),
        **options,
    )


# Figures


@pytest.mark.parametrize(("num_ranks", "turns"), [(4, 2), (8, 2), (8, 4), (3, 5), (5, 1)])
@pytest.mark.parametrize("blocks_per_stage", [1, 3])
def test_papers_closed_form(num_ranks, turns, blocks_per_stage):
    """Section 3.2 counts blocks without the embedding: C(C - 1)/2 N without a cache, and with it
    P(P - 1)/2 N + (V - 1) P^2 N."""
    stages, n = num_ranks * turns, blocks_per_stage
    plan = even_plan(stages * n, 1, num_ranks, turns, cache="received", gradients="gathered")
    embeddings_naive, embeddings_cached = stages - 1, num_ranks - 1
    traffic = count_traffic(plan)
    assert traffic.naive - embeddings_naive == stages * (stages - 1) // 2 * n
    first, later = num_ranks * (num_ranks - 1) // 2 * n, (turns - 1) * num_ranks**2 * n
    # A rank need not be sent what it closed between two of its sites, either.
    closed_inside = (turns - 1) * num_ranks * (n - 1)
    assert traffic.forward - embeddings_cached == first + later - closed_inside
    assert traffic.backward == traffic.forward
    if (num_ranks, turns, n) == (4, 2, 1):
        assert (first + later, stages * (stages - 1) // 2) == (22, 28)
    # A rank that keeps the block that it finished itself need not be sent that one either.
    counted = count_traffic(even_plan(stages * n, 1, num_ranks, turns, cache="own"))
    assert counted.forward == traffic.forward - (turns - 1) * num_ranks
    assert counted.backward == traffic.naive  # chained


@pytest.mark.parametrize(
    ("layers", "block", "ranks", "turns", "placement", "naive", "cached", "own"),
    [
        (93, 12, 4, 2, "loop", 35, 25, 21),
        (93, 12, 4, 4, "loop", 79, 37, 31),
        (93, 12, 8, 2, "loop", 79, 59, 55),
        (93, 12, 4, 2, "v", 30, 24, 21),
        (27, 3, 4, 2, "loop", 42, 28, 26),
        (27, 3, 4, 4, "loop", 97, 41, 38),
    ],
)
def test_traffic_of_real_models(layers, block, ranks, turns, placement, naive, cached, own):
    """Embedding, blocks and open sum, in tensors a microbatch."""
    for cache, expected in (("nothing", naive), ("received", cached), ("own", own)):
        plan = even_plan(layers, block, ranks, turns, placement, cache=cache, gradients="gathered")
        traffic = count_traffic(plan)
        assert (traffic.forward, traffic.backward, traffic.naive) == (expected, expected, naive)
        chained = even_plan(layers, block, ranks, turns, placement, cache=cache)
        assert count_traffic(chained).backward == naive
        widths = [1 + len(hop.blocks) for hop in plan.hops if hop.crosses]
        assert traffic.padded == max(widths) * len(widths) == traffic.widest * len(widths)


def test_figures_of_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text()
    model, checked = None, 0
    row = r"^\| (?:(\d+) layers, blocks of (\d+) )?\| (\d), (\d) (loop|V) \|([ \d|]+)\|$"
    for *sizes, ranks, turns, placement, counts in re.findall(row, text, re.MULTILINE):
        model = [int(size) for size in sizes] if all(sizes) else model
        shape = (*model, int(ranks), int(turns), placement.lower())
        plans = [even_plan(*shape, cache=cache) for cache in ("nothing", "received", "own")]
        expected = [count_traffic(plan).forward for plan in plans]
        expected.append(count_traffic(plans[-1]).padded)
        assert [int(count) for count in counts.split("|")] == expected
        checked += 1
    assert checked == 6


def test_figure_of_the_paper():
    """Figure 3: four ranks, two turns, blocks that span two ranks."""
    plan = plan_pipeline(8, 2, range(8), place_stages(4, 2), cache="received")
    hops = [hop.blocks for hop in plan.hops]
    # The paper sends block 1 as the sum of the second hop, block 2 as that of the fourth.
    assert hops == [(0,), (0,), (0, 1), (1,), (1, 2), (2,), (2, 3)]
    assert [stage.finishes for stage in plan.stages] == [None, 1, None, 2, None, 3, None, None]


def test_standard_residual_sends_the_sum_alone():
    plan = plan_pipeline(8, None, (0, 4), (0, 1))
    assert plan.hops[0].blocks == plan.hops[0].closed == plan.hops[0].gradients == ()
    assert count_traffic(plan).forward == 1


def test_bytes():
    assert tensor_bytes(4096, 7168, 2) == 58_720_256


# Followed through


def is_what_a_module_reads(plan):
    """A stage begins with all but the last source of its first site."""
    residual = AttentionResiduals(
        1, plan.num_sublayers, sublayers_per_block=plan.sublayers_per_block
    )
    for stage in plan.stages:
        if stage.sites:
            assert len(stage.begins_with) + 1 == residual.num_sources_at(stage.first_site)
            closing = [site for site in stage.sites if residual.closes_block(site)]
            closing = [site for site in closing if site < plan.num_sublayers]
            assert [plan.sublayers_per_block * block for block in stage.closes] == closing


def sublayers_of(plan, block):
    size = plan.sublayers_per_block
    return {EMBEDDING} if block == 0 else set(range((block - 1) * size, block * size))


def follow_forward(plan, forgets):
    """Sets of sublayers in the place of sums; every site must read what one process reads."""
    size = plan.sublayers_per_block
    caches = {rank: {} for rank in range(plan.num_ranks)}
    blocks, total = {}, {EMBEDDING}
    for stage in plan.stages:
        cache = caches[stage.rank]
        arrived = {}
        if stage.index > 0:
            hop = plan.hops[stage.index - 1]
            assert (hop.sender, hop.receiver) == (plan.stages[stage.index - 1].rank, stage.rank)
            assert hop.blocks == stage.receives
            arrived = {block: blocks[block] for block in hop.blocks}
        assert not arrived.keys() & set(stage.cached)
        blocks = {**arrived, **{block: cache[block] for block in stage.cached}}
        assert tuple(sorted(blocks)) == stage.begins_with
        assert all(value == sublayers_of(plan, block) for block, value in blocks.items())
        closed = []
        for site in stage.sites:
            closed_before = 0 if size is None else -(-site // size)
            assert blocks.keys() == set(range(closed_before))
            begins = 0 if size is None else max(0, (closed_before - 1) * size)
            expected = set(range(begins, site)) if size else set(range(site)) | {EMBEDDING}
            assert total == (expected or {EMBEDDING})
            if size is not None and site % size == 0 and site < plan.num_sublayers:
                blocks[site // size], total = total, set()
                closed.append(site // size)
            total = total | {site}
        assert tuple(closed) == stage.closes
        available = dict(blocks)
        if stage.finishes is not None:
            assert total == sublayers_of(plan, stage.finishes)
            available[stage.finishes] = total
        for block in stage.keeps:
            assert block not in cache  # once a rank
            cache[block] = available[block]
        if forgets:
            for kept in plan.kept_by(stage.rank):
                if kept.last_forward == stage.index:
                    cache.pop(kept.block, None)
    assert not forgets or not any(caches.values())


def follow_backward(plan):
    """Lists of sites in the place of gradients: block -> what its writer is handed, in order."""
    left, back, sums, delivered = {}, {}, {}, {}
    for stage in reversed(plan.stages):
        arrived, back = back, {}
        handed, sums = sums, {}  # what comes with the gradient of the sum
        for gradient in stage.gradients:
            collected = []
            for source in gradient.begins_with:
                if source == "rank":
                    collected += left.pop((stage.rank, gradient.block))
                else:
                    assert source == "next"
                    collected += arrived.pop(gradient.block)
            collected += gradient.sites
            if gradient.goes_to == "previous":
                back[gradient.block] = collected
            elif gradient.goes_to == "rank":
                left[stage.rank, gradient.block] = collected
            elif gradient.sites and gradient.sites[-1] == stage.first_site and stage.index > 0:
                # Closed at its first site: the sum came over the hop.
                assert gradient.goes_to == "sum"
                sums[gradient.block] = collected
            else:
                assert gradient.goes_to == "sum"
                delivered[gradient.block] = collected + handed.pop(gradient.block, [])
        delivered.update(handed)
        assert not arrived
        expected = plan.hops[stage.index - 1].gradients if stage.index else ()
        assert tuple(sorted(back)) == expected
    assert not left
    assert not back
    assert not sums
    return delivered


def keeps_what_is_read(plan):
    """Blocks are there in every backward that reads them; with a cache, once a rank."""
    kept = {(k.rank, k.block): k for k in plan.kept}
    if plan.cache == "nothing":
        kept = {(k.stage, k.block): k for k in plan.kept}
    assert len(kept) == len(plan.kept)
    for stage in plan.stages:
        for block in (*stage.begins_with, *stage.closes):
            entry = kept[stage.index if plan.cache == "nothing" else stage.rank, block]
            assert entry.stage <= stage.index <= entry.last_forward
            assert entry.last_backward <= stage.index
            assert entry.last_backward >= entry.stage
    for entry in plan.kept:
        stage = plan.stages[entry.stage]
        brought = {
            "receiving": stage.receives,
            "closing": stage.closes,
            "finishing": (stage.finishes,),
        }
        assert entry.block in brought[entry.by]


@settings(max_examples=40, deadline=None)
@given(
    pipelines(),
    st.sampled_from(["nothing", "received", "own"]),
    st.sampled_from(["chained", "gathered"]),
    st.booleans(),
)
@example((186, 24, first_sites_of([24] * 7 + [18]), place_stages(4, 2, "v")), "own", "gathered", 1)
@example((512, 4, range(512), place_stages(64, 8)), "own", "gathered", True)
@example((512, 4, range(512), place_stages(64, 8, "v")), "received", "chained", True)
@example((3, 1, (0, 0, 2), (0, 1, 0)), "own", "gathered", True)
def test_every_pipeline(pipeline, cache, gradients, embedding_gradient):
    """Every stage has every block that it reads when it reads it; the gradient of every block
    arrives once from every reader."""
    plan = plan_pipeline(
        *pipeline, cache=cache, gradients=gradients, embedding_gradient=embedding_gradient
    )
    if plan.sublayers_per_block is not None and plan.num_sublayers < 200:
        is_what_a_module_reads(plan)
    follow_forward(plan, forgets=True)
    follow_forward(plan, forgets=False)
    keeps_what_is_read(plan)
    delivered = follow_backward(plan)
    size = plan.sublayers_per_block
    closed = range(0) if size is None else range(-(-plan.num_sublayers // size))
    assert sorted(delivered) == [b for b in closed if b > 0 or embedding_gradient]
    stage_of = {site: stage for stage in plan.stages for site in stage.sites}
    for block, sites in delivered.items():
        in_turn = list(range(plan.num_sublayers, block * size - 1, -1))
        if gradients == "chained":
            assert sites == in_turn  # as one process adds
            continue
        assert sorted(sites, reverse=True) == in_turn
        for rank in {stage.rank for stage in plan.stages}:
            own = [site for site in sites if stage_of[site].rank == rank]
            assert own == sorted(own, reverse=True)
    traffic = count_traffic(plan)
    assert traffic.forward <= traffic.naive
    assert traffic.forward <= traffic.padded


def test_blocks_at_a_time():
    """1F1B of the last of four ranks holds one microbatch, GPipe all."""
    plan = even_plan(8, 1, 4, 2)
    per_microbatch = len(plan.kept_by(3))
    assert [kept.block for kept in plan.kept_by(3)] == list(range(8))
    turns = [("F", 3), ("F", 7), ("B", 7), ("B", 3)]
    one_at_a_time = [(kind, stage, mb) for mb in range(3) for kind, stage in turns]
    assert peak_blocks(plan, 3, one_at_a_time) == per_microbatch
    together = [(kind, stage, mb) for kind, stage in turns for mb in range(3)]
    assert peak_blocks(plan, 3, together) == 3 * per_microbatch
    with pytest.raises(ValueError, match="stage 0 is not one of rank 3"):
        peak_blocks(plan, 3, [("F", 0, 0)])
    with pytest.raises(ValueError, match="action is 'W'"):
        peak_blocks(plan, 3, [("W", 3, 0)])


def test_hash_tells_plans_apart():
    plan = even_plan(93, 12, 4, 2)
    assert plan.hash == even_plan(93, 12, 4, 2).hash
    others = [
        even_plan(93, 12, 4, 2, "v"),
        even_plan(93, 12, 4, 2, cache="received"),
        even_plan(93, 12, 4, 2, gradients="gathered"),
        even_plan(93, 12, 4, 2, num_microbatches=2),
        even_plan(93, 12, 4, 2, embedding_gradient=False),
        even_plan(93, 11, 4, 2),
        even_plan(92, 12, 4, 2),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == len(others) + 1


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, (0,), (0,)), "num_sublayers is 0, expected at least 1"),
        ((4, 0, (0,), (0,)), "sublayers_per_block is 0"),
        ((4, 2, (), ()), "first_sites is empty"),
        ((4, 2, (0, 2), (0,)), "ranks has 1 entries, expected 2"),
        ((4, 2, (1, 2), (0, 1)), "first_sites begins with 1, expected 0"),
        ((4, 2, (0, 2, 2), (0, 1, 2)), "stage 1 begins at site 2 and ends before site 2"),
        ((4, 2, (0, 3, 2), (0, 1, 2)), "stage 1 begins at site 3 and ends before site 2"),
        ((4, 2, (0, 5), (0, 1)), "stage 1 begins at site 5 and ends before site 5"),
        ((4, 2, (0, 6), (0, 1)), "stage 1 begins at site 6"),
        ((4, 2, (0, 2), (0, 2)), "ranks are 0, 2, expected every rank from 0 to 2"),
        ((4, 2, (0, 2), (0, -1)), "ranks are -1, 0"),
    ],
)
def test_no_pipeline(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_pipeline(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "all"}, "cache is 'all', expected one of nothing, received, own"),
        ({"gradients": "bitwise"}, "gradients is 'bitwise', expected one of chained, gathered"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
    ],
)
def test_unknown_choices(options, message):
    with pytest.raises(ValueError, match=message):
        plan_pipeline(4, 2, (0, 2), (0, 1), **options)


def test_splits_and_worlds():
    assert split_evenly(93, 8) == (12, 12, 12, 12, 12, 11, 11, 11)
    assert place_stages(3, 3, "v") == (0, 1, 2, 2, 1, 0, 0, 1, 2)
    assert check_world_size(8, 4) == 2
    with pytest.raises(ValueError, match="num_layers is 3, expected at least one for each of 4"):
        split_evenly(3, 4)
    with pytest.raises(ValueError, match="num_stages is 0"):
        split_evenly(3, 0)
    with pytest.raises(ValueError, match="world size is 6, expected a multiple of the pipeline's"):
        check_world_size(6, 4)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        place_stages(0, 1)
    with pytest.raises(ValueError, match="placement is 'w', expected one of loop, v"):
        place_stages(2, 1, "w")
