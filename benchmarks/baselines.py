"""Who runs an operator's cases: this library, PyTorch, other people's kernels, and yardsticks.

Nobody is timed before :mod:`attnres_ext.benchmarks.gate` has let them pass. What an interface lacks
is done around it in PyTorch where that is how its users do it.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_ext import ops, reference

from . import traffic
from .inputs import EPS, Inputs, arguments, as_tuple
from .memory import missing_memory
from .registry import Case

Forward = Callable[[Inputs], tuple[Tensor, ...]]


def _never(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Baseline:
    """Somebody who does an operator's work.

    Attributes:
        about: one line for people.
        prepare: the forward call of a case; compilation and other one-off work belongs here or in
            the first call.
        unavailable: why it cannot run in this process on "cpu" or "cuda", or None.
        unsupported: why it does not do a case there, or None.
        weight_dtype: where its interface takes weights in another dtype than float32.
        definition: of a yardstick, which does something else than the operator on purpose: what its
            results must be, in plain PyTorch.
    """

    about: str
    prepare: Callable[[Case], Forward]
    unavailable: Callable[[str], str | None] = _never
    unsupported: Callable[[Case, str], str | None] = _never
    weight_dtype: torch.dtype | None = None
    definition: Forward | None = None

    def bytes_moved(self, case: Case) -> int:
        """What it must move."""
        moved = traffic.bytes_moved if self.definition is None else traffic.standard_bytes_moved
        return moved(case)


class UnknownBaselineError(ValueError):
    """There is nobody of that name."""


def get(name: str) -> Baseline:
    """Who has that name.

    Raises:
        UnknownBaselineError: nobody.
    """
    if name not in BASELINES:
        raise UnknownBaselineError(f"baseline '{name}' is not one of {', '.join(NAMES)}")
    return BASELINES[name]


# This library, and its definition in plain PyTorch


def _call(function: Callable[..., Any], case: Case) -> Forward:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        return as_tuple(function(*args, **keywords))

    return call


class _Existing:
    """Hands a block's `.grad` to the kernel, as a gradient buffer that others have written to."""

    def __init__(self, source: Tensor):
        self._source = source

    def slot(self, like: Tensor, stream: object = None) -> tuple[Tensor, bool]:
        """The tensor to write into, and that it must be added to."""
        return self._source.grad, True


def _ours(case: Case) -> Forward:
    """The public function; where gradients accumulate, the kernel adds to them itself."""
    function = getattr(ops, case.operator)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        if case.gradients == "accumulate" and inputs.sources:
            buffers = [_Existing(source) for source in inputs.sources]
            return as_tuple(function(*args, **keywords, buffers=buffers))
        return as_tuple(function(*args, **keywords))

    return call


def _not_built(device: str) -> str | None:
    built = ops.depth_attention is not reference.depth_attention
    return None if built else "the compiled operators are not built"


def _eager(case: Case) -> Forward:
    return _call(getattr(reference, case.operator), case)


def _compiled(case: Case, mode: str | None = None) -> Forward:
    """For this case alone: earlier cases must not turn its shapes into dynamic ones."""
    torch._dynamo.reset()
    function = getattr(reference, case.operator)
    return _call(torch.compile(function, dynamic=False, fullgraph=True, mode=mode), case)


def _missing_compiler(device: str) -> str | None:
    if device.startswith("cuda"):
        return None if torch.utils._triton.has_triton() else "torch.compile needs Triton on CUDA"
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler and none is on the path"
    return None


# Other people's packages


def missing(name: str, module: str, device: str) -> str | None:
    """Why a package of CUDA kernels cannot run, or None.

    Args:
        name: of the package on PyPI.
        module: what to import from it.
        device: "cpu" or "cuda".
    """
    if not device.startswith("cuda"):
        return f"{name} has CUDA kernels alone"
    try:
        importlib.import_module(module)
    # Packages that were made for another Triton or torch raise anything.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{name} cannot be imported ({first}); `pip install attnres-ext[rivals]` gets it"
    return None


missing_fla = partial(missing, "flash-linear-attention", "fla.ops.attnres")


def _missing_gluon(device: str) -> str | None:
    if (reason := missing_fla(device)) is not None:
        return reason
    # Without it Triton would run instead.
    if hasattr(importlib.import_module("fla.ops.attnres.backends"), "AttnResGluonBackend"):
        return None
    return "this Triton has no Gluon that flash-linear-attention could use"


def _not_in_fla(case: Case, device: str, gluon: bool = False) -> str | None:
    """One query over a list of sources; block summation is a plain addition before it."""
    if case.operator not in ("depth_attention", "accumulate_depth_attention"):
        return "fused_attnres has one query and no merge"
    if gluon and case.hidden * 2 < 128:
        return "its Gluon backend leaves rows below 128 bytes to Triton"
    return None


def _fla(case: Case, level: int = 1, gluon: bool = False) -> Forward:
    """``fused_attnres``; at level 0 it keeps the mix for the backward, at 1 it makes it again."""
    from fla.ops.attnres import fused_attnres

    def mix(inputs: Inputs, sources: list[Tensor]) -> Tensor:
        with _fla_backend(gluon):
            return fused_attnres(
                inputs.query,
                sources,
                inputs.key_weight,
                output_rms_weight=inputs.out_weight,
                rms_eps=EPS,
                checkpoint_level=level,
            )

    def accumulate(inputs: Inputs) -> tuple[Tensor, ...]:
        partial_sum = reference.add_to_partial(inputs.partial, inputs.delta)
        return mix(inputs, [*inputs.sources, partial_sum]), partial_sum

    if case.operator == "depth_attention":
        return lambda inputs: (mix(inputs, inputs.sources),)
    return accumulate


@contextmanager
def _fla_backend(gluon: bool, switch: str = "FLA_ATTNRES_GLUON") -> Iterator[None]:
    """Sets what the package reads whenever it chooses a backend."""
    before = os.environ.get(switch)
    os.environ[switch] = str(int(gluon))
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _liger(case: Case) -> Forward:
    """Models hold their sources apart, so the stack that it wants is made in the call."""
    from liger_kernel.transformers.functional import liger_attn_res

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        stacked = torch.stack(inputs.sources).unsqueeze(1)  # [N, 1, M, D]
        return (liger_attn_res(stacked, inputs.query, inputs.key_weight, EPS).squeeze(0),)

    return call


def _not_in_liger(case: Case, device: str) -> str | None:
    if case.operator != "depth_attention" or case.norm:
        return "liger_attn_res has one query and no output norm"
    # Beyond as many sources its kernel leaves some out.
    return "liger_attn_res takes at most 32 sources" if case.sources > 32 else None


def _flash_attn_res(case: Case) -> Forward:
    """Phase 1 with one query is depth attention; it has no gain, so that goes into the query."""
    import flash_attn_res

    def phase_1(inputs: Inputs) -> tuple[Tensor, Tensor]:
        stacked = torch.stack(inputs.sources).unsqueeze(1)  # [N, 1, M, D]
        queries = (inputs.query * inputs.key_weight).view(-1, case.hidden)
        out, lse = flash_attn_res.phase_1_batched_attention_triton_op(stacked, queries, EPS)
        return out.squeeze(1), lse.squeeze(1)

    def merge_partial(inputs: Inputs) -> tuple[Tensor, ...]:
        partial_sum = reference.add_to_partial(inputs.partial, inputs.delta)
        merged = flash_attn_res.phase_2_online_softmax_merge_triton_op(
            partial_sum.unsqueeze(0),
            inputs.query * inputs.key_weight,
            inputs.out.unsqueeze(0),
            inputs.lse.unsqueeze(0),
            EPS,
        ).squeeze(0)
        gain = inputs.out_weight
        if gain is not None:
            merged = F.rms_norm(merged.float(), gain.shape, gain, EPS).to(merged.dtype)
        return merged, partial_sum

    return {
        "inter_block_attention": phase_1,
        "depth_attention": lambda inputs: (phase_1(inputs)[0].squeeze(0),),
        "merge_partial": merge_partial,
    }[case.operator]


def _not_in_flash_attn_res(case: Case, device: str) -> str | None:
    """Its kernels index rows by ``arange(D)``, and write bfloat16."""
    if case.operator == "accumulate_depth_attention":
        return "flash_attn_res has the two phases and no single pass with a sum"
    if case.operator == "depth_attention" and case.norm:
        # Its mix is rounded to bfloat16 before any norm can follow.
        return "flash_attn_res has no output norm"
    if case.dtype != "bfloat16":
        return "flash_attn_res takes bfloat16 alone"
    if case.hidden & (case.hidden - 1):
        return "flash_attn_res takes hidden sizes that are powers of two"
    return None


def _fast_attnres(case: Case) -> Forward:
    """It has no gain, so that goes into the query."""
    from attnres import attnres

    return lambda inputs: (attnres(inputs.sources, inputs.query * inputs.key_weight, eps=EPS),)


def _not_in_fast_attnres(case: Case, device: str) -> str | None:
    if case.operator == "inter_block_attention":
        return "fast-attnres does not return the logarithms that phase 2 needs"
    if case.operator != "depth_attention" or case.norm:
        return "fast-attnres has no sum, no merge and no output norm"
    if case.dtype != "bfloat16":
        return "fast-attnres takes bfloat16 alone"
    if case.sources > 129 or case.hidden > 8192:
        return "fast-attnres takes at most 129 sources of 8192 values"
    return None


# Yardsticks: what a model without Attention Residuals pays in the place of a site. It moves 4X
# where a site of ours moves (N + 4)X or 5X; the difference is the price of attending over depth.


def _standard(inputs: Inputs) -> tuple[Tensor, ...]:
    stream = inputs.partial + inputs.delta
    weight = inputs.out_weight.to(stream.dtype)
    return F.rms_norm(stream, weight.shape, weight, EPS), stream


def _standard_definition(inputs: Inputs) -> tuple[Tensor, ...]:
    """The sum, rounded to the stream's dtype, and its norm; the gain has the stream's dtype too."""
    stream = reference.add_to_partial(inputs.partial, inputs.delta)
    wide = stream.to(reference.compute_dtype([stream]))
    weight = inputs.out_weight.to(stream.dtype)
    return reference.rms_norm(wide, weight, EPS).to(stream.dtype), stream


def _standard_fused(functions: Any, inputs: Inputs, query: Tensor) -> tuple[Tensor, ...]:
    """Depth attention over a single source, which is no attention: the sum and its norm are left.

    What a model with ``mode="standard"`` runs.
    """
    return functions.accumulate_depth_attention(
        inputs.partial, inputs.delta, [], query, out_weight=inputs.out_weight, eps=EPS
    )


def _prepare_standard_fused(case: Case) -> Forward:
    zeros: dict[torch.device, Tensor] = {}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        device = inputs.query.device
        if device not in zeros:
            zeros[device] = torch.zeros_like(inputs.query, requires_grad=False)
        return _standard_fused(ops, inputs, zeros[device])

    return call


def _not_standard(case: Case, device: str) -> str | None:
    """Only sites that add a delta and normalise have a counterpart in a standard model."""
    if case.operator not in ("accumulate_depth_attention", "merge_partial") or not case.norm:
        return "a standard model has no such operation"
    if case.gradients == "accumulate":
        return "a standard model has no blocks to accumulate gradients into"
    return None


#: In the order of the table.
BASELINES = {
    "ours": Baseline("attnres_ext, compiled", _ours, _not_built),
    "eager": Baseline(
        "attnres_ext.reference, eager PyTorch", _eager, unsupported=missing_memory
    ),
    "compile": Baseline(
        "torch.compile of attnres_ext.reference, default mode, static shapes",
        _compiled, _missing_compiler, missing_memory,
    ),
    # Without Inductor's own CUDA graphs: the timer captures everybody in the same way, and a graph
    # inside a graph is not possible.
    "compile-max": Baseline(
        "torch.compile of attnres_ext.reference, mode max-autotune-no-cudagraphs, static shapes",
        partial(_compiled, mode="max-autotune-no-cudagraphs"), _missing_compiler, missing_memory,
    ),
    "fla": Baseline(
        "fla.ops.attnres.fused_attnres, Triton, checkpoint_level 1 (its default)",
        _fla, missing_fla, _not_in_fla,
    ),
    "fla-keep": Baseline(
        "fla.ops.attnres.fused_attnres, Triton, checkpoint_level 0",
        partial(_fla, level=0), missing_fla, _not_in_fla,
    ),
    "fla-gluon": Baseline(
        "fla.ops.attnres.fused_attnres, Gluon backend (FLA_ATTNRES_GLUON=1), checkpoint_level 1",
        partial(_fla, gluon=True), _missing_gluon, partial(_not_in_fla, gluon=True),
    ),
    "liger": Baseline(
        "liger_kernel.transformers.functional.liger_attn_res; stacking its sources is part of it",
        _liger, partial(missing, "liger-kernel", "liger_kernel.transformers.functional"),
        _not_in_liger,
    ),
    "flash-attn-res": Baseline(
        "flash_attn_res, phases 1 and 2 in Triton; PyTorch stacks, adds and normalises around it",
        _flash_attn_res, partial(missing, "flash-attn-res", "flash_attn_res"),
        _not_in_flash_attn_res,
    ),
    "fast-attnres": Baseline(
        "attnres.attnres of fast-attnres, with weights in bfloat16 as it wants them",
        _fast_attnres, partial(missing, "fast-attnres", "attnres"), _not_in_fast_attnres,
        weight_dtype=torch.bfloat16,
    ),
    "standard": Baseline(
        "yardstick: x + f(x), then RMSNorm, in eager PyTorch (no depth attention)",
        lambda case: _standard, unsupported=_not_standard, definition=_standard_definition,
    ),
    "standard-fused": Baseline(
        "yardstick: x + f(x) and RMSNorm in one kernel, this library's (no depth attention)",
        _prepare_standard_fused, _not_built, _not_standard,
        definition=lambda inputs: _standard_fused(
            reference, inputs, torch.zeros_like(inputs.query, requires_grad=False)
        ),
    ),
}  # fmt: skip
NAMES = tuple(BASELINES)
#: Tuning every kernel by trial takes longer than all else together: only when asked for.
USUAL = tuple(name for name in NAMES if name != "compile-max")
