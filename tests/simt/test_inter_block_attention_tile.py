"""The tensor-core tile of phase 1, compiled for the CPU, against the definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from .build import Runner, runner_or_skip
from .cases import Limits, Rows
from .inter_block_cases import InterBlock, InterBlockResult, make, run
from .inter_block_cases import run_and_check as run_and_check_all
from .test_depth_attention import HALF

ORDERS = ["random", "forward", "backward"]
H100 = Limits(132)
GAIN_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Both ways to compile what nvcc compiles."""
    return runner_or_skip(request.param)


def tile(*args: object, config: str = "", **options: object) -> InterBlock:
    """A case that the tile serves, as the device would or with wishes of its own."""
    options = {"tokens": (1, 3), "limits": Limits(1), **options}
    return make(*args, config=config, **options)  # type: ignore[arg-type]


def run_and_check(runner: Runner, cases: list[InterBlock], folder: Path) -> list[InterBlockResult]:
    results = run_and_check_all(runner, cases, folder)
    for number, result in enumerate(results):
        assert result.warps > 0, f"case {number} did not take the tile"
        # No two rows of a matrix meet in banks, so each is read or written at once.
        assert result.wavefronts == result.matrices > 0, f"case {number}"
    return results


def test_numbers_of_sources_and_queries(runner: Runner, tmp_path: Path) -> None:
    """One token to a stage or two, a group of queries or several, the last one full or not."""
    sizes = [
        *((1, 1, 8), (2, 9, 136), (3, 8, 72), (5, 6, 200), (8, 24, 64), (4, 3, 456)),
        *((9, 7, 136), (13, 17, 72), (16, 8, 264), (11, 33, 64), (7, 64, 40)),
    ]
    cases = [
        tile(
            *size,
            dtype,
            tokens=(1, tokens),
            order=order,
            gains=gains,
            gain_dtype=gain_dtype,
            save_stats=saves,
        )
        for size, dtype, tokens, order, gains, gain_dtype, saves in zip(
            sizes,
            itertools.cycle(HALF),
            itertools.cycle([3, 4, 1]),
            itertools.cycle(ORDERS),
            itertools.cycle([True, True, False]),
            itertools.cycle(GAIN_DTYPES),
            itertools.cycle([True, False, True]),
            strict=False,
        )
    ]
    run_and_check(runner, cases, tmp_path)


def test_every_configuration(runner: Runner, tmp_path: Path) -> None:
    """Warps of all widths, with tokens enough for every barrier to come round."""
    wishes = itertools.product((128, 192, 224), (1, 2), (0, 1))
    cases = []
    for number, (columns, tokens, more) in enumerate(wishes):
        wish = {"columns": columns, "tokens": tokens, "warps": 1 + more, "stages": 2 + more}
        cases.append(
            tile(
                [5, 16][more] if tokens == 1 else 3,
                [4, 12][more],
                (1 + more) * columns - 56,
                HALF[number // 2 % 2],
                tokens=(1, 11),
                order=ORDERS[number % 3],
                config=",".join(f"inter_block_{name}={value}" for name, value in wish.items()),
            )
        )
    for case, result in zip(cases, run_and_check(runner, cases, tmp_path), strict=True):
        assert f"inter_block_columns={result.columns}," in case.config
        assert f"inter_block_warps={result.warps}," in case.config
        assert case.config.endswith(f"stages={result.num_slots}")


def test_clusters_share_a_token(runner: Runner, tmp_path: Path) -> None:
    cases = [
        tile(
            count,
            queries,
            hidden,
            dtype,
            tokens=(1, 7),
            order=order,
            limits=Limits(2 * cluster),
            config=f"inter_block_cluster={cluster},inter_block_stages={stages}",
        )
        for (cluster, count, queries, hidden), dtype, order, stages in zip(
            [(2, 9, 6, 136), (4, 3, 24, 200), (8, 8, 17, 464), (2, 1, 1, 256), (16, 9, 1, 2000)],
            itertools.cycle(HALF),
            itertools.cycle(ORDERS),
            itertools.cycle([2, 3]),
            strict=False,
        )
    ]
    for case, result in zip(cases, run_and_check(runner, cases, tmp_path), strict=True):
        assert f"cluster={result.cluster_size}," in case.config


def test_strided_rows_and_known_norms(runner: Runner, tmp_path: Path) -> None:
    cases = [
        tile(3, 5, 136, dtype, layouts=["sliced", "contiguous"], tokens=(3, 2)) for dtype in HALF
    ]
    for case in cases:
        case.save_stats = False
        case.known_rstd = 0.5 + torch.rand(3, case.num_tokens)
    run_and_check(runner, cases, tmp_path)


@pytest.mark.parametrize("dtype", HALF)
def test_queries_of_every_size(dtype: torch.dtype, runner: Runner, tmp_path: Path) -> None:
    """What a 16-bit format has no room for is scaled: no query is too small or too large."""
    cases = []
    for factor in (2.0**-100, 2.0**-30, 2.0**30):
        case = tile(3, 3, 136, dtype)
        # Queries whose values differ widely, too.
        for values in (case.queries.storage, case.queries.view.reshape(-1)):
            values *= factor
            values[::2] *= 2.0**-8
        case.scale = 1 / factor
        cases.append(case)
    run_and_check(runner, cases, tmp_path)


def test_exact_where_it_must_be(runner: Runner, tmp_path: Path) -> None:
    for dtype in HALF:
        one = tile(1, 3, 136, dtype)
        tie = tile(2, 3, 64, dtype)
        tie.sources[1] = Rows(tie.sources[0].storage, tie.sources[0].view)
        spike = tile(9, 3, 64, dtype, scale=1e4)
        single, tied, spiked = run(runner, [one, tie, spike], tmp_path)
        for case, result in ((one, single), (tie, tied)):
            value = case.sources[0].view.reshape(-1, case.hidden)
            assert torch.equal(result.out, value.expand_as(result.out))
        assert spiked.out.isfinite().all()
        assert spiked.lse.isfinite().all()


@pytest.mark.parametrize("count", [3, 9])
def test_a_row_of_nan_or_infinity_stays_in_its_row(
    count: int, runner: Runner, tmp_path: Path
) -> None:
    case = tile(count, 5, 72, tokens=(1, 7))
    source = case.sources[1]
    source.storage[case.hidden + 3] = float("nan")
    source.storage[4 * case.hidden] = float("inf")
    (result,) = run(runner, [case], tmp_path)
    finite = [True, False, True, True, False, True, True]
    assert all(out.isfinite().all(-1).tolist() == finite for out in result.out)
    assert all(lse.isfinite().tolist() == finite for lse in result.lse)


@pytest.mark.parametrize("count", [5, 10])
def test_result_of_a_token_depends_on_its_rows_alone(
    count: int, runner: Runner, tmp_path: Path
) -> None:
    """Also where it is the second one of a stage, or another device has more for each."""
    whole = tile(count, 9, 264, tokens=(1, 7), limits=Limits(1))
    alone = tile(count, 9, 264, tokens=(1, 1), limits=H100)
    alone.queries, alone.key_weights = whole.queries, whole.key_weights
    for source, of in zip(alone.sources, whole.sources, strict=True):
        source.storage = of.view[0, 5].clone()
        source.view = source.storage.reshape(1, 1, -1)
    large, small = run(runner, [whole, alone], tmp_path)
    assert torch.equal(large.out[:, 5], small.out[:, 0])
    assert torch.equal(large.lse[:, 5], small.lse[:, 0])


#: Shapes of models (N, S, D), and what they get of an H100: warps of a group, columns, CTAs of a
#: cluster, stages.
MODELS = {
    (9, 6, 2304): (12, 192, 0, 3),
    (8, 24, 7168): (4, 224, 8, 3),
    (8, 16, 4096): (5, 224, 4, 3),
}


@pytest.mark.parametrize(("sizes", "want"), MODELS.items(), ids=str)
def test_shapes_of_models(sizes: tuple[int, ...], want: tuple[int, ...], tmp_path: Path) -> None:
    case = tile(*sizes, tokens=(1, 1), limits=H100)
    (result,) = run_and_check(runner_or_skip("plain"), [case], tmp_path)
    assert (result.warps, result.columns, result.cluster_size, result.num_slots) == want


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("inter_block_warps=0", 'warps is "0", expected a number'),
        ("inter_block_columns=64", 'columns is "64", expected 128, 192 or 224'),
        ("inter_block_tokens=3", 'tokens is "3", expected 1 or 2'),
        ("inter_block_tile=1", 'which names "tile" behind inter_block_; that may be attention'),
        ("inter_block_attention=fast", 'is "fast", expected "rows" or "tile"'),
        ("inter_block_cluster=8,inter_block_columns=224", "64 values and 5 queries do not fit"),
    ],
)
def test_a_wish_that_cannot_be_is_a_sentence(config: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=sentence):
        run(runner_or_skip("plain"), [tile(2, 5, 64, config=config)], tmp_path)


def test_what_the_tile_does_not_serve_goes_elsewhere(tmp_path: Path) -> None:
    no_clusters = Limits(1, largest_cluster=1)
    cases = [
        tile(2, 3, 264, config="inter_block_cluster=2", limits=no_clusters),
        tile(17, 1, 8),
        tile(2, 97, 8),
        tile(2, 3, 60),
        tile(2, 3, 64, layouts="misaligned"),
        tile(2, 3, 64, query_layout="odd"),
        tile(2, 3, 64, HALF),
        tile(2, 3, 64, torch.float32),
        tile(2, 3, 64, config="inter_block_attention=rows"),
    ]
    assert not any(result.warps for result in run(runner_or_skip("plain"), cases, tmp_path))
