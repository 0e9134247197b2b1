"""The kernel bodies of phase 1's backward, compiled for the CPU, against autograd."""

from __future__ import annotations

import functools
import itertools
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnres_ext import reference

from .build import Runner, runner_or_skip
from .cases import (
    Limits,
    encode_absent,
    encode_config,
    encode_head,
    encode_rows,
    encode_tensor,
    rows,
    run_cases,
)
from .gradient_cases import NO_BASE, OTHER_BASE, OWN_BASE, GradientCase
from .inter_block_cases import InterBlock, definition, make
from .test_depth_attention_backward import add_bases, check_gradients
from .test_depth_attention_backward import run_and_check as run_and_check_by
from .test_inter_block_attention import MIXED, RINGS, Way, sharing

#: Score vectors fit a panel of columns at a time. One multiprocessor runs no clusters.
SMALL = Limits(multiprocessors=1, shared_per_multiprocessor=33 * 1024, shared_per_cta=32 * 1024)


@dataclass
class Backward(GradientCase):
    """One call of the backward of a forward case, ready to be written."""

    case: InterBlock
    saved: bool = True
    out_too: bool = True
    lse_too: bool = True
    base_kinds: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    gains: bool = True
    grad_layout: str = "contiguous"

    def __post_init__(self) -> None:
        case = self.case
        # [S * M, D] in two levels: a query's tokens one after the other.
        shape = (case.num_queries, case.num_tokens)
        self.grad_out = None
        if self.out_too:
            self.grad_out = rows(shape, case.hidden, case.out_dtype, self.grad_layout)
        self.grad_lse = torch.randn(shape, dtype=case.compute) if self.lse_too else None
        self.choose_bases()

    def output_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the gradients of sources, queries and gains, and of the parts."""
        case = self.case
        matrix = (case.num_queries, case.hidden)
        dtype = case.queries.view.dtype
        has_gains = self.gains and case.key_weights is not None
        parts = ((self.num_parts, *matrix) if self.gains else (0,), case.compute)
        return [
            *self.source_gradient_shapes(),
            (matrix if self.gains else (0,), dtype),
            (matrix if has_gains else (0,), dtype),
            parts,
        ]

    def encode(self, seed: int) -> bytes:
        """The bytes of the case in the order in which the runner takes them."""
        case = self.case
        parts = [encode_head(case, seed, "inter_block_backward")]
        parts += [struct.pack("=2q", case.num_queries, self.num_parts)]
        parts += [encode_config(case.config), case.encode_inputs()]
        parts.append(self.encode_bases())
        parts.append(encode_absent() if self.grad_out is None else encode_rows(self.grad_out))
        stats = None
        if self.saved:
            stats = definition(case, torch.float64)["stats"].to(case.compute)
        for values in (self.grad_lse, stats):
            parts.append(encode_absent() if values is None else encode_tensor(values, 1, 0, 0))
        parts.append(self.encode_outputs(self.output_shapes()))
        return b"".join(parts)


def gradients(backward: Backward, dtype: torch.dtype, columns: Tensor) -> list[Tensor | None]:
    """By autograd of the definition: of sources (bases added), queries and key_weights.

    ``columns`` is an order of the columns: the same gradients, rounded differently.
    """
    case = backward.case
    values = [v.view.to(dtype).reshape(-1, case.hidden).requires_grad_() for v in case.sources]
    vectors = [
        None if matrix is None else matrix.view[0].to(dtype).requires_grad_()
        for matrix in (case.queries, case.key_weights)
    ]
    out, lse = reference.inter_block_attention(
        [value[:, columns] for value in values],
        *(None if matrix is None else matrix[:, columns] for matrix in vectors),
        eps=case.eps,
        scale=case.scale,
    )
    loss = torch.zeros((), dtype=dtype)
    if backward.grad_out is not None:
        loss = loss + (out * backward.grad_out.view.to(dtype)[..., columns]).sum()
    if backward.grad_lse is not None:
        loss = loss + (lse * backward.grad_lse.to(dtype)).sum()
    present = [x for x in (*values, *vectors) if x is not None]
    found = iter(torch.autograd.grad(loss, present))
    grads = [None if x is None else next(found) for x in (*values, *vectors)]
    add_bases(grads, backward, dtype)
    return grads


def check(backward: Backward, outputs: list[Tensor]) -> None:
    """Within twice the error of autograd in the compute dtype plus roundings."""
    case = backward.case
    exact = gradients(backward, torch.float64, torch.arange(case.hidden))
    samples = [gradients(backward, case.compute, torch.randperm(case.hidden)) for _ in range(4)]
    largest_logit = definition(case, torch.float64)["logits"].abs().max()
    count = len(case.sources)
    names = [*(f"sources[{i}]" for i in range(count)), "queries", "key_weights"]
    check_gradients(names, outputs, exact, samples, largest_logit, case.compute)


#: Flavour and ring. Sanitizers cost much: the other ring is under them in the other file.
WAYS = [
    *itertools.product(["plain"], ("cp_async", "bulk")),
    ("sanitized", "cp_async"),
]


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> Way:
    flavour, ring = request.param
    return runner_or_skip(flavour), ring


run_and_check = functools.partial(run_and_check_by, check=check)


def test_rows_of_bfloat16(way: Way, tmp_path: Path) -> None:
    """On tensor cores."""
    runner, ring = way
    cases = [
        Backward(make(count, queries, hidden, ring=ring, order=order, gains=gains), saved=saved)
        for (count, queries, hidden), order, gains, saved in zip(
            [(1, 1, 8), (3, 5, 136), (8, 24, 64), (9, 6, 200), (17, 9, 72), (2, 33, 64)],
            itertools.cycle(["forward", "backward", "random"]),
            itertools.cycle([True, False]),
            itertools.cycle([True, True, False]),
            strict=False,
        )
    ]
    assert all(one.uses_slots for one in run_and_check(runner, cases, tmp_path))


def test_gradients_of_queries_and_gains_are_as_exact_as_in_float32(
    runner: Runner, tmp_path: Path
) -> None:
    """On tensor cores, too. Root mean squares: one element's error is luck."""
    torch.manual_seed(0)
    cases = [Backward(make(3, count, 40, tokens=(2, 2))) for count in (1, 2, 5, 6, 24, 33)]
    for backward, (_, outputs) in zip(cases, run_cases(runner, cases, tmp_path), strict=True):
        columns = torch.arange(40)
        exact = gradients(backward, torch.float64, columns)[-2:]
        plain = gradients(backward, torch.float32, columns)[-2:]
        for got, want, float32 in zip(outputs[3:5], exact, plain, strict=True):
            size = want.square().mean().sqrt()
            error = (got - want).square().mean().sqrt() / size
            allowed = 2 * (float32 - want).square().mean().sqrt() / size + 2.0**-23
            assert error <= allowed, f"{backward.case.num_queries} queries: {error:.3e}"


@pytest.mark.parametrize("saved", [True, False])
def test_score_vectors_that_do_not_fit_come_in_passes(
    saved: bool, way: Way, tmp_path: Path
) -> None:
    runner, ring = way
    cases = [
        Backward(make(2, 11, 328, torch.bfloat16, ring=ring, limits=SMALL), saved=saved),
        Backward(make(2, 8, 520, torch.float32, ring=ring, limits=SMALL), saved=saved),
    ]
    launched = run_and_check(runner, cases, tmp_path)
    assert all(one.uses_slots and one.num_spans > 1 for one in launched)


def test_ctas_of_a_cluster_share_the_columns_of_a_token(runner: Runner, tmp_path: Path) -> None:
    """As few as keep the score vectors, and the sums of their gradients if any do."""
    kinds = [NO_BASE, OTHER_BASE, OWN_BASE]
    cases = [
        Backward(make(3, 5, 328, limits=sharing(8, 28), order="random"), base_kinds=kinds),
        Backward(make(2, 4, 264, torch.float32, limits=sharing(6, 12), order="backward")),
        Backward(make(2, 11, 200, limits=sharing(5, 24), tokens=(2, 4)), saved=False),
        # Sums in global memory.
        Backward(make(2, 11, 200, limits=sharing(8, 18), order="random", gains=False)),
        Backward(make(3, 5, 328, limits=sharing(8, 18), tokens=(1, 3)), out_too=False, saved=False),
    ]
    launched = run_and_check(runner, cases, tmp_path)
    assert [one.cluster_size for one in launched] == [2, 4, 4, 4, 2]
    assert all(one.uses_slots and one.num_spans == 1 for one in launched)


def test_large_clusters_only_where_the_device_runs_them(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(make(2, 4, 1096, limits=sharing(count, 16), tokens=(1, 2), order="random"))
        for count in (16, 17)
    ]
    large, small = run_and_check(runner, cases, tmp_path)
    assert large.cluster_size == 16
    assert small.cluster_size <= 8


def test_other_rows(way: Way, tmp_path: Path) -> None:
    """By ordinary arithmetic, in shared memory or in place."""
    runner, ring = way
    cases = [
        Backward(make(3, 5, 72, torch.float32, ring=ring, order="random")),
        Backward(make(4, 6, 136, MIXED, ring=ring, gain_dtype=torch.bfloat16), saved=False),
        Backward(make(2, 3, 64, torch.float16, ring=ring)),
        Backward(make(1, 1, 1, torch.bfloat16)),
        Backward(make(3, 2, 5, torch.float16, query_layout="odd"), saved=False),
        Backward(make(9, 6, 77, torch.bfloat16, layouts="odd"), grad_layout="odd"),
        Backward(make(2, 5, 64, torch.bfloat16, layouts="misaligned"), grad_layout="misaligned"),
        Backward(make(2, 3, 37, [torch.float64, torch.bfloat16], layouts="odd")),
        Backward(make(3, 4, 64, torch.float64, gain_dtype=torch.float64), saved=False),
        # Not even one token fits.
        Backward(make(4, 4, 2048, torch.bfloat16, limits=SMALL, tokens=(1, 2))),
    ]
    launched = run_and_check(runner, cases, tmp_path)
    assert [one.uses_slots for one in launched] == [True] * 3 + [False] * 7


def test_more_tiles_than_ctas(way: Way, tmp_path: Path) -> None:
    runner, ring = way
    one = Limits(1, 64 * 1024, 63 * 1024)
    cases = [
        Backward(make(5, 3, 64, dtype, ring=ring, tokens=(3, 7), order="random", limits=one))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert all(one.num_ctas <= 2 for one in run_and_check(runner, cases, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_run_gives_the_same_bits(dtype: torch.dtype, runner: Runner, tmp_path: Path) -> None:
    """Whatever the order in which threads run."""
    case = make(3, 3, 72, dtype, tokens=(2, 3))
    backward = Backward(case)
    found = []
    for order, ring in itertools.product(("forward", "backward", "random"), RINGS):
        case.order, case.ring = order, ring
        ((_, outputs),) = run_cases(runner, [backward], tmp_path)
        found.append(outputs[:-1])
    for outputs in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, found[0], strict=True))
