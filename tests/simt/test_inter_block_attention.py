"""The kernel bodies of phase 1, compiled for the CPU, against the definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from .build import Runner, runner_or_skip
from .cases import Limits
from .inter_block_cases import make, run_and_check
from .test_depth_attention import HALF

#: Rows of a few kilobytes fit, score vectors only a panel of columns at a time. One multiprocessor
#: runs no clusters.
SMALL = Limits(multiprocessors=1, shared_per_multiprocessor=25 * 1024, shared_per_cta=24 * 1024)
RINGS = ["cp_async", "bulk"]
#: A runner and a ring.
Way = tuple[Runner, str]
MIXED = [torch.bfloat16, torch.float32, torch.float16]


#: Flavour and ring. Sanitizers cost much: the other ring is under them in the other file.
WAYS = [
    *itertools.product(["plain"], ("cp_async", "bulk")),
    ("sanitized", "bulk"),
]


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> Way:
    flavour, ring = request.param
    return runner_or_skip(flavour), ring


def test_rows_of_one_half_precision_dtype(way: Way, tmp_path: Path) -> None:
    """On tensor cores."""
    runner, ring = way
    cases = [
        make(count, queries, hidden, dtype, ring=ring, order=order, gains=gains)
        for (count, queries, hidden, dtype), order, gains in zip(
            [
                (1, 1, 8, torch.bfloat16),
                (3, 5, 136, torch.float16),
                (8, 24, 64, torch.bfloat16),
                (9, 6, 200, torch.float16),
                (17, 9, 72, torch.bfloat16),
            ],
            itertools.cycle(["forward", "backward", "random"]),
            itertools.cycle([True, False]),
            strict=False,
        )
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert all(result.uses_slots and result.num_spans == 1 for result in results)


def test_many_queries_and_sources(way: Way, tmp_path: Path) -> None:
    runner, ring = way
    cases = [
        make(64, 64, 64, torch.bfloat16, ring=ring, tokens=(1, 1)),
        make(2, 65, 72, torch.float16, ring=ring, tokens=(1, 2), order="random"),
        make(65, 3, 40, MIXED, ring=ring, tokens=(1, 2)),
    ]
    run_and_check(runner, cases, tmp_path)


def test_score_vectors_that_do_not_fit_come_in_passes(way: Way, tmp_path: Path) -> None:
    runner, ring = way
    cases = [
        make(3, 12, 456, torch.bfloat16, ring=ring, limits=SMALL),
        make(2, 14, 392, torch.float16, ring=ring, limits=SMALL, order="random"),
        make(2, 14, 392, torch.float32, ring=ring, limits=SMALL, order="backward"),
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert all(result.uses_slots and result.num_spans > 1 for result in results)


def sharing(multiprocessors: int, kilobytes: int) -> Limits:
    """So many CTAs can share a token; each has so much shared memory."""
    return Limits(multiprocessors, (kilobytes + 1) * 1024, kilobytes * 1024)


def test_ctas_of_a_cluster_share_the_columns_of_a_token(runner: Runner, tmp_path: Path) -> None:
    """As few as keep the score vectors; panels of columns need not be the same for all."""
    cases = [
        make(3, 12, 456, torch.bfloat16, limits=sharing(2, 40)),
        make(2, 14, 264, torch.float16, limits=sharing(6, 18), order="random"),
        make(3, 5, 520, torch.float32, limits=sharing(8, 8), order="backward", gains=False),
        make(9, 33, 72, torch.bfloat16, limits=sharing(5, 40), order="random", tokens=(1, 5)),
        make(2, 24, 584, [torch.float32, torch.bfloat16], limits=sharing(8, 20), tokens=(1, 3)),
    ]
    cases[1].save_stats = False
    cases[1].known_rstd = 0.5 + torch.rand(2, cases[1].num_tokens)
    results = run_and_check(runner, cases, tmp_path)
    assert [result.cluster_size for result in results] == [2, 4, 8, 2, 8]
    assert all(result.uses_slots and result.num_spans == 1 for result in results)


def test_large_clusters_only_where_the_device_runs_them(runner: Runner, tmp_path: Path) -> None:
    """Others share a token among eight, in passes if need be."""
    shape = (2, 12, 1096, torch.bfloat16)
    cases = [
        make(*shape, limits=sharing(multiprocessors, 22), tokens=(1, 1), order="random")
        for multiprocessors in (16, 17)
    ]
    large, small = run_and_check(runner, cases, tmp_path)
    assert (large.cluster_size, large.num_spans) == (16, 1)
    assert small.cluster_size <= 8
    for case in cases:
        case.limits.largest_cluster = 1
    assert all(one.cluster_size == 1 for one in run_and_check(runner, cases, tmp_path))


def test_other_aligned_rows_stay_on_chip(way: Way, tmp_path: Path) -> None:
    """By ordinary arithmetic."""
    runner, ring = way
    cases = [
        make(3, 5, 72, torch.float32, ring=ring, order="random"),
        make(4, 6, 136, MIXED, ring=ring, gain_dtype=torch.bfloat16),
        make(1, 3, 8, torch.float32, ring=ring, gains=False),
    ]
    assert all(result.uses_slots for result in run_and_check(runner, cases, tmp_path))


def test_more_tiles_than_ctas(way: Way, tmp_path: Path) -> None:
    runner, ring = way
    one = Limits(1, 48 * 1024, 47 * 1024)
    cases = [
        make(5, 3, 64, torch.bfloat16, ring=ring, tokens=(3, 7), order=order, limits=one)
        for order in ("forward", "random")
    ]
    cases.append(make(1, 2, 64, torch.float32, ring=ring, tokens=(5, 9), limits=one))
    for result in run_and_check(runner, cases, tmp_path):
        assert result.num_ctas <= 3


def test_sealed_blocks_bring_their_rms(way: Way, tmp_path: Path) -> None:
    """The block cache's form: known 1/rms, no statistics."""
    runner, ring = way
    cases = [
        make(count, 4, hidden, dtype, ring=ring, save_stats=False)
        for count, hidden, dtype in [(3, 72, torch.bfloat16), (2, 24, torch.float32)]
    ]
    for case in cases:
        case.known_rstd = 0.5 + torch.rand(len(case.sources), case.num_tokens)
    run_and_check(runner, cases, tmp_path)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_large_and_tiny_score_vectors(dtype: torch.dtype, runner: Runner, tmp_path: Path) -> None:
    """Parts of a score vector keep its low bits, whatever its size."""
    cases = [make(3, 2, 64, dtype, scale=scale) for scale in (1e5, 1e-6, 1e-30)]
    cases[0].eps = 1e6  # small 1/rms: logits of ordinary size
    cases.append(make(2, 2, 64, dtype, scale=0.0))
    run_and_check(runner, cases, tmp_path)
