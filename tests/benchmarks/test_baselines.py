"""Other people's kernels, played by the definition behind the signatures that they have.

What is proven is how they are called: which arguments, which shapes, what is done around them. The
packages themselves need a GPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import reference
from attnres_ext.benchmarks import baselines
from attnres_ext.benchmarks.gate import Gate
from attnres_ext.benchmarks.inputs import make_inputs, with_weights
from attnres_ext.benchmarks.model_gate import ModelGate
from attnres_ext.benchmarks.model_registry import ModelCase
from attnres_ext.benchmarks.model_stack import make_stack
from attnres_ext.benchmarks.model_variants import VARIANTS
from attnres_ext.benchmarks.registry import CASES, Case

CALLS: list[dict[str, Any]] = []


def fused_attnres(
    query: Tensor,
    residuals: list[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> Tensor:
    """flash-linear-attention 0.6.0."""
    CALLS.append({"level": checkpoint_level, "gluon": os.environ.get("FLA_ATTNRES_GLUON")})
    return reference.depth_attention(
        list(residuals), query, rms_weight, out_weight=output_rms_weight, eps=rms_eps, scale=scale
    )


def liger_attn_res(
    V: Tensor,  # noqa: N803
    w_query: Tensor,
    w_norm: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """liger-kernel 0.8.5."""
    assert V.dim() == 4
    return reference.depth_attention(list(V.unbind(0)), w_query, w_norm, eps=eps)


def phase_1(
    block_representations: Tensor, pseudo_queries: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """flash-attn-res 0.1.12."""
    assert block_representations.dim() == 4
    return reference.inter_block_attention(
        list(block_representations.unbind(0)), pseudo_queries, eps=eps
    )


def phase_2(
    intrablock_partial_sum: Tensor,
    pseudo_query: Tensor,
    interblock_normalized_output: Tensor,
    interblock_lse: Tensor,
    eps: float,
) -> Tensor:
    """flash-attn-res 0.1.12."""
    assert intrablock_partial_sum.dim() == 3
    return reference.merge_partial(
        interblock_normalized_output,
        interblock_lse,
        intrablock_partial_sum,
        None,
        pseudo_query,
        eps=eps,
    )[0]


def attnres(
    values: list[Tensor], query: Tensor, *, eps: float = 2**-23, scale: float = 1.0
) -> Tensor:
    """fast-attnres 2.1.0."""
    assert query.dtype == torch.bfloat16
    return reference.depth_attention(list(values), query, eps=eps, scale=scale)


MODULES: dict[str, dict[str, Any]] = {
    "fla": {},
    "fla.ops": {},
    "fla.ops.attnres": {"fused_attnres": fused_attnres},
    "fla.ops.attnres.backends": {"AttnResGluonBackend": object},
    "liger_kernel": {},
    "liger_kernel.transformers": {},
    "liger_kernel.transformers.functional": {"liger_attn_res": liger_attn_res},
    "flash_attn_res": {
        "phase_1_batched_attention_triton_op": phase_1,
        "phase_2_online_softmax_merge_triton_op": phase_2,
    },
    "attnres": {"attnres": attnres},
}


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name, members in MODULES.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


#: What each does, with and without gradients, at a size that all of them take.
SHAPE = {"sources": 4, "tokens": 60, "hidden": 64}
WORK = {
    "depth_attention": Case("depth_attention", **SHAPE),
    "depth_attention, norm": Case("depth_attention", norm=True, **SHAPE),
    "accumulate_depth_attention": Case("accumulate_depth_attention", norm=True, **SHAPE),
    "inter_block_attention": Case("inter_block_attention", queries=3, **SHAPE),
    "merge_partial": Case("merge_partial", norm=True, **SHAPE),
}
DOES = {
    "fla": ["depth_attention", "depth_attention, norm", "accumulate_depth_attention"],
    "fla-keep": ["depth_attention", "depth_attention, norm", "accumulate_depth_attention"],
    "fla-gluon": ["depth_attention", "depth_attention, norm", "accumulate_depth_attention"],
    "liger": ["depth_attention"],
    "flash-attn-res": ["depth_attention", "inter_block_attention", "merge_partial"],
    "fast-attnres": ["depth_attention"],
}  # fmt: skip


@pytest.mark.parametrize("gradients", ["none", "fresh", "accumulate"])
@pytest.mark.parametrize(("name", "work"), [(n, w) for n, works in DOES.items() for w in works])
def test_passes_the_gate(name: str, work: str, gradients: str) -> None:
    case = replace(WORK[work], gradients=gradients)
    baseline = baselines.get(name)
    assert baseline.unavailable("cuda") is None
    assert baseline.unsupported(case, "cuda") is None
    inputs = with_weights(make_inputs(case), baseline.weight_dtype)
    verdict = Gate(case, inputs).check(baseline.prepare(case))
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("name", DOES)
def test_leaves_out_the_rest(name: str) -> None:
    for work, case in WORK.items():
        assert (baselines.get(name).unsupported(case, "cuda") is None) == (work in DOES[name])


def test_limits() -> None:
    def reason(name: str, **changes: object) -> str | None:
        case = replace(WORK["depth_attention"], **changes)
        return baselines.get(name).unsupported(case, "cuda")

    assert "at most 32" in reason("liger", sources=33)
    assert "powers of two" in reason("flash-attn-res", hidden=2304)
    assert "bfloat16" in reason("flash-attn-res", dtype="float16")
    assert "bfloat16" in reason("fast-attnres", dtype="float32")
    assert "at most 129" in reason("fast-attnres", sources=130)
    assert "128 bytes" in reason("fla-gluon", hidden=32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fla", {"level": 1, "gluon": "0"}),
        ("fla-keep", {"level": 0, "gluon": "0"}),
        ("fla-gluon", {"level": 1, "gluon": "1"}),
    ],
)
def test_fla_runs_at_its_level_and_with_its_backend(
    name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = WORK["depth_attention"]
    baselines.get(name).prepare(case)(make_inputs(case))
    assert [expected] == CALLS
    assert "FLA_ATTNRES_GLUON" not in os.environ
    # What the user has set stays set.
    monkeypatch.setenv("FLA_ATTNRES_GLUON", "7")
    baselines.get(name).prepare(case)(make_inputs(case))
    assert CALLS[-1] == expected
    assert os.environ["FLA_ATTNRES_GLUON"] == "7"


@pytest.mark.parametrize("name", DOES)
def test_without_a_gpu_or_the_package_it_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "CUDA kernels alone" in baselines.get(name).unavailable("cpu")
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install attnres-ext[rivals]" in baselines.get(name).unavailable("cuda")


def test_a_triton_without_gluon() -> None:
    del sys.modules["fla.ops.attnres.backends"].AttnResGluonBackend
    assert "no Gluon" in baselines.get("fla-gluon").unavailable("cuda")
    assert baselines.get("fla").unavailable("cuda") is None


@pytest.mark.parametrize("work", ["train", "decode"])
@pytest.mark.parametrize("residual", ["block", "full"])
def test_models_connected_by_fla(work: str, residual: str) -> None:
    case = ModelCase(work, 4, 32, 48, 2, 8, sublayers_per_block=3, tokens=9, context=5)
    variant = next(v for v in VARIANTS if (v.residual, v.baseline) == (residual, "fla"))
    assert variant.unavailable("cuda") is None
    verdict = ModelGate(make_stack(case, "cpu")).check(variant)
    assert verdict.passed, verdict.reason
    assert CALLS


def test_every_case_for_a_gpu_meets_somebody() -> None:
    """Each operator but the sum of phase 2 has at least one baseline in some case."""
    met = {
        case.operator
        for case in CASES
        if case.cuda
        for name in DOES
        if baselines.get(name).unsupported(case, "cuda") is None
    }
    assert met >= {"depth_attention", "accumulate_depth_attention"}
