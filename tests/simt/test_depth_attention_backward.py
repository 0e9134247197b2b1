"""The backward's kernel bodies, compiled for the CPU, against autograd of the definition."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import reference

from .build import Runner
from .cases import (
    Case,
    Launched,
    Limits,
    encode_absent,
    encode_config,
    encode_rows,
    encode_tensor,
    rows,
    run_cases,
)
from .gradient_cases import NO_BASE, OTHER_BASE, OWN_BASE, SHARED_BASE, GradientCase
from .test_depth_attention import HALF, TINY, make

SAVES = ("nothing", "stats", "output")


@dataclass
class Backward(GradientCase):
    """One call of the backward of a forward case, ready to be written."""

    case: Case
    save: str = "stats"
    weights_too: bool = False
    base_kinds: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    gains: bool = True
    grad_layout: str = "contiguous"

    def __post_init__(self) -> None:
        case, count = self.case, len(self.case.sources)
        # Weights of one and zero would only test what is left after cancellation.
        case.scale = min(case.scale, 4 / case.hidden**0.5)
        self.grad_out = rows(case.tokens, case.hidden, case.out_dtype, self.grad_layout)
        self.choose_bases()
        self.grad_weights = None
        if self.weights_too:
            self.grad_weights = torch.randn(count, case.num_tokens, dtype=case.compute)

    def output_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the gradients of sources, lse, query and gains, and of the parts."""
        case = self.case
        lse = ((case.num_tokens,) if case.first_logit is not None else (0,), case.compute)
        vectors = [
            ((0,) if vector is None or not self.gains else (case.hidden,), torch.float32)
            if vector is None
            else ((case.hidden,) if self.gains else (0,), vector.dtype)
            for vector in (case.query, case.key_weight, case.out_weight)
        ]
        grads = self.source_gradient_shapes()
        return [*grads, lse, *vectors, ((self.num_parts, 2, case.hidden), case.compute)]

    def encode(self, seed: int) -> bytes:
        """The bytes of the case in the order in which the runner takes them."""
        case = self.case
        saved = attend(case, torch.float64)
        stats = saved["stats"].to(case.compute) if self.save != "nothing" else None
        has_mix = self.save == "output" and case.out_weight is not None
        mix = saved["mix"].to(case.compute) if has_mix else None
        parts = [case.encode_head(seed, "backward"), struct.pack("=q", self.num_parts)]
        parts.append(encode_config(case.config))
        parts += [encode_rows(source) for source in case.sources]
        parts.append(self.encode_bases())
        for vector in (case.query, case.key_weight, case.out_weight):
            parts.append(encode_absent() if vector is None else encode_tensor(vector, 1, 0, 0))
        parts.append(encode_rows(self.grad_out))
        parts.append(
            encode_absent() if mix is None else encode_tensor(mix, case.num_tokens, 0, case.hidden)
        )
        for values in (case.first_logit, self.grad_weights, stats):
            parts.append(encode_absent() if values is None else encode_tensor(values, 1, 0, 0))
        parts.append(self.encode_outputs(self.output_shapes()))
        return b"".join(parts)


def attend(case: Case, dtype: torch.dtype, values: list[Tensor] | None = None) -> dict[str, Tensor]:
    """What a forward of plain sources saves: mix [M, D] and stats [2N + 1, M]."""
    values = values or clean_values(case, dtype)
    stacked = torch.stack(values)
    rstd = torch.rsqrt(stacked.square().mean(-1) + case.eps)
    key_weight = None if case.key_weight is None else case.key_weight.to(dtype)
    logits = reference.logits(stacked, case.query.to(dtype), key_weight, case.eps, case.scale)
    if case.first_logit is not None:
        logits[0] = case.first_logit
    mix = (torch.softmax(logits, 0).unsqueeze(-1) * stacked).sum(0)
    return {
        "mix": mix,
        "logits": logits,
        "stats": torch.cat([rstd, logits, torch.logsumexp(logits, 0, keepdim=True)]),
    }


def clean_values(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The sources [M, D] with zeros for what an empty state holds."""
    values = [value.to(dtype).reshape(-1, case.hidden) for value in case.values]
    if case.first_logit is not None:
        values[0] = values[0].clone()
        values[0][case.first_logit == float("-inf")] = 0
    return values


def gradients(
    backward: Backward, dtype: torch.dtype, columns: Tensor | None = None
) -> list[Tensor | None]:
    """By autograd of the definition: of sources (bases added), lse, query and gains.

    ``columns`` is an order of the columns: the same gradients, rounded differently.
    """
    case = backward.case
    values = [value.requires_grad_() for value in clean_values(case, dtype)]
    vectors = [
        None if vector is None else vector.to(dtype).requires_grad_()
        for vector in (case.query, case.key_weight, case.out_weight)
    ]
    if columns is None:
        columns = torch.arange(case.hidden)
    ordered = [value[:, columns] for value in values]
    query, key_weight, out_weight = (None if x is None else x[columns] for x in vectors)
    options = {"eps": case.eps, "out_eps": case.out_eps, "scale": case.scale}
    lse = None
    if case.first_logit is not None:
        lse = case.first_logit.to(dtype).requires_grad_()
        out, _ = reference.merge_partial(
            ordered[0], lse, ordered[1], None, query, key_weight, out_weight=out_weight, **options
        )
    else:
        out, weights = reference.depth_attention(
            ordered, query, key_weight, out_weight=out_weight, return_weights=True, **options
        )
    grad_out = backward.grad_out.view.to(dtype).reshape(-1, case.hidden)
    loss = (out * grad_out[:, columns]).sum()
    if backward.grad_weights is not None:
        loss = loss + (weights * backward.grad_weights.to(dtype)).sum()
    inputs = [*values, lse, *vectors]
    present = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(loss, present, allow_unused=True))
    grads = [None if x is None else next(found) for x in inputs]
    grads = [
        torch.zeros_like(x) if x is not None and grad is None else grad
        for x, grad in zip(inputs, grads, strict=True)
    ]
    add_bases(grads, backward, dtype)
    return grads


def add_bases(grads: list[Tensor | None], backward: GradientCase, dtype: torch.dtype) -> None:
    """Adds to gradients of sources what those of the kernel are added to."""
    for i, (kind, base) in enumerate(zip(backward.base_kinds, backward.bases, strict=True)):
        if base is not None:
            grads[i] = grads[i] + base.view.to(dtype).reshape(grads[i].shape)
        elif kind == SHARED_BASE:
            grads[i - 1] = grads[i - 1] + grads[i]


def check(backward: Backward, outputs: list[Tensor]) -> None:
    """Within twice the error of autograd in the compute dtype plus roundings."""
    case = backward.case
    exact = gradients(backward, torch.float64)
    samples = [gradients(backward, case.compute, torch.randperm(case.hidden)) for _ in range(4)]
    logits = attend(case, torch.float64)["logits"]
    largest_logit = logits[logits.isfinite()].abs().max()
    count = len(case.sources)
    names = [*(f"sources[{i}]" for i in range(count)), "lse", "query", "key_weight", "out_weight"]
    check_gradients(names, outputs, exact, samples, largest_logit, case.compute)


def check_gradients(
    names: list[str],
    outputs: list[Tensor],
    exact: list[Tensor | None],
    samples: list[list[Tensor | None]],
    largest_logit: Tensor,
    compute: torch.dtype,
) -> None:
    """Each output, unless it is empty, against the exact gradient and ``samples`` of autograd's in
    the compute dtype."""
    for i, name in enumerate(names):
        got, want = outputs[i], exact[i]
        if got.numel() == 0:
            continue
        assert got.isfinite().all(), f"{name}: its gradient holds NaN or infinity"
        error, largest = (got.double() - want).abs().max(), want.abs().max()
        eager = max((sample[i].double() - want).abs().max() for sample in samples)
        # A second rounding where two sources leave their gradients in the same rows; float16's
        # smallest values are coarse.
        dtype = torch.finfo(got.dtype)
        rounding = dtype.eps * max(largest, dtype.tiny)
        # A rounding of a logit is a relative error of its weight.
        order = (32 + 4 * largest_logit) * torch.finfo(compute).eps * largest
        allowed = 2 * eager + rounding + order
        if compute == torch.float64:
            allowed = 64 * order + rounding
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run_and_check(
    runner: Runner,
    cases: Sequence[GradientCase],
    folder: Path,
    check: Callable[[Any, list[Tensor]], None] = check,
) -> list[Launched]:
    results = run_cases(runner, cases, folder)
    for number, (case, (_, outputs)) in enumerate(zip(cases, results, strict=True)):
        try:
            check(case, outputs)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from None
    return [launched for launched, _ in results]


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_aligned_rows_stay_on_chip(ring: str, runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(
            make(count, hidden, dtype, ring=ring, order=order, norm=norm, gains=gains),
            save=save,
            weights_too=weights_too,
        )
        for (count, hidden, dtype), order, (norm, gains), save, weights_too in zip(
            itertools.product((1, 2, 9), (8, 264, 1032), (*HALF, torch.float32)),
            itertools.cycle(["forward", "backward", "random"]),
            itertools.cycle([(True, True), (False, True), (True, False), (False, False)]),
            itertools.cycle(["stats", "nothing", "output", "stats", "output"]),
            itertools.cycle([False, True]),
            strict=False,
        )
    ]
    for launched in run_and_check(runner, cases, tmp_path):
        assert launched.uses_slots
        assert launched.resident


#: Under sanitizers, which take ten times as long, each level and either norm, not all pairs.
every_save_and_norm = pytest.mark.parametrize(
    ("runner", "save", "norm"),
    [
        *[("plain", save, norm) for save in SAVES for norm in (True, False)],
        *[("sanitized", save, i % 2 == 0) for i, save in enumerate(SAVES)],
    ],
    indirect=["runner"],
)


@every_save_and_norm
def test_every_save_level_in_every_way(
    save: str, norm: bool, runner: Runner, tmp_path: Path
) -> None:
    cases = [
        Backward(make(count, hidden, dtype, norm=norm, **options), save=save, weights_too=True)
        for count, hidden, dtype, options in [
            (5, 136, torch.bfloat16, {"ring": "bulk"}),
            (5, 136, torch.float32, {"ring": "cp_async"}),
            # A single segment, which a cluster cannot share.
            (12, 512, torch.bfloat16, {"ring": "bulk", "limits": TINY, "order": "random"}),
            (6, 1024, torch.float32, {"ring": "cp_async", "limits": TINY}),
            (3, 77, torch.float32, {}),
            (2, 4001, torch.bfloat16, {"tokens": (1, 2)}),  # two spans in place
            (2, 33, torch.float64, {}),
        ]
    ]
    # Two spans of aligned rows.
    wide = make(2, 7688, torch.bfloat16, norm=norm, tokens=(1, 2), ring="cp_async")
    cases.append(Backward(wide, save=save))
    launched = run_and_check(runner, cases, tmp_path)
    assert [one.uses_slots for one in launched] == [True] * 4 + [False] * 4
    assert [one.resident for one in launched[:4]] == [True, True, False, False]
    assert launched[5].num_spans == launched[7].num_spans == 2


@every_save_and_norm
def test_rows_too_large_for_a_cta_are_shared(
    save: str, norm: bool, runner: Runner, tmp_path: Path
) -> None:
    def narrow(kilobytes: int) -> Limits:
        return Limits(8, kilobytes << 10, kilobytes << 10)

    kinds = [NO_BASE, OTHER_BASE, OWN_BASE, SHARED_BASE, *[NO_BASE] * 13]
    cases = [
        Backward(
            make(count, hidden, dtypes, norm=norm, **options),
            save=save,
            weights_too=True,
            base_kinds=kinds[:count],
        )
        for count, hidden, dtypes, options in [
            (9, 1024, torch.bfloat16, {"limits": narrow(20), "order": "random"}),
            (17, 2080, torch.float16, {"limits": narrow(48), "tokens": (4, 3)}),
            (5, 1544, [torch.bfloat16, torch.float32], {"limits": narrow(40), "tokens": (1, 2)}),
            # Read again by every sweep.
            (17, 1040, torch.float32, {"limits": narrow(24), "order": "backward"}),
            # Alone, two spans.
            (2, 7688, torch.bfloat16, {"tokens": (1, 2), "order": "random"}),
        ]
    ]
    launched = run_and_check(runner, cases, tmp_path)
    assert [one.cluster_size > 1 for one in launched] == [True] * 5
    assert [one.resident for one in launched] == [True, True, True, False, True]
    # A device that runs no clusters does without.
    for backward in cases:
        backward.case.limits.largest_cluster = 1
    assert not any(one.cluster_size for one in run_and_check(runner, cases, tmp_path))


@pytest.mark.parametrize("ring", ["cp_async", "bulk"])
def test_more_rows_than_ctas(ring: str, runner: Runner, tmp_path: Path) -> None:
    few = Limits(1, 12 * 1024, 11 * 1024)
    cases = [
        Backward(make(3, hidden, dtype, ring=ring, tokens=(5, 5), order="random", limits=few))
        for hidden, dtype in [(128, torch.bfloat16), (128, torch.float32), (13, torch.float32)]
    ]
    for launched in run_and_check(runner, cases, tmp_path):
        assert launched.num_ctas <= 2


def test_results_do_not_depend_on_the_order_of_threads(runner: Runner, tmp_path: Path) -> None:
    cases = [
        Backward(make(4, 136, torch.bfloat16, tokens=(3, 3), limits=Limits(1)), save="nothing")
        for _ in range(3)
    ]
    for case, order in zip(cases, ("forward", "backward", "random"), strict=True):
        case.case = Case(**{**vars(cases[0].case), "order": order})
        case.grad_out = cases[0].grad_out
    first, *others = (outputs for _, outputs in run_cases(runner, cases, tmp_path))
    for outputs in others:
        for a, b in zip(first[:-1], outputs[:-1], strict=True):
            assert torch.equal(a, b)
