"""The ways of tests/ops/ways.py are those that the launchers take on an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ops.ways import DEPTH, PHASE_ONE, Way

from . import inter_block_cases
from .build import runner_or_skip
from .cases import Limits, run_cases
from .test_depth_attention import make
from .test_depth_attention_backward import Backward
from .test_inter_block_attention_backward import Backward as InterBlockBackward

H100 = Limits(132, 228 * 1024, 227 * 1024)


def check(way: Way, cases: list[Any], folder: Path, without_cluster: int) -> None:
    results = [launched for launched, _ in run_cases(runner_or_skip("plain"), cases, folder)]
    assert (results[0].warps, results[0].columns) == (way.tile or (0, 0))
    clusters = (way.cluster, way.cluster_backward)[: len(results)]
    for launched, cluster in zip(results, clusters, strict=True):
        assert launched.uses_slots is not way.in_place
        assert launched.resident is way.resident
        assert launched.cluster_size == (without_cluster if cluster is None else cluster)


@pytest.mark.parametrize("way", DEPTH, ids=lambda way: way.name)
def test_depth_attention(way: Way, tmp_path: Path) -> None:
    # One more row than multiprocessors is as many as any number of them. The tile does not ask.
    tokens = (1, 133 if way.tokens > 133 and way.tile is None else 1)
    case = make(
        way.sources, way.hidden, [*way.dtypes], tokens=tokens, limits=H100, config=way.config
    )
    check(way, [case] if way.tile else [case, Backward(case)], tmp_path, without_cluster=0)


@pytest.mark.parametrize("way", PHASE_ONE, ids=lambda way: way.name)
def test_phase_one(way: Way, tmp_path: Path) -> None:
    """Their number of tokens makes no difference."""
    sizes = way.sources, way.queries, way.hidden
    case = inter_block_cases.make(*sizes, [*way.dtypes], tokens=(1, 1), limits=H100)
    check(way, [case, InterBlockBackward(case)], tmp_path, without_cluster=1)
