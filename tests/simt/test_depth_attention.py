"""The kernel bodies of depth attention, compiled for the CPU, against the definition.

What nvcc compiles is what runs here, thread by thread, in a hostile order: see executor.hpp.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnres_ext import reference

from .build import Runner
from .cases import Case, Limits, Result, rows, run

#: A device so small that rows do not fit: they stream through the ring instead.
TINY = Limits(multiprocessors=2, shared_per_multiprocessor=12 * 1024, shared_per_cta=8 * 1024)
HALF = [torch.bfloat16, torch.float16]


def make(
    count: int,
    hidden: int,
    dtypes: torch.dtype | list[torch.dtype] = torch.bfloat16,
    *,
    tokens: tuple[int, int] = (2, 3),
    layouts: str | list[str] = "contiguous",
    gains: bool = True,
    norm: bool = True,
    gain_dtype: torch.dtype = torch.float32,
    **options: object,
) -> Case:
    """A case whose sources take their dtypes and layouts from the lists in turn."""
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
    layouts = layouts if isinstance(layouts, list) else [layouts]

    def gain() -> Tensor:
        return (1 + 0.2 * torch.randn(hidden, dtype=torch.float64)).to(gain_dtype)

    return Case(
        sources=[
            rows(tokens, hidden, dtype, layout)
            for _, dtype, layout in zip(
                range(count), itertools.cycle(dtypes), itertools.cycle(layouts), strict=False
            )
        ],
        query=(torch.randn(hidden, dtype=torch.float64) * 0.5).to(gain_dtype),
        key_weight=gain() if gains else None,
        out_weight=gain() if norm else None,
        scale=0.7,
        **options,  # type: ignore[arg-type]
    )


def definition(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every output of the kernel by the reference: in float64, or in the case's compute dtype."""
    to = dtype or torch.float64
    values = torch.stack([v.to(to).reshape(-1, case.hidden) for v in case.values])
    query = case.query.to(to)
    key_weight = None if case.key_weight is None else case.key_weight.to(to)
    rstd = torch.rsqrt(values.square().mean(-1) + case.eps)
    logits = reference.logits(values, query, key_weight, case.eps, case.scale)
    if case.known_rstd is not None:
        known = slice(len(case.known_rstd))
        logits[known] *= case.known_rstd.to(to) / rstd[known]
        rstd[known] = case.known_rstd.to(to)
    if case.first_logit is not None:
        rstd[0] = 0
        logits[0] = case.first_logit
        values = values.clone()
        values[0, case.first_logit == float("-inf")] = 0
    lse = torch.logsumexp(logits, 0, keepdim=True)
    weights = torch.softmax(logits, 0)
    out = mix = (weights.unsqueeze(-1) * values).sum(0)
    if case.out_weight is not None:
        out = reference.rms_norm(mix, case.out_weight.to(to), case.out_eps)
    stats = torch.cat([rstd, logits, lse])
    return {"out": out, "mix": mix, "weights": weights, "stats": stats, "last_rstd": rstd[-1]}


def check(case: Case, result: Result) -> None:
    """Within twice the error of plain PyTorch in the compute dtype plus one rounding."""
    exact = definition(case)
    plain = definition(case, case.compute)
    if case.delta is not None:
        new_partial = case.values[-1].reshape(-1, case.hidden)
        assert torch.equal(result.new_partial, new_partial), "new_partial is not the rounded sum"
    for name in ("out", "mix", "weights", "stats", "last_rstd"):
        got = getattr(result, name)
        if got.numel() == 0:
            continue
        if name == "stats" and case.first_logit is not None:
            # An empty state's logit: the only value that may not be finite.
            assert torch.equal(got[len(case.sources)], case.first_logit.to(got.dtype))
            got = got.clone()
            got[len(case.sources)] = 0
            for stats in (exact[name], plain[name]):
                stats[len(case.sources)] = 0
        want, eager = exact[name], plain[name]
        assert got.isfinite().all(), f"{name} holds NaN or infinity"
        error = (got.double() - want).abs().max()
        # Sums in another order: a few roundings of the compute dtype more or less.
        rounding = torch.finfo(got.dtype).eps / 2 * want.abs().max()
        # A rounding of a logit is a relative error of its weight.
        count = len(case.sources)
        logits = exact["stats"][count : 2 * count]
        roundings = 8 + logits[logits.isfinite()].abs().max()
        order = roundings * torch.finfo(case.compute).eps * want.abs().max()
        if case.compute == torch.float64:
            allowed = 64 * order + rounding
        else:
            allowed = 2 * (eager.double() - want).abs().max() + rounding + order
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run_and_check(runner: Runner, cases: list[Case], folder: Path) -> list[Result]:
    results = run(runner, cases, folder)
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        try:
            check(case, result)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from None
    return results


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_aligned_rows_stay_on_chip(ring: str, runner: Runner, tmp_path: Path) -> None:
    cases = [
        make(count, hidden, dtype, ring=ring, order=order, norm=norm, gains=gains)
        for (count, hidden, dtype), order, (norm, gains) in zip(
            itertools.product((1, 2, 9), (8, 264, 1032), (*HALF, torch.float32)),
            itertools.cycle(["forward", "backward", "random"]),
            itertools.cycle([(True, True), (False, True), (True, False), (False, False)]),
            strict=False,
        )
    ]
    for result in run_and_check(runner, cases, tmp_path):
        assert result.uses_slots
        assert result.resident
        assert result.num_spans == 1


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_rows_too_large_for_the_ring_are_swept_again(
    ring: str, runner: Runner, tmp_path: Path
) -> None:
    # A single segment, which a cluster cannot share.
    cases = [
        make(count, 512, torch.bfloat16, ring=ring, order=order, norm=norm, limits=TINY)
        for count, order, norm in [
            (9, "forward", True),
            (17, "random", False),
            (12, "backward", True),
        ]
    ]
    for result in run_and_check(runner, cases, tmp_path):
        assert result.uses_slots
        assert not result.resident
        assert result.num_slots < 5


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_rows_too_large_for_registers_come_in_spans(
    ring: str, runner: Runner, tmp_path: Path
) -> None:
    # 480 threads hold 4 chunks of 4 values each: 7680 values are one span, and 8 times as many are
    # one of a cluster.
    share = {"cp_async": 1, "bulk": 8}[ring]
    large = Limits(1, share * 228 * 1024, share * 227 * 1024)
    small = Limits(1, 64 * 1024, 63 * 1024)
    cases = [
        make(
            2, share * 7680 + 16, torch.float32, ring=ring, tokens=(1, 2), norm=norm, limits=limits
        )
        for norm, limits in itertools.product((True, False), (large, small))
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert [result.num_spans for result in results] == 4 * [share + 1]
    assert [result.resident for result in results] == [True, False, True, False]
    assert not any(result.cluster_size for result in results)


def test_spans_are_as_wide_as_shared_memory_has_room_for(runner: Path, tmp_path: Path) -> None:
    # Two slots of 15360 values, or of 7680.
    limits = [Limits(1, kib << 10, kib << 10) for kib in (64, 60)]
    cases = [
        make(2, 2 * 7680, torch.bfloat16, ring="cp_async", tokens=(1, 1), limits=of)
        for of in limits
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert [result.num_spans for result in results] == [1, 2]
    for result, of in zip(results, limits, strict=True):
        assert result.shared_bytes <= of.shared_per_cta


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_more_rows_than_ctas(ring: str, runner: Runner, tmp_path: Path) -> None:
    few = Limits(1, 6 * 1024, 5 * 1024)
    cases = [
        make(3, 128, torch.bfloat16, ring=ring, tokens=(5, 5), order="random", limits=few),
        make(1, 64, torch.float32, ring=ring, tokens=(1, 1)),
    ]
    first, second = run_and_check(runner, cases, tmp_path)
    assert first.num_ctas < 25
    assert second.num_ctas == 1


def summed(
    count: int,
    hidden: int,
    dtypes: torch.dtype | list[torch.dtype] = torch.bfloat16,
    *,
    delta_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    **options: object,
) -> Case:
    """Block summation: the last source is a partial, and there is a delta."""
    case = make(count, hidden, dtypes, **options)  # type: ignore[arg-type]
    dtype = delta_dtype or case.sources[-1].view.dtype
    case.delta = rows(case.tokens, hidden, dtype, layout)
    return case


SUM_WAYS = [{}, {"in_place": True}, {"absent_partial": True}]


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_block_summation(ring: str, runner: Runner, tmp_path: Path) -> None:
    cases = [
        summed(count, hidden, dtype, ring=ring, order=order, norm=norm, **way)
        for (count, hidden, dtype), way, order, norm in zip(
            [
                (1, 264, torch.bfloat16),
                (2, 264, torch.float32),
                (9, 136, torch.float16),
                (16, 64, torch.bfloat16),  # a full short table, and the delta
                (3, 8, torch.float32),
                (1, 520, torch.float16),
            ],
            itertools.cycle(SUM_WAYS),
            itertools.cycle(["forward", "backward", "random"]),
            itertools.cycle([True, False]),
            strict=False,
        )
    ]
    assert all(result.resident for result in run_and_check(runner, cases, tmp_path))


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_block_summation_of_rows_that_stream(ring: str, runner: Runner, tmp_path: Path) -> None:
    # A cluster cannot share single segments, and 61456 columns are more than it can hold.
    share = {"cp_async": 1, "bulk": 8}[ring]
    cases = [
        summed(count, 512, torch.bfloat16, ring=ring, order=order, limits=TINY, **way)
        for count, way, order in zip(
            (17, 12, 11, 9),
            [SUM_WAYS[1], *SUM_WAYS],
            itertools.cycle(["forward", "random"]),
            strict=False,
        )
    ]
    # Several spans, a mix made twice: every sweep but the first reads the sum where it was put.
    large, small = Limits(1, share * 228 * 1024, share * 227 * 1024), Limits(1, 65536, 64512)
    cases += [
        summed(
            2,
            share * 7680 + 16,
            torch.float32,
            ring=ring,
            tokens=(1, 2),
            limits=limits,
            in_place=True,
        )
        for limits in (large, small)
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert [result.resident for result in results] == [*[False] * 4, True, False]
    assert not any(result.cluster_size for result in results)


def shared(
    count: int,
    hidden: int,
    dtypes: torch.dtype | list[torch.dtype] = torch.bfloat16,
    *,
    multiprocessors: int = 8,
    tokens: int = 1,
    delta: bool = False,
    **options: object,
) -> Case:
    """Few tokens on a device with more multiprocessors."""
    build = summed if delta else make
    limits = Limits(multiprocessors=multiprocessors)
    return build(count, hidden, dtypes, tokens=(1, tokens), limits=limits, **options)  # type: ignore[operator]


def test_few_tokens_share_the_multiprocessors(runner: Runner, tmp_path: Path) -> None:
    cases = [
        (1, shared(5, 4096, multiprocessors=1)),
        (2, shared(5, 4096, multiprocessors=3, order="random")),
        (4, shared(5, 4096, tokens=2, norm=False)),
        (8, shared(5, 4096, order="backward")),
        (8, shared(9, 4104, torch.float16, multiprocessors=17, tokens=2, order="random")),
        # Segments of 512 columns: five, so four CTAs at most.
        (4, shared(5, 2052 + 4, torch.float32, order="random")),
        (4, shared(5, 2056, [torch.bfloat16, torch.float32])),
        (2, shared(20, 1032, order="random")),
        (1, shared(2, 264, tokens=3)),
        (1, shared(2, 264, delta=True, in_place=True)),
        (8, shared(5, 4096, delta=True, in_place=True, order="random")),
        (8, shared(9, 4096, torch.float16, delta=True, norm=False)),
        (8, shared(9, 4096, delta=True, absent_partial=True, order="backward")),
        (4, shared(5, 2056, torch.bfloat16, delta=True, delta_dtype=torch.float32, in_place=True)),
        # One source, of two spans in one CTA.
        (4, shared(1, 15368, norm=False)),
    ]
    results = run_and_check(runner, [case for _, case in cases], tmp_path)
    assert [result.cluster_size for result in results] == [size for size, _ in cases]
    assert all(result.num_spans == 1 for result in results)


def test_few_tokens_merge_a_state_and_know_rstd(runner: Runner, tmp_path: Path) -> None:
    cases = [
        shared(5, 4096, delta=True, in_place=True),
        shared(5, 4096, multiprocessors=4),
        shared(20, 1032, tokens=3, order="random"),
    ]
    for case in cases:
        case.first_logit = torch.randn(case.num_tokens)
        case.known_rstd = 1 + torch.rand(len(case.sources) - 1, case.num_tokens)
    assert all(result.cluster_size > 1 for result in run_and_check(runner, cases, tmp_path))


def test_rows_too_large_for_a_cta_are_shared(runner: Runner, tmp_path: Path) -> None:
    def narrow(shared_bytes: int) -> Limits:
        return Limits(8, shared_bytes, shared_bytes)

    cases = [
        make(9, 1024, torch.bfloat16, limits=narrow(18 << 10), tokens=(3, 3)),
        make(9, 2048, torch.float16, limits=narrow(18 << 10), order="random"),
        make(17, 2080, torch.bfloat16, limits=narrow(40 << 10), tokens=(4, 3)),
        make(20, 2048, torch.float32, limits=narrow(80 << 10), order="backward", norm=False),
        make(9, 1536, [torch.bfloat16, torch.float32], limits=narrow(40 << 10)),
        summed(9, 1024, torch.bfloat16, limits=narrow(20 << 10), tokens=(3, 3), in_place=True),
        # Too large for any cluster: the second sweep reads again.
        make(17, 1040, torch.bfloat16, limits=narrow(10 << 10), order="random"),
        summed(17, 1040, torch.bfloat16, limits=narrow(10 << 10), in_place=True),
    ]
    results = run_and_check(runner, cases, tmp_path)
    assert all(result.cluster_size > 1 for result in results)
    assert [result.resident for result in results] == [True] * 6 + [False] * 2
    # More rows than clusters.
    assert results[0].num_ctas < 9 * results[0].cluster_size


def test_a_device_that_runs_no_clusters_does_without(runner: Runner, tmp_path: Path) -> None:
    """A small part of a device may have no room for one."""
    small = Limits(8, 18 << 10, 18 << 10, largest_cluster=1)
    cases = [
        shared(5, 4096, order="random"),
        shared(5, 2056, [torch.bfloat16, torch.float32], delta=True, in_place=True),
        make(9, 1024, torch.bfloat16, limits=small, tokens=(3, 3)),
        make(20, 1032, torch.float16, limits=small),
    ]
    for case in cases:
        case.limits.largest_cluster = 1
    assert not any(result.cluster_size for result in run_and_check(runner, cases, tmp_path))


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_sources_are_taken_several_at_a_time(ring: str, runner: Runner, tmp_path: Path) -> None:
    # Four of them in a cluster, two in a CTA, and what is left over.
    few = [shared(count, 40968 // count // 8 * 8 + 8, ring=ring) for count in range(2, 9)]
    # A row streams through few slots, and no group may be as large as the ring.
    streamed = [
        make(count, 512, ring=ring, limits=Limits(2, kib << 10, kib << 10), tokens=(1, 3))
        for count, kib in [(9, 4), (8, 5), (9, 6), (8, 7), (9, 8)]
    ]
    results = run_and_check(runner, few + streamed, tmp_path)
    assert not any(result.resident for result in results[len(few) :])
    assert len({result.shared_bytes for result in results[len(few) :]}) >= 4


def test_result_does_not_depend_on_how_many_share_a_row(runner: Runner, tmp_path: Path) -> None:
    for dtype, hidden in [(torch.bfloat16, 8200), (torch.float16, 4104), (torch.float32, 2056)]:
        torch.manual_seed(5)
        alone = shared(5, hidden, dtype, tokens=9, multiprocessors=2)
        cases = [alone]
        for multiprocessors in (1, 2, 4, 8):
            case = shared(5, hidden, dtype, multiprocessors=multiprocessors)
            case.query, case.key_weight, case.out_weight = (
                alone.query,
                alone.key_weight,
                alone.out_weight,
            )
            for source, of in zip(case.sources, alone.sources, strict=True):
                source.storage = of.view[0, 4].clone()
                source.view = source.storage.reshape(1, 1, -1)
            cases.append(case)
        first, *others = run(runner, cases, tmp_path)
        assert first.cluster_size == 0
        assert {other.cluster_size for other in others} >= {2, 4}
        for other in others:
            for name in ("out", "mix"):
                assert torch.equal(getattr(first, name)[4], getattr(other, name)[0])
            for name in ("weights", "stats"):
                assert torch.equal(getattr(first, name)[:, 4], getattr(other, name)[:, 0])
