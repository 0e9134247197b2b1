"""The kernels that merge a sum into a state, compiled for the CPU, against the definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .build import Runner, runner_or_skip
from .cases import Case, Launched, Limits, Result, Rows, rows, run, run_cases
from .gradient_cases import NO_BASE, OTHER_BASE, OWN_BASE
from .test_depth_attention import HALF, make, run_and_check
from .test_depth_attention_backward import Backward
from .test_depth_attention_backward import run_and_check as run_and_check_backward

ORDERS = ["forward", "backward", "random"]
RINGS = ["bulk", "cp_async"]
#: What a value is: a partial sum with a delta, in rows of its own or in the partial's; a delta
#: alone; or what it says.
SUMS = [{"in_place": True}, {"absent_partial": True}, {}, None]
#: Values of a row, and what a team has for it: warps, and columns of each. One chunk a lane, three
#: and four; teams of several warps of which the last one has few columns, or a lane.
TEAMS = {
    8: (1, 256),
    264: (2, 256),
    768: (1, 768),
    1000: (1, 1024),
    1032: (2, 768),
    2304: (3, 768),
    2600: (3, 1024),
}
BACKWARD_TEAMS = {8: (1, 256), 264: (1, 512), 768: (3, 256), 1032: (3, 512), 2304: (5, 512)}


def merge(
    hidden: int, dtype: torch.dtype, sums: dict[str, bool] | None = None, **options: Any
) -> Case:
    """A state and a value, of which an operator keeps nothing but the result."""
    case = make(2, hidden, dtype, keep_mix=False, keep_stats=False, config="", **options)
    case.first_logit = torch.randn(case.num_tokens)
    if sums is not None:
        case.delta = rows(case.tokens, hidden, dtype)
        for name, value in sums.items():
            setattr(case, name, value)
    return case


def check(runner: Runner, cases: Sequence[Case], folder: Path) -> list[Result]:
    """Right, and done by the kernels that merge."""
    results = run_and_check(runner, list(cases), folder)
    assert all(one.warps > 0 for one in results)
    return results


def check_backward(runner: Runner, cases: Sequence[Backward], folder: Path) -> list[Launched]:
    """The same of gradients."""
    launched = run_and_check_backward(runner, cases, folder)
    assert all(one.warps > 0 for one in launched)
    return launched


def test_rows_of_any_length(runner: Runner, tmp_path: Path) -> None:
    cases = [
        merge(hidden, dtype, sums, norm=norm, gains=gains, order=order, ring=ring)
        for (hidden, dtype), sums, (norm, gains), order, ring in zip(
            itertools.product(TEAMS, HALF),
            itertools.cycle(SUMS),
            itertools.cycle([(True, True), (False, True), (True, False)]),
            itertools.cycle(ORDERS),
            itertools.cycle(RINGS),
            strict=False,
        )
    ]
    for case, result in zip(cases, check(runner, cases, tmp_path), strict=True):
        assert (result.warps, result.columns) == TEAMS[case.hidden]


def test_gradients_of_rows_of_any_length(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            merge(hidden, dtype, norm=norm, order=order, ring=ring),
            base_kinds=[NO_BASE, kind],
            save="nothing",
            gains=gains,
        )
        for (hidden, dtype), kind, norm, gains, order, ring in zip(
            itertools.product(BACKWARD_TEAMS, HALF),
            itertools.cycle([NO_BASE, OTHER_BASE, OWN_BASE]),
            itertools.cycle([True, False, True, True]),
            itertools.cycle([True, True, True, False]),
            itertools.cycle(ORDERS),
            itertools.cycle(RINGS),
            strict=False,
        )
    ]
    for backward, launched in zip(cases, check_backward(runner, cases, tmp_path), strict=True):
        assert (launched.warps, launched.columns) == BACKWARD_TEAMS[backward.case.hidden]


def test_teams_share_a_cta_and_rows_come_round(runner: Runner, tmp_path: Path) -> None:
    few = {"tokens": (5, 4), "limits": Limits(1)}
    cases = [
        merge(hidden, dtype, sums, norm=norm, order=order, **few)
        for (hidden, dtype, norm), sums, order in zip(
            itertools.product((40, 1032), HALF, (True, False)),
            itertools.cycle(SUMS),
            itertools.cycle(ORDERS),
            strict=False,
        )
    ]
    for case, result in zip(cases, check(runner, cases, tmp_path), strict=True):
        assert result.num_ctas == 1
        # 20 teams of a warp, and eight of two.
        assert result.num_threads == 32 * (20 if case.hidden == 40 else 16)
    backwards = [
        Backward(merge(hidden, dtype, norm=True, order=order, **few), save="nothing")
        for (hidden, dtype), order in zip(
            itertools.product((40, 1032), HALF), itertools.cycle(ORDERS), strict=False
        )
    ]
    launched = check_backward(runner, backwards, tmp_path)
    assert [one.num_threads for one in launched] == [32 * 20] * 2 + [32 * 15] * 2


def test_strided_rows_and_vectors_of_any_dtype(runner: Runner, tmp_path: Path) -> None:
    cases = [
        merge(136, dtype, sums, layouts=["sliced", "contiguous"], tokens=(3, 2), gain_dtype=gain)
        for (dtype, sums), gain in zip(
            itertools.product(HALF, SUMS[1:]),
            itertools.cycle([torch.bfloat16, torch.float16, torch.float64]),
            strict=False,
        )
    ]
    check(runner, cases, tmp_path)
    backwards = [
        Backward(case, grad_layout="sliced", save="nothing") for case in cases if case.delta is None
    ]
    check_backward(runner, backwards, tmp_path)


def test_gradients_where_state_and_value_nearly_cancel(runner: Runner, tmp_path: Path) -> None:
    """The mix is small against what it is made of, and all its products with it are."""
    cases = []
    for hidden, dtype, apart in itertools.product((264, 1032), HALF, (2.0**-3, 2.0**-8)):
        case = merge(hidden, dtype)
        # Weights of two thirds and one third.
        case.query.zero_()
        case.first_logit.fill_(math.log(2))
        state, value = case.sources
        state.view.copy_(apart * state.view - value.view / 2)
        state.storage.copy_(state.view.flatten())
        cases.append(Backward(case, save="nothing"))
    check_backward(runner, cases, tmp_path)


def test_only_what_is_wanted(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(merge(72, dtype), wanted=wanted, gains=gains, save="nothing")
        for dtype, wanted, gains in itertools.product(
            HALF, ([True, False], [False, True], [False, False]), (True, False)
        )
    ]
    check_backward(runner, cases, tmp_path)


def test_an_empty_state_may_hold_anything(runner: Runner, tmp_path: Path) -> None:
    def half_empty(norm: bool) -> Case:
        case = merge(136, torch.bfloat16, norm=norm)
        case.first_logit[::2] = float("-inf")
        case.sources[0].view.reshape(-1, 136)[::2] = float("nan")
        case.sources[0] = Rows(case.sources[0].view.clone().flatten(), case.sources[0].view)
        return case

    cases = [half_empty(norm) for norm in (True, False)]
    check(runner, cases, tmp_path)
    check_backward(runner, [Backward(case, save="nothing") for case in cases], tmp_path)


def test_a_row_of_nan_stays_in_its_row(runner: Runner, tmp_path: Path) -> None:
    case = merge(72, torch.float16, tokens=(1, 6), limits=Limits(1))
    case.sources[1].storage[case.hidden + 3] = float("nan")
    (result,) = run(runner, [case], tmp_path)
    wanted = [row != 1 for row in range(6)]
    assert result.out.isfinite().all(-1).tolist() == wanted
    ((_, outputs),) = run_cases(runner, [Backward(case, save="nothing")], tmp_path)
    for grad in outputs[:2]:
        assert grad.isfinite().all(-1).tolist() == wanted


def test_results_depend_on_the_row_alone(runner: Runner, tmp_path: Path) -> None:
    """Neither on the order of threads, nor on how many rows a CTA or a team has."""
    whole = merge(1032, torch.bfloat16, {}, tokens=(3, 3), order="random")
    cases = [
        Case(**{**vars(whole), "order": order, "limits": limits, "ring": ring})
        for order, limits, ring in zip(
            ORDERS, (Limits(1), Limits(3), Limits(9)), RINGS * 2, strict=False
        )
    ]
    first, *others = run(runner, [whole, *cases], tmp_path)
    for other in others:
        assert torch.equal(other.out, first.out)
        assert torch.equal(other.last_rstd, first.last_rstd)
    backwards = [
        Backward(Case(**{**vars(case), "delta": None}), save="nothing") for case in [whole, *cases]
    ]
    for backward in backwards[1:]:
        backward.grad_out = backwards[0].grad_out
    first, *others = (outputs for _, outputs in run_cases(runner, backwards, tmp_path))
    for outputs in others:
        for a, b in zip(first[:3], outputs[:3], strict=True):
            assert torch.equal(a, b)


def test_what_they_leave_to_the_general_body(tmp_path: Path) -> None:
    runner = runner_or_skip("plain")
    kept = merge(72, torch.bfloat16)
    kept.keep_stats = True
    cases = [
        kept,
        merge(72, torch.float32),
        merge(36, torch.bfloat16),
        merge(72, torch.bfloat16, layouts="misaligned"),
        # More values than the registers of a CTA hold.
        merge(16400, torch.bfloat16, tokens=(1, 1)),
    ]

    assert not any(result.warps for result in run_and_check(runner, cases, tmp_path))
    backwards = [Backward(case, save="nothing") for case in cases[1:4]]
    backwards.append(Backward(merge(8200, torch.bfloat16, tokens=(1, 1)), save="nothing"))
    backwards.append(Backward(merge(72, torch.bfloat16), base_kinds=[OTHER_BASE, NO_BASE]))
    assert not any(one.warps for one in run_and_check_backward(runner, backwards, tmp_path))


@pytest.mark.parametrize("asked", ["depth_attention=rows", "backward_depth_attention=rows"])
def test_the_general_body_can_be_asked_for(asked: str, tmp_path: Path) -> None:
    runner = runner_or_skip("plain")
    case = merge(72, torch.bfloat16)
    case.config = asked
    (forward,) = run_and_check(runner, [case], tmp_path)
    (backward,) = run_and_check_backward(runner, [Backward(case, save="nothing")], tmp_path)
    assert (forward.warps == 0, backward.warps == 0) == (
        not asked.startswith("backward"),
        asked.startswith("backward"),
    )
