"""flash-attn-res: the two phases in Triton, on stacked bfloat16 sources."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_ext import reference

from ..inputs import EPS, Inputs
from ..registry import Case
from . import packages

ABOUT = "flash_attn_res, phases 1 and 2 in Triton; PyTorch stacks, adds and normalises around it"


def unavailable(device: str) -> str | None:
    """It needs the package and a GPU."""
    return packages.missing("flash-attn-res", "flash_attn_res", device)


def unsupported(case: Case, device: str) -> str | None:
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


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Phase 1 with one query is depth attention; it has no gain, so that goes into the query."""
    import flash_attn_res

    def phase_1(inputs: Inputs) -> tuple[Tensor, Tensor]:
        stacked = torch.stack(inputs.sources).unsqueeze(1)  # [N, 1, M, D]
        queries = (inputs.query * inputs.key_weight).view(-1, case.hidden)
        out, lse = flash_attn_res.phase_1_batched_attention_triton_op(stacked, queries, EPS)
        return out.squeeze(1), lse.squeeze(1)

    def depth_attention(inputs: Inputs) -> tuple[Tensor, ...]:
        return (phase_1(inputs)[0].squeeze(0),)

    def merge_partial(inputs: Inputs) -> tuple[Tensor, ...]:
        partial = reference.add_to_partial(inputs.partial, inputs.delta)
        merged = flash_attn_res.phase_2_online_softmax_merge_triton_op(
            partial.unsqueeze(0),
            inputs.query * inputs.key_weight,
            inputs.out.unsqueeze(0),
            inputs.lse.unsqueeze(0),
            EPS,
        )
        return _norm(merged.squeeze(0), inputs), partial

    calls = {
        "inter_block_attention": phase_1,
        "depth_attention": depth_attention,
        "merge_partial": merge_partial,
    }
    return calls[case.operator]


def _norm(mix: Tensor, inputs: Inputs) -> Tensor:
    if inputs.out_weight is None:
        return mix
    return F.rms_norm(mix.float(), inputs.out_weight.shape, inputs.out_weight, EPS).to(mix.dtype)
