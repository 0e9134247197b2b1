"""Runs stacks of layers: gate first, then the timing of those who passed, then their memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from .cuda_timing import CudaTimer
from .gate import first_line
from .memory import peak_bytes
from .model_arms import ARMS, YARDSTICK, Arm
from .model_gate import ModelGate
from .model_registry import ModelCase
from .model_stack import action, make_stack
from .results import ModelResult
from .timing import HostTimer, Timer, Timing, measure_in_step

#: Seconds for the turns of a case, all arms together.
_SECONDS = 20.0
#: Seconds that a case takes, about: layers, checks and memory beside the turns.
ROUGH_SECONDS = _SECONDS + 8


def run_case(
    case: ModelCase,
    device: str,
    names: tuple[str, ...] | None = None,
    report: Callable[[str], None] = lambda _: None,
    turns: int | None = None,
) -> list[ModelResult]:
    """Runs one stack with every arm.

    Args:
        case: what to run.
        device: "cpu" or a CUDA device.
        names: contestants; None is all. The yardstick runs in any case.
        report: told what is going on, for a progress display.
        turns: of each arm; None is as many as there is time for.
    """
    arms = [arm for arm in ARMS if arm is YARDSTICK or names is None or arm.contestant in names]
    results: dict[Arm, ModelResult] = {}
    errors: dict[Arm, float | None] = {}

    def refuse(arm: Arm, status: str, reason: str) -> None:
        results[arm] = _result(case, arm, status, reason=reason)

    for arm in arms:
        reason = arm.unavailable(device)
        if reason is not None:
            refuse(arm, "absent", reason)
    report("layers")
    try:
        stack = make_stack(case, device, tuple(arm for arm in arms if arm not in results))
        gate = ModelGate(make_stack(case, device))
    except torch.OutOfMemoryError as error:
        reason = f"the layers do not fit: {first_line(error)}"
        return [results.get(arm) or _result(case, arm, "failed", reason=reason) for arm in arms]
    for arm in arms:
        if arm in results:
            continue
        report(f"checking {arm.name}")
        verdict = gate.check(arm)
        if verdict.passed:
            errors[arm] = verdict.worst
        else:
            refuse(arm, "failed" if verdict.failed else "wrong", verdict.reason)
    # Twice the layers, once in float64, would take the memory that the arms need.
    del gate
    _collect(device)

    optimizer = None
    if case.work == "train":
        # Its own passes over the parameters are fused: what remains of a step is the model's.
        optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-6, fused=True)
    actions = {arm.name: action(stack, arm, optimizer) for arm in errors}
    by_name = {arm.name: arm for arm in errors}
    report("timing")
    timings = measure_in_step(
        actions,
        _SECONDS,
        _timer(case, device),
        lambda name, error: refuse(
            by_name[name], "failed", f"{type(error).__name__}: {first_line(error)}"
        ),
        turns,
    )
    yardstick = timings.get(YARDSTICK.name)
    for name, timing in timings.items():
        report(f"memory of {name}")
        arm = by_name[name]
        results[arm] = _result(
            case,
            arm,
            "timed",
            error=errors[arm],
            peak_bytes=_peak(actions[name], device),
            **_figures(case, timing, None if arm is YARDSTICK else yardstick),
        )
    _collect(device)
    return [results[arm] for arm in arms]


def _timer(case: ModelCase, device: str) -> Timer:
    if not device.startswith("cuda"):
        return HostTimer()
    # A server replays a decoding step as a graph; longer work is launched as it comes.
    return CudaTimer(graphs=case.work in ("decode", "reads"))


def _peak(action: Any, device: str) -> int:
    with action.context():
        if action.before is not None:
            action.before(0)
        return peak_bytes(lambda: action.run(0), device)


def _collect(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _figures(case: ModelCase, timing: Timing, yardstick: Timing | None) -> dict[str, Any]:
    found = timing.figures()
    found["tokens_per_second"] = case.batch * case.tokens / timing.median
    if yardstick is not None:
        over = [a / b - 1 for a, b in zip(timing.samples, yardstick.samples, strict=True)]
        low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
        found |= {"overhead": middle, "overhead_quartiles": (low, high)}
    return found


def _result(case: ModelCase, arm: Arm, status: str, **measured: Any) -> ModelResult:
    return ModelResult(
        case=case.name,
        work=case.work,
        residual=arm.residual,
        contestant=arm.contestant,
        shape=case.shape,
        layers=case.layers,
        hidden=case.hidden,
        sublayers_per_block=case.sublayers_per_block,
        blocks=case.num_blocks,
        batch=case.batch,
        tokens=case.tokens,
        context=case.context,
        dtype=case.dtype,
        scaling=case.scaling,
        origin=case.origin,
        status=status,
        **measured,
    )
