"""The tensor-core tile of depth attention, compiled for the CPU, against the definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from .build import Runner, runner_or_skip
from .cases import Case, Limits, Result, Rows, rows, run
from .test_depth_attention import HALF, check, make

ORDERS = ["forward", "backward", "random"]
H100 = Limits(132)
NORMS_AND_GAINS = [(True, True), (False, True), (True, False), (False, False)]


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Both ways to compile what nvcc compiles."""
    return runner_or_skip(request.param)


def tile(*args: object, config: str = "", **options: object) -> Case:
    """A case that the tile serves, as the device would or with wishes of its own."""
    options = {"tokens": (1, 3), "limits": Limits(1), **options}
    return make(*args, config=config, **options)  # type: ignore[arg-type]


def run_and_check(runner: Runner, cases: list[Case], folder: Path) -> list[Result]:
    results = run(runner, cases, folder)
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        assert result.warps > 0, f"case {number} did not take the tile"
        # No two rows of a matrix meet in banks, so each is read at once.
        assert result.wavefronts == result.matrices > 0
        try:
            check(case, result)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from None
    return results


def summed(case: Case, *, absent: bool = False, in_place: bool = False) -> Case:
    """The case with a delta that is added to its last source."""
    layout = "contiguous" if case.sources[-1].view.is_contiguous() else "sliced"
    case.delta = rows(case.tokens, case.hidden, case.sources[-1].view.dtype, layout)
    case.absent_partial, case.in_place = absent, in_place
    return case


def test_widths_and_numbers_of_sources(runner: Runner, tmp_path: Path) -> None:
    """Any multiple of 8 columns, a group of sources or several, the last one full or not."""
    sizes = [(1, 8), (2, 264), (5, 64), (9, 200), (13, 136), (14, 72), (26, 520), (27, 8), (64, 88)]
    cases = [
        tile(count, hidden, dtype, order=order, norm=norm, gains=gains, keep_mix=keep)
        for (count, hidden), dtype, order, (norm, gains), keep in zip(
            sizes,
            itertools.cycle(HALF),
            itertools.cycle(ORDERS),
            itertools.cycle(NORMS_AND_GAINS),
            itertools.cycle([True, False, False]),
            strict=False,
        )
    ]
    run_and_check(runner, cases, tmp_path)


def test_warps_of_every_width(runner: Runner, tmp_path: Path) -> None:
    """With rows enough for every barrier to come round, and the mix with and without its norm."""
    cases = [
        tile(
            3,
            2 * columns - 56,
            dtype,
            tokens=(1, 7),
            order=order,
            norm=norm,
            config=f"columns={columns},warps=2,stages={stages}",
        )
        for columns, dtype, order, (norm, _), stages in zip(
            [64, 64, 128, 128, 192, 192, 256, 256],
            itertools.cycle(HALF),
            itertools.cycle(ORDERS),
            itertools.cycle(NORMS_AND_GAINS),
            itertools.cycle([2, 3, 8]),
            strict=False,
        )
    ]
    for case, result in zip(cases, run_and_check(runner, cases, tmp_path), strict=True):
        assert f"columns={result.columns},warps=2,stages={result.num_slots}" == case.config


def test_clusters_share_a_row(runner: Runner, tmp_path: Path) -> None:
    cases = [
        tile(
            count,
            hidden,
            dtype,
            tokens=(1, 5),
            order=order,
            norm=norm,
            limits=Limits(2 * cluster),
            config=f"cluster={cluster},stages={stages}",
        )
        for (cluster, count, hidden), dtype, order, (norm, _), stages in zip(
            [(2, 9, 136), (4, 3, 200), (8, 14, 464), (2, 1, 256), (4, 27, 584)],
            itertools.cycle(HALF),
            itertools.cycle(["random", "backward", "forward"]),
            itertools.cycle(NORMS_AND_GAINS),
            itertools.cycle([2, 3]),
            strict=False,
        )
    ]
    for case, result in zip(cases, run_and_check(runner, cases, tmp_path), strict=True):
        assert f"cluster={result.cluster_size}" in case.config


def test_block_summation(runner: Runner, tmp_path: Path) -> None:
    """The sum is rounded, stored, scored and mixed; the partial sum may be absent."""
    ways = [
        # sources, hidden, absent, in place, config
        (1, 72, False, False, ""),
        (4, 264, False, True, "stages=2"),
        (3, 64, True, False, ""),
        (13, 136, False, False, "cluster=2"),
        (14, 200, False, True, "cluster=4,stages=2"),
        (2, 520, True, False, "cluster=2,columns=192"),
    ]
    cases = []
    for number, (count, hidden, absent, in_place, config) in enumerate(ways):
        case = tile(
            count,
            hidden,
            HALF[number % 2],
            tokens=(3, 3),
            layouts=["contiguous", "sliced"][number % 2],
            order=ORDERS[number % 3],
            norm=number % 4 < 2,
            limits=Limits(4),
            config=config,
        )
        cases.append(summed(case, absent=absent, in_place=in_place))
    run_and_check(runner, cases, tmp_path)


def test_strided_rows_and_vectors_of_any_dtype(runner: Runner, tmp_path: Path) -> None:
    cases = [
        tile(3, 136, dtype, layouts=["sliced", "contiguous"], tokens=(3, 2), gain_dtype=gain_dtype)
        for dtype, gain_dtype in zip(
            itertools.cycle(HALF), [torch.bfloat16, torch.float16, torch.float32], strict=False
        )
    ]
    run_and_check(runner, cases, tmp_path)


def test_known_norms_are_used(runner: Runner, tmp_path: Path) -> None:
    case = tile(4, 72, tokens=(1, 5))
    case.known_rstd = torch.rand(3, 5) + 0.5
    run_and_check(runner, [case], tmp_path)


@pytest.mark.parametrize("dtype", HALF)
def test_queries_of_every_size(dtype: torch.dtype, runner: Runner, tmp_path: Path) -> None:
    """What a 16-bit format has no room for is scaled: no query is too small or too large."""
    cases = []
    for factor in (2.0**-100, 2.0**-30, 2.0**30):
        case = tile(3, 136, dtype, norm=False)
        case.query *= factor
        # A query whose values differ as widely as float32 tells apart.
        case.query[::2] *= 2.0**-12
        case.scale = 1 / factor
        cases.append(case)
    run_and_check(runner, cases, tmp_path)


def test_exact_where_it_must_be(runner: Runner, tmp_path: Path) -> None:
    for dtype in HALF:
        one = tile(1, 136, dtype, norm=False)
        tie = tile(2, 64, dtype, norm=False)
        tie.sources[1] = Rows(tie.sources[0].storage, tie.sources[0].view)
        spike = tile(4, 64, dtype, norm=False)
        spike.scale = 1e4
        single, tied, spiked = run(runner, [one, tie, spike], tmp_path)
        assert torch.equal(single.out, one.values[0].reshape(-1, one.hidden))
        assert torch.equal(single.weights, torch.ones_like(single.weights))
        assert torch.equal(tied.weights, torch.full((2, 3), 0.5))
        assert torch.equal(tied.out, tie.values[0].reshape(-1, tie.hidden))
        assert spiked.out.isfinite().all()


def test_a_row_of_nan_or_infinity_stays_in_its_row(runner: Runner, tmp_path: Path) -> None:
    case = tile(3, 72, tokens=(1, 6))
    source = case.sources[1]
    source.storage[case.hidden + 3] = float("nan")
    source.storage[4 * case.hidden] = float("inf")
    (result,) = run(runner, [case], tmp_path)
    assert result.out.isfinite().all(-1).tolist() == [True, False, True, True, False, True]


def test_result_of_a_row_depends_on_that_row_alone(runner: Runner, tmp_path: Path) -> None:
    whole = tile(5, 264, tokens=(1, 7), limits=Limits(1))
    alone = tile(5, 264, tokens=(1, 1), limits=H100)
    for name in ("query", "key_weight", "out_weight"):
        setattr(alone, name, getattr(whole, name))
    for source, of in zip(alone.sources, whole.sources, strict=True):
        source.storage = of.view[0, 4].clone()
        source.view = source.storage.reshape(1, 1, -1)
    large, small = run(runner, [whole, alone], tmp_path)
    assert torch.equal(large.out[4], small.out[0])
    assert torch.equal(large.stats[:, 4], small.stats[:, 0])


#: Shapes of models, and what they get of an H100: warps, columns, CTAs of a cluster, stages.
MODELS = {
    (10, 2304): (12, 192, 0, 4),
    (9, 7168): (14, 256, 2, 3),
    (54, 2304): (9, 64, 4, 3),
    (9, 4096): (16, 128, 2, 5),
}


@pytest.mark.parametrize(("sizes", "want"), MODELS.items(), ids=str)
def test_shapes_of_models(sizes: tuple[int, int], want: tuple[int, ...], tmp_path: Path) -> None:
    case = tile(*sizes, tokens=(1, 1), limits=H100)
    (result,) = run_and_check(runner_or_skip("plain"), [case], tmp_path)
    assert (result.warps, result.columns, result.cluster_size, result.num_slots) == want


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("warps=many", 'warps is "many", expected a number'),
        ("columns=100", 'columns is "100", expected 64, 128, 192 or 256'),
        ("tile=1", 'which names "tile"; it may name depth_attention'),
        ("depth_attention=fast", 'is "fast", expected "rows" or "tile"'),
        ("cluster=8,columns=256", "which 2 sources of 64 values do not fit"),
    ],
)
def test_a_wish_that_cannot_be_is_a_sentence(config: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=sentence):
        run(runner_or_skip("plain"), [tile(2, 64, config=config)], tmp_path)


def test_what_the_tile_does_not_serve_goes_elsewhere(tmp_path: Path) -> None:
    state = tile(2, 64)
    state.first_logit = torch.zeros(3)
    no_clusters = Limits(1, largest_cluster=1)
    cases = [
        tile(2, 264, config="cluster=2", limits=no_clusters),
        tile(65, 8),
        tile(2, 60),
        tile(2, 64, layouts="misaligned"),
        tile(2, 64, HALF),
        tile(2, 64, torch.float32),
        tile(2, 64, config="depth_attention=rows"),
        state,
    ]
    assert not any(result.warps for result in run(runner_or_skip("plain"), cases, tmp_path))
