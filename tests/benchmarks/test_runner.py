"""A case runs: who is absent, unsupported, failed or wrong is shown so and never timed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnres_ext.benchmarks import bandwidth, contestants, runner, traffic
from attnres_ext.benchmarks.contestants import eager
from attnres_ext.benchmarks.inputs import Inputs
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.timing import Action, Effort, HostTimer, Sampler

EFFORT = Effort(rounds=2, turn=1, shortest=1e-5, budget=0.1)
CASE = Case("depth_attention", sources=3, tokens=200, hidden=32, dtype="float32")


def contestant(**changes: object) -> SimpleNamespace:
    """Eager PyTorch, with changes."""
    parts = {
        "ABOUT": "a test's",
        "unavailable": lambda device: None,
        "unsupported": lambda case, device: None,
        "prepare": eager.prepare,
    }
    return SimpleNamespace(**{**parts, **changes})


class Crowd:
    """Contestants of a test, and how often each was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **members: SimpleNamespace) -> None:
        self.calls = dict.fromkeys(members, 0)
        for name, member in members.items():
            self._count(name, member)
        monkeypatch.setattr(contestants, "get", members.__getitem__)

    def _count(self, name: str, member: SimpleNamespace) -> None:
        prepare = member.prepare

        def counting(case: Case):
            forward = prepare(case)

            def call(inputs: Inputs) -> tuple[Tensor, ...]:
                self.calls[name] += 1
                return forward(inputs)

            return call

        member.prepare = counting


def wrong(case: Case):
    forward = eager.prepare(case)
    return lambda inputs: tuple(1.1 * output for output in forward(inputs))


def failing(case: Case):
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        raise NotImplementedError("no kernel for this")

    return call


def test_only_the_right_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(
        monkeypatch,
        right=contestant(),
        wrong=contestant(prepare=wrong),
        failing=contestant(prepare=failing),
        absent=contestant(unavailable=lambda device: "it is not installed"),
        other=contestant(unsupported=lambda case, device: "it does something else"),
    )
    options = runner.Options(EFFORT, names=tuple(crowd.calls))
    rows = {row.contestant: row for row in runner.run_case(CASE, options)}

    assert list(rows) == ["copy", "right", "wrong", "failing", "absent", "other"]
    assert rows["right"].status == rows["copy"].status == "timed"
    assert rows["right"].seconds > 0
    assert rows["right"].bytes == rows["copy"].bytes == 4 * 200 * 32 * 4
    assert rows["right"].error <= 1
    assert {n: rows[n].status for n in ("wrong", "failing", "absent", "other")} == {
        "wrong": "wrong",
        "failing": "failed",
        "absent": "absent",
        "other": "unsupported",
    }
    for name in ("wrong", "failing", "absent", "other"):
        assert rows[name].seconds is None
        assert rows[name].reason
    # The gate's one call, and none for the clock.
    assert crowd.calls["wrong"] == crowd.calls["failing"] == 1
    assert crowd.calls["absent"] == crowd.calls["other"] == 0


def test_a_contestant_that_cannot_be_loaded_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Crowd(monkeypatch, right=contestant(), greedy=contestant())

    class Small(HostTimer):
        """Has no memory for a second contestant."""

        def load(self, action: Action, shortest: float) -> Sampler:
            loaded.append(action)
            if len(loaded) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
            return super().load(action, shortest)

    loaded: list[Action] = []
    monkeypatch.setattr(runner.Options, "timer", lambda self, case=None: Small())
    options = runner.Options(EFFORT, names=("right", "greedy"))
    rows = {row.contestant: row for row in runner.run_case(CASE, options)}
    assert rows["right"].status == rows["copy"].status == "timed"
    assert rows["greedy"].status == "failed"
    assert rows["greedy"].reason == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 7 GiB"
    )


def test_weights_come_in_the_dtype_that_a_contestant_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def noting(case: Case):
        forward = eager.prepare(case)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            seen.append((inputs.query.dtype, inputs.sources[0].dtype))
            return forward(inputs)

        return call

    Crowd(
        monkeypatch,
        narrow=contestant(prepare=noting, WEIGHT_DTYPE=torch.bfloat16),
        wide=contestant(),
    )
    case = Case("depth_attention", 3, 150, 32, gradients="fresh")
    rows = runner.run_case(case, runner.Options(EFFORT, names=("narrow", "wide")))
    assert [row.status for row in rows] == ["timed"] * 3
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_phase_one_counts_its_products() -> None:
    case = Case("inter_block_attention", 3, 20, 16, "float32", queries=4)
    rows = runner.run_case(case, runner.Options(EFFORT, names=("eager",)))
    product = 2 * 3 * 4 * 20 * 16
    assert [(row.contestant, row.operations) for row in rows] == [
        ("copy", None),
        ("eager", 2 * product),
    ]
    fresh = replace(case, gradients="fresh")
    assert traffic.operations(fresh) == 6 * product
    assert traffic.operations(CASE) is None


def test_packages_for_gpus_say_why_they_are_absent() -> None:
    for name in ("fla", "fla-keep", "fla-gluon", "liger", "flash-attn-res", "fast-attnres"):
        assert "CUDA kernels alone" in contestants.get(name).unavailable("cpu")
        # Not installed where tests run without a GPU; where it is, it says nothing.
        reason = contestants.get(name).unavailable("cuda")
        assert reason is None or "pip install attnres-ext[rivals]" in reason or "Triton" in reason


def test_nobody_left_means_no_copy_either(monkeypatch: pytest.MonkeyPatch) -> None:
    Crowd(monkeypatch, wrong=contestant(prepare=wrong))
    rows = runner.run_case(CASE, runner.Options(EFFORT, names=("wrong",)))
    assert [row.contestant for row in rows] == ["wrong"]


@pytest.mark.parametrize("gradients", ["none", "graph", "fresh", "accumulate"])
@pytest.mark.parametrize("operator", ["depth_attention", "accumulate_depth_attention"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_every_way_to_handle_gradients(
    monkeypatch: pytest.MonkeyPatch, operator: str, gradients: str, cold: bool
) -> None:
    monkeypatch.setattr(runner, "_sets_past_cache", lambda num_bytes, device: 3)
    case = Case(operator, 2, 10, 16, "bfloat16", gradients=gradients, norm=True)
    rows = runner.run_case(case, runner.Options(EFFORT, names=("eager",), cold=cold))
    assert [(row.contestant, row.status) for row in rows] == [("copy", "timed"), ("eager", "timed")]


def test_host_overhead_is_measured_on_one_thread(
    monkeypatch: pytest.MonkeyPatch, num_threads: None
) -> None:
    torch.set_num_threads(2)
    threads: list[int] = []

    def noting(case: Case):
        forward = eager.prepare(case)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            threads.append(torch.get_num_threads())
            return forward(inputs)

        return call

    Crowd(monkeypatch, it=contestant(prepare=noting))
    case = Case("depth_attention", 2, 1, 8, "float32", origin="host")
    (row,) = runner.run_case(case, runner.Options(EFFORT, names=("it",)))
    assert row.bytes is None
    assert threads[-1] == 1
    assert torch.get_num_threads() == 2


def test_quick_cases_choose_their_rivals() -> None:
    quick = runner.Options(quick=True)
    assert quick.contestants(CASE) == CASE.rivals
    assert runner.Options().contestants(CASE) == contestants.USUAL
    assert runner.Options(quick=True, names=("ours",)).contestants(CASE) == ("ours",)


def test_inputs_past_the_cache_exceed_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.machine, "caches", lambda: {"L1d": 10, "L2": 100, "L3": 1000})
    monkeypatch.setattr(runner, "available_bytes", lambda device: None)
    assert runner._sets_past_cache(1, "cpu") == 1024
    assert runner._sets_past_cache(300, "cpu") == 7
    assert runner._sets_past_cache(5000, "cpu") == 2
    monkeypatch.setattr(runner, "available_bytes", lambda device: 4000)
    assert runner._sets_past_cache(100, "cpu") == 10


def test_copy_moves_what_it_says() -> None:
    action = bandwidth.copy_action(4096, sets=2)
    action.run(0)
    action.run(1)
    rates = bandwidth.ladder(Effort(rounds=2, turn=1, budget=0.01))
    assert list(rates) == list(bandwidth.LADDER)
    assert all(rate > 0 for rate, _ in rates.values())


def test_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandwidth.MATRIX_SIZES, "cpu", 64)
    assert bandwidth.matrix_rates(Effort(rounds=2, turn=1, budget=0.01))["float32"] > 0


def test_torch_compile_is_a_contestant() -> None:
    compiled = contestants.get("compile")
    reason = compiled.unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    case = Case("merge_partial", 2, 8, 16, "float32")
    rows = runner.run_case(case, runner.Options(EFFORT, names=("compile",)))
    assert [(row.contestant, row.status) for row in rows] == [
        ("copy", "timed"),
        ("compile", "timed"),
    ], rows


def test_plain_pytorch_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnres_ext.benchmarks.memory.available_bytes", lambda device: 2**20)
    reason = eager.unsupported(Case("depth_attention", 9, 2048, 2304), "cpu")
    assert reason == "needs about 1 GiB, 0 GiB are free"
