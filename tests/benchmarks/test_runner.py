"""A case runs: who is absent, unsupported, failed or wrong is shown so and never timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnres_ext.benchmarks import bandwidth, baselines, memory, model_stack, model_work, runner
from attnres_ext.benchmarks.baselines import BASELINES, Baseline
from attnres_ext.benchmarks.inputs import Inputs
from attnres_ext.benchmarks.model_registry import ModelCase
from attnres_ext.benchmarks.model_variants import VARIANTS, PlainResidual, Variant
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.timing import Action, Effort, HostTimer, Sampler

EFFORT = Effort(rounds=2, turn=1, shortest=1e-5, budget=0.1)
CASE = Case("depth_attention", sources=3, tokens=200, hidden=32, dtype="float32")
EAGER = BASELINES["eager"]
STACK = ModelCase(
    "train", 4, 32, 48, heads=2, head_dim=8, sublayers_per_block=3, tokens=20, batch=2
)
DECODE = replace(STACK, work="decode", tokens=1, context=20)


def noting(note: Callable[[Inputs], object], prepare: Callable = EAGER.prepare) -> Callable:
    """Somebody who tells of each call."""

    def prepared(case: Case):
        forward = prepare(case)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            note(inputs)
            return forward(inputs)

        return call

    return prepared


def run(monkeypatch: pytest.MonkeyPatch, case: Case = CASE, **members: Baseline) -> dict:
    for name, member in members.items():
        monkeypatch.setitem(BASELINES, name, member)
    options = runner.Options(EFFORT, names=tuple(members))
    return {row.contestant: row for row in runner.run_case(case, options)}


def wrong(case: Case):
    forward = EAGER.prepare(case)
    return lambda inputs: tuple(1.1 * output for output in forward(inputs))


def failing(case: Case):
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        raise NotImplementedError("no kernel for this")

    return call


def test_only_the_right_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    members = {
        "right": EAGER,
        "wrong": Baseline("", noting(lambda _: calls.append("wrong"), wrong)),
        "failing": Baseline("", noting(lambda _: calls.append("failing"), failing)),
        "absent": Baseline("", failing, unavailable=lambda device: "it is not installed"),
        "other": Baseline("", failing, unsupported=lambda case, device: "it does something else"),
    }
    rows = run(monkeypatch, **members)
    assert list(rows) == ["copy", *members]
    assert rows["right"].status == rows["copy"].status == "timed"
    assert rows["right"].seconds > 0
    assert rows["right"].bytes == rows["copy"].bytes == 4 * 200 * 32 * 4
    assert rows["right"].error <= 1
    assert [rows[name].status for name in members] == [
        "timed", "wrong", "failed", "absent", "unsupported",
    ]  # fmt: skip
    for name in ("wrong", "failing", "absent", "other"):
        assert rows[name].seconds is None
        assert rows[name].reason
    # The gate's one call each, and none for the clock.
    assert calls == ["wrong", "failing"]
    # Nobody left means no copy either.
    assert list(run(monkeypatch, wrong=members["wrong"])) == ["wrong"]


def test_who_cannot_be_loaded_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(HostTimer):
        """Has no memory for a second one."""

        def load(self, action: Action, shortest: float) -> Sampler:
            loaded.append(action)
            if len(loaded) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
            return super().load(action, shortest)

    loaded: list[Action] = []
    monkeypatch.setattr(runner.Options, "timer", lambda self, case=None: Small())
    rows = run(monkeypatch, right=EAGER, greedy=EAGER)
    assert rows["right"].status == rows["copy"].status == "timed"
    assert (rows["greedy"].status, rows["greedy"].reason) == (
        "failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 7 GiB",
    )  # fmt: skip


def test_weights_come_in_the_dtype_that_somebody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    prepare = noting(lambda inputs: seen.add((inputs.query.dtype, inputs.sources[0].dtype)))
    narrow = Baseline("", prepare, weight_dtype=torch.bfloat16)
    case = Case("depth_attention", 3, 150, 32, gradients="fresh")
    rows = run(monkeypatch, case, narrow=narrow, wide=EAGER)
    assert [row.status for row in rows.values()] == ["timed"] * 3
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_phase_one_counts_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("inter_block_attention", 3, 20, 16, "float32", queries=4, gradients="fresh")
    rows = run(monkeypatch, case, eager=EAGER)
    assert [row.operations for row in rows.values()] == [None, 6 * 2 * 3 * 4 * 20 * 16]
    assert run(monkeypatch, eager=EAGER)["eager"].operations is None


@pytest.mark.parametrize("gradients", ["none", "graph", "fresh", "accumulate"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_every_way_to_handle_gradients(
    monkeypatch: pytest.MonkeyPatch, gradients: str, cold: bool
) -> None:
    monkeypatch.setattr(runner, "_sets_past_cache", lambda num_bytes, device: 3)
    case = Case("accumulate_depth_attention", 2, 10, 16, "bfloat16", gradients=gradients, norm=True)
    rows = runner.run_case(case, runner.Options(EFFORT, names=("eager", "ours"), cold=cold))
    assert [row.status for row in rows] == ["timed"] * 3


def test_host_overhead_is_measured_on_one_thread(
    monkeypatch: pytest.MonkeyPatch, num_threads: None
) -> None:
    torch.set_num_threads(2)
    threads: list[int] = []
    it = Baseline("", noting(lambda _: threads.append(torch.get_num_threads())))
    case = Case("depth_attention", 2, 1, 8, "float32", origin="host")
    rows = run(monkeypatch, case, it=it)
    assert list(rows) == ["it"]
    assert rows["it"].bytes is None
    assert threads[-1] == 1
    assert torch.get_num_threads() == 2


def test_quick_cases_choose_their_baselines() -> None:
    assert runner.Options(quick=True).baselines(CASE) == CASE.baselines
    assert runner.Options().baselines(CASE) == baselines.USUAL
    assert runner.Options(quick=True, names=("ours",)).baselines(CASE) == ("ours",)


def test_inputs_past_the_cache_exceed_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.machine, "caches", lambda: {"L1d": 10, "L2": 100, "L3": 1000})
    monkeypatch.setattr(runner, "available_bytes", lambda device: None)
    assert [runner._sets_past_cache(size, "cpu") for size in (1, 300, 5000)] == [1024, 7, 2]
    monkeypatch.setattr(runner, "available_bytes", lambda device: 4000)
    assert runner._sets_past_cache(100, "cpu") == 10


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "LADDER", (1, 2))
    monkeypatch.setitem(bandwidth.MATRIX_SIZES, "cpu", 64)
    found = runner.ceilings(runner.Options())
    assert list(found["copy_gbps_by_mib"]) == [1, 2]
    assert min(*found["copy_gbps_by_mib"].values(), found["matrix_tflops"]["float32"]) > 0


def test_torch_compile_is_timed() -> None:
    reason = BASELINES["compile"].unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    case = Case("merge_partial", 2, 8, 16, "float32")
    rows = runner.run_case(case, runner.Options(EFFORT, names=("compile",)))
    assert [row.status for row in rows] == ["timed"] * 2, rows


def test_plain_pytorch_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    reason = EAGER.unsupported(Case("depth_attention", 9, 2048, 2304), "cpu")
    assert reason == "needs about 1 GiB, 0 GiB are free"


# Models


@pytest.mark.parametrize("work", ["train", "prefill", "decode", "reads"])
def test_every_variant_passes_the_gate_and_is_timed(work: str) -> None:
    case = replace(STACK if work in ("train", "prefill") else DECODE, work=work)
    rows = runner.run_case(case, runner.Options(turns=3))
    assert [(row.residual, row.contestant) for row in rows] == [
        (variant.residual, variant.baseline) for variant in VARIANTS
    ]
    for row in rows:
        assert (row.case, row.layers, row.scaling) == (case.name, 4, ())
        if row.contestant == "fla":
            assert row.status == "absent"
            continue
        assert row.status == "timed", row.reason
        assert row.error <= 1
        assert len(row.samples) == 3
        assert row.tokens_per_second == pytest.approx(case.batch * case.tokens / row.seconds)
        assert row.peak_bytes > 0
        if (row.residual, row.contestant) == ("standard", "standard"):
            assert row.overhead is None
        else:
            low, high = row.overhead_quartiles
            assert low <= row.overhead <= high


def test_variants_that_are_wrong_or_fail_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = next(one for one in VARIANTS if one.name == "block, eager").make.keywords["mix"]

    def off(sources: list[Tensor], *rest: object) -> Tensor:
        return 1.01 * eager(sources, *rest)

    def broken(sources: list[Tensor], *rest: object) -> Tensor:
        raise NotImplementedError("no kernel for this\nand a trace")

    here = [one for one in VARIANTS if one.residual != "full" and one.baseline != "fla"]
    more = (
        Variant("block", name, lambda residual, mix=mix: PlainResidual(residual, mix))
        for name, mix in (("off", off), ("broken", broken))
    )
    variants = (*here, *more)
    for module in (model_work, model_stack):
        monkeypatch.setattr(module, "VARIANTS", variants)
    monkeypatch.setattr(model_work, "make_stack", lambda c, d, some=None: real(c, d, variants))
    real = model_stack.make_stack
    rows = {row.contestant: row for row in runner.run_case(DECODE, runner.Options(turns=2))}
    assert rows["off"].status == "wrong"
    assert "hidden states is off by" in rows["off"].reason
    assert rows["broken"].status == "failed"
    assert rows["broken"].reason == "NotImplementedError: no kernel for this"
    assert rows["off"].seconds is rows["broken"].seconds is None
    assert rows["ours"].status == "timed"


def test_named_baselines_run_beside_the_yardstick_and_what_does_not_fit_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def explode(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")

    monkeypatch.setattr(model_work, "make_stack", explode)
    rows = runner.run_case(STACK, runner.Options(names=("ours", "fla")))
    assert [row.contestant for row in rows] == ["standard", "ours", "fla", "ours", "fla"]
    assert {row.status for row in rows} == {"failed", "absent"}
    assert rows[0].reason == "the case does not fit: CUDA out of memory. Tried to allocate 7 GiB"


def test_peak_memory_of_a_call() -> None:
    kept = torch.zeros(1000)

    def call() -> Tensor:
        first = torch.zeros(2000)
        second = first + 1
        del first
        return second[:1000] + kept

    # 8000 for each of the two, or 8000 and the 4000 of the result: the first is more. Operators
    # may hold a few scalars beside.
    assert 16000 <= memory.peak_bytes(call, "cpu") < 16200
