"""The correctness gate: whoever is wrong is not timed.

A baseline runs the whole case, and its results and gradients are compared with the definition in
float64. The largest error may be twice that of plain PyTorch in the case's own dtype, plus one
rounding of the result and the reordering of the sums behind it.

The definition in float64 would take longer than everything else together, so it is evaluated on a
sample of rows. That is enough: a row of a result depends on no other row, and gradients of the
weights, which sum over all rows, see the sample alone once every other row's incoming gradient is
zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnres_ext import reference

from .inputs import (
    WEIGHTS,
    Inputs,
    arguments,
    as_tuple,
    map_leaves,
    take_rows,
)
from .registry import Case

Forward = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        passed: whether the baseline may be timed.
        reason: what was wrong, in a sentence; empty when it passed.
        worst: largest error as a share of what is allowed.
        failed: whether it raised an error instead of giving a result.
    """

    passed: bool
    reason: str = ""
    worst: float | None = None
    failed: bool = False


class Gate:
    """The expected results of one case, against which its baselines are held."""

    def __init__(self, case: Case, inputs: Inputs, definition: Forward | None = None):
        """Computes what is right, and how far plain PyTorch is from it.

        Args:
            case: the case.
            inputs: the inputs that baselines will be given.
            definition: what to hold them to, in plain PyTorch; the case's operator by default.
        """
        self.case = case
        self._rows = sample_rows(case.tokens).to(inputs.query.device)
        sampled = take_rows(inputs, self._rows)
        self._inputs = replace(inputs, upstream=_only_rows(case, inputs.upstream, self._rows))
        definition = definition or _operator(case)
        wide = map_leaves(sampled, lambda _, tensor: tensor.double())
        self._exact = results(definition, case, wide)
        self._plain_error = {
            name: _distance(plain, self._exact[name])
            for name, plain in results(definition, case, sampled).items()
        }

    def check(self, forward: Forward) -> Verdict:
        """Runs a baseline once and judges it."""
        try:
            actual = results(forward, self.case, self._inputs)
        except Exception as error:  # whatever a baseline throws, the others go on
            return Verdict(False, f"{type(error).__name__}: {first_line(error)}", failed=True)
        worst = 0.0
        for name, exact in self._exact.items():
            tensor = actual.get(name)
            if tensor is None:
                return Verdict(False, f"{name} is missing")
            if name.removeprefix("gradient of ") not in WEIGHTS:
                complaint = self._complaint_about_other_rows(name, tensor)
                if complaint is not None:
                    return Verdict(False, complaint)
                tensor = tensor.index_select(self._token_dim(name), self._rows)
            if tensor.shape != exact.shape:
                shapes = f"{tuple(tensor.shape)}, expected {tuple(exact.shape)}"
                return Verdict(False, f"{name} has shape {shapes}")
            error, allowed = _distance(tensor, exact), self._allowed(name, tensor, exact)
            # Written so that a NaN is refused.
            if not error <= allowed:
                return Verdict(False, f"{name} is off by {error:.2e}, allowed are {allowed:.2e}")
            worst = max(worst, error / allowed if allowed else 0.0)
        return Verdict(True, worst=worst)

    def _complaint_about_other_rows(self, name: str, actual: Tensor) -> str | None:
        dim = self._token_dim(name)
        if actual.dim() <= dim or actual.shape[dim] != self.case.tokens:
            return f"{name} has shape {tuple(actual.shape)}, expected {self.case.tokens} tokens"
        if name.startswith("output"):
            return None if bool(actual.isfinite().all()) else f"{name} is not finite"
        before = self._inputs.leaves()[name.removeprefix("gradient of ")].grad
        changed = actual != (0 if before is None else before)
        if changed.index_fill_(dim, self._rows, False).any():
            return f"{name} changed in rows whose incoming gradient is zero"
        return None

    def _token_dim(self, name: str) -> int:
        by_query = name.startswith("output") and self.case.operator == "inter_block_attention"
        return 1 if by_query else 0

    def _allowed(self, name: str, actual: Tensor, exact: Tensor) -> float:
        size = exact.abs().max().item() if exact.numel() else 0.0
        # A sum of n terms in another order walks away by about sqrt(n) roundings.
        terms = len(self._rows) if name.removeprefix("gradient of ") in WEIGHTS else 1
        sums = torch.finfo(torch.float32).eps * (1 + math.sqrt(terms))
        return 2 * self._plain_error[name] + (torch.finfo(actual.dtype).eps + sums) * size


def first_line(error: Exception) -> str:
    """What an error says, without the trace that some add to it."""
    return (str(error).strip().splitlines() or [""])[0]


def sample_rows(tokens: int, ends: int = 32, between: int = 64) -> Tensor:
    """Sorted row numbers: the first and last ``ends`` rows and ``between`` others at random."""
    if tokens <= 2 * ends + between:
        return torch.arange(tokens)
    generator = torch.Generator().manual_seed(tokens)
    middle = torch.randperm(tokens - 2 * ends, generator=generator)[:between] + ends
    edges = [torch.arange(ends), torch.arange(tokens - ends, tokens)]
    return torch.cat([*edges, middle]).sort().values


def _only_rows(case: Case, upstream: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    dim = 1 if case.operator == "inter_block_attention" else 0
    return tuple(
        torch.zeros_like(gradient).index_copy_(dim, rows, gradient.index_select(dim, rows))
        for gradient in upstream
    )


def results(forward: Forward, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Results and, where the case has a backward, gradients of one call, by name.

    Where gradients accumulate, they are what each `.grad` holds afterwards; the inputs get their
    old ones back.
    """
    leaves = inputs.leaves()
    before = [leaf.grad for leaf in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None if leaf.grad is None else leaf.grad.clone()
    try:
        with torch.set_grad_enabled(case.gradients != "none"):
            outputs = forward(inputs)
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if case.gradients == "accumulate":
            torch.autograd.backward(outputs, inputs.upstream)
            gradients = [leaf.grad for leaf in leaves.values()]
        elif case.gradients == "fresh":
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), inputs.upstream, allow_unused=True
            )
    finally:
        for leaf, grad in zip(leaves.values(), before, strict=True):
            leaf.grad = grad
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            named[f"gradient of {name}"] = gradient
    return named


def _operator(case: Case) -> Forward:
    function = getattr(reference, case.operator)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        return as_tuple(function(*args, **keywords))

    return call


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs_().max().item() if a.numel() else 0.0
