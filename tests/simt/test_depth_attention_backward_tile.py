"""The tensor-core tile of depth attention's backward, compiled for the CPU, against autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .build import Runner
from .cases import Case, Launched, Limits, run_cases
from .gradient_cases import NO_BASE, OTHER_BASE, OWN_BASE, SHARED_BASE
from .test_depth_attention import HALF
from .test_depth_attention import make as make_case
from .test_depth_attention_backward import Backward, run_and_check

ORDERS = ["forward", "backward", "random"]
#: A dtype, and whether there is an output norm: what the tile has kernels for.
KERNELS = [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]


def make(count: int, hidden: int, dtype: torch.dtype, **options: Any) -> Case:
    """A case that nothing keeps from the tile."""
    return make_case(count, hidden, dtype, **{"norm": False, "config": "", **options})


def check(runner: Runner, cases: Sequence[Backward], folder: Path) -> list[Launched]:
    """Right, and done by the tile."""
    launched = run_and_check(runner, cases, folder)
    assert all(one.warps > 0 for one in launched)
    return launched


def test_numbers_of_sources_and_columns(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(count, hidden, dtype, norm=norm, gains=gains, order=order),
            save=save,
            weights_too=weights_too,
        )
        for (count, hidden, (dtype, norm)), order, gains, save, weights_too in zip(
            # Half a slice and a bit of one; one; slices for several warps.
            itertools.product((1, 2, 9, 10), (8, 64, 136, 328), KERNELS),
            itertools.cycle(ORDERS),
            itertools.cycle([True, True, False]),
            itertools.cycle(["nothing", "stats"]),
            itertools.cycle([False, True, True]),
            strict=False,
        )
    ]
    check(runner, cases, tmp_path)


def test_stages_come_round(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(
                3,
                200,
                dtype,
                norm=norm,
                tokens=(2, 7),
                order=order,
                limits=Limits(1),
                config=f"backward_stages={stages},backward_ctas=1",
            )
        )
        for ((dtype, norm), stages), order in zip(
            itertools.product(KERNELS, (2, 3)), itertools.cycle(ORDERS[1:]), strict=False
        )
    ]
    assert {one.num_slots for one in check(runner, cases, tmp_path)} == {2, 3}


def test_groups_of_sources(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(count, 136, dtype, order=order, tokens=(1, 3), limits=Limits(1)),
            save="nothing",
            weights_too=True,
        )
        for (count, dtype), order in zip(
            itertools.product((12, 13, 24, 54, 60), HALF), itertools.cycle(ORDERS), strict=False
        )
    ]
    check(runner, cases, tmp_path)


def test_warps_of_any_width(runner: Runner, tmp_path: Path) -> None:
    # The last warp has fewer columns than the others, or none.
    cases = [
        Backward(make(4, hidden, dtype, norm=norm, order="random", config=config))
        for (dtype, norm), (hidden, config) in itertools.product(
            KERNELS,
            [
                (264, "backward_columns=192"),
                (128, "backward_columns=128,backward_warps=3"),
                (392, "backward_columns=128"),
            ],
        )
    ]
    launched = check(runner, cases, tmp_path)
    assert [(one.warps, one.columns) for one in launched[:3]] == [(2, 192), (3, 128), (4, 128)]


def test_clusters_share_rows(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(
                min(count, 10) if norm else count,
                hidden,
                dtype,
                norm=norm,
                order=order,
                tokens=(2, 4),
                limits=Limits(size * 2),
                config=f"backward_cluster={size},backward_stages=2",
            ),
            save="nothing",
            weights_too=True,
            base_kinds=[kind] * (min(count, 10) if norm else count),
        )
        for (size, count, hidden, kind), (dtype, norm), order in zip(
            [
                (2, 3, 520, NO_BASE),
                (2, 5, 520, OTHER_BASE),
                (2, 9, 256, NO_BASE),
                (4, 5, 960, OTHER_BASE),
                (4, 30, 200, NO_BASE),
                (8, 10, 1000, NO_BASE),
                (6, 30, 328, OTHER_BASE),
            ],
            itertools.cycle(KERNELS),
            itertools.cycle(ORDERS),
            strict=False,
        )
    ]
    launched = check(runner, cases, tmp_path)
    assert [one.cluster_size for one in launched] == [2, 2, 2, 4, 4, 8, 6]


def test_gradients_are_added_to_what_is_there(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(len(kinds), 200, dtype, norm=norm, tokens=(3, 3), limits=Limits(1), order=order),
            base_kinds=kinds,
        )
        for (kinds, (dtype, norm)), order in zip(
            [
                *itertools.product([[NO_BASE, OTHER_BASE, OWN_BASE], [OWN_BASE] * 10], KERNELS),
                *itertools.product(
                    [[NO_BASE] * 9 + [OTHER_BASE, OWN_BASE, NO_BASE, NO_BASE, OTHER_BASE]],
                    KERNELS[:2],
                ),
            ],
            itertools.cycle(ORDERS),
            strict=False,
        )
    ]
    check(runner, cases, tmp_path)


def test_only_what_is_wanted(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(make(3, 72, dtype, norm=norm), wanted=wanted, gains=gains)
        for (dtype, norm), wanted, gains in itertools.product(
            KERNELS, ([True, False, True], [False] * 3), (True, False)
        )
    ]
    check(runner, cases, tmp_path)


def test_strided_rows(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(3, 264, dtype, norm=norm, layouts=["sliced", "contiguous"], gain_dtype=gains),
            grad_layout="sliced",
        )
        for (dtype, norm), gains in zip(
            KERNELS, (torch.bfloat16, torch.float64, torch.float16), strict=True
        )
    ]
    check(runner, cases, tmp_path)


def test_small_and_large_values_keep_their_bits(runner: Runner, tmp_path: Path) -> None:
    # float16 has no more than 40 powers of two.
    cases = []
    for values, gradients in itertools.product((2.0**-18, 2.0**6), (2.0**-12, 2.0**6)):
        case = make(4, 136, torch.float16)
        for source in case.sources:
            source.storage.mul_(values)
            source.view.mul_(values)
        backward = Backward(case)
        backward.grad_out.storage.mul_(gradients)
        backward.grad_out.view.mul_(gradients)
        cases.append(backward)
    check(runner, cases, tmp_path)


def test_what_the_tile_leaves_to_the_general_body(runner: Runner, tmp_path: Path) -> None:
    shared = [NO_BASE, NO_BASE, SHARED_BASE]
    cases = [
        Backward(make(3, 72, torch.bfloat16), base_kinds=shared),
        Backward(make(3, 72, torch.float32)),
        Backward(make(3, 72, torch.bfloat16, layouts="misaligned")),
        Backward(make(2, 36, torch.bfloat16)),
        Backward(make(2, 72, torch.float16, norm=True)),
        Backward(make(11, 72, torch.bfloat16, norm=True)),
        Backward(make(61, 16, torch.bfloat16, tokens=(1, 1))),
        # Where the driver places no clusters.
        Backward(
            make(
                3,
                256,
                torch.bfloat16,
                limits=Limits(largest_cluster=1),
                config="backward_cluster=2",
            )
        ),
    ]
    assert all(one.warps == 0 for one in run_and_check(runner, cases, tmp_path))


def test_one_source_has_no_query_gradient(runner: Runner, tmp_path: Path) -> None:
    cases = [Backward(make(1, 136, dtype, norm=norm), save="nothing") for dtype, norm in KERNELS]
    for _, outputs in run_cases(runner, cases, tmp_path):
        query, key_weight = outputs[2:4]
        assert torch.equal(query, torch.zeros_like(query))
        assert torch.equal(key_weight, torch.zeros_like(key_weight))


@pytest.mark.parametrize("norm", [False, True])
def test_results_depend_on_the_row_alone(norm: bool, runner: Runner, tmp_path: Path) -> None:
    # Neither on the order of threads, nor on how many rows a CTA has, nor on what was saved.
    whole = Backward(make(4, 136, torch.bfloat16, norm=norm, tokens=(3, 3)), save="nothing")
    cases = [whole]
    for order, limits, save in zip(
        ORDERS, (Limits(1), Limits(3), Limits(2)), ("stats", "nothing", "output"), strict=True
    ):
        case = Case(**{**vars(whole.case), "order": order, "limits": limits})
        other = Backward(case, save=save)
        other.grad_out = whole.grad_out
        cases.append(other)
    first, *others = (outputs for _, outputs in run_cases(runner, cases, tmp_path))
    for outputs in others:
        for a, b in zip(first[:4], outputs[:4], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "norm"), KERNELS)
def test_a_row_of_nan_stays_in_its_row(
    dtype: torch.dtype, norm: bool, runner: Runner, tmp_path: Path
) -> None:
    case = make(3, 72, dtype, norm=norm, tokens=(4, 4), limits=Limits(1))
    case.sources[1].storage[case.hidden + 3] = float("nan")
    ((_, outputs),) = run_cases(runner, [Backward(case, save="nothing")], tmp_path)
    for grad in outputs[:3]:
        assert grad.isfinite().all(-1).tolist() == [row != 1 for row in range(16)]
