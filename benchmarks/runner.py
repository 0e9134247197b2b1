"""Runs cases: gate first, then the timing of those who passed."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import bandwidth, contestants, machine, traffic
from .cuda_timing import CudaTimer
from .gate import Gate, first_line
from .inputs import Inputs, copy_inputs, make_inputs, with_weights
from .memory import available_bytes
from .registry import Case
from .results import Result
from .timing import Action, Effort, HostTimer, Timer, Timing, measure

Forward = Callable[[Inputs], tuple[Tensor, ...]]
Report = Callable[[str], None]

#: Copies of inputs of a few kilobytes would take longer to make than to time.
_MOST_SETS = 1024

#: For what the machine reaches at best: copies and matrix products.
_CEILINGS = Effort(rounds=3, turn=3, budget=0.3)

#: Whoever takes twenty times as long as we do needs no more samples than fit into the budget.
_THOROUGH = Effort(rounds=9, turn=3, budget=4.0)
#: Effort by suite on the CPU. `quick` is part of the demo and has a minute in all.
_ON_CPU = {"quick": Effort(rounds=5, turn=3, budget=1.0)}
#: On a GPU. Events have a resolution of half a microsecond, so a sample lasts a thousand of them.
_ON_GPU = Effort(rounds=9, turn=3, shortest=5e-4, budget=1.0)


def effort_for(suite: str, device: str) -> Effort:
    """How long to measure in a suite on a device."""
    return _ON_GPU if device.startswith("cuda") else _ON_CPU.get(suite, _THOROUGH)


#: Seconds, about: compiling for a case, and an element in plain PyTorch on two cores, which is what
#: most of a case's time goes to.
_ROUGH_COMPILING, _ROUGH_ELEMENT = 3.0, 5e-9


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        effort: how long to measure.
        names: contestants; None takes each case's `rivals` ("quick") or the usual ones.
        quick: whether cases choose their rivals themselves.
        cold: whether inputs are rotated past the last-level cache.
        device: "cpu" or a CUDA device.
    """

    effort: Effort = _THOROUGH
    names: tuple[str, ...] | None = None
    quick: bool = False
    cold: bool = False
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def timer(self, case: Case | None = None) -> Timer:
        """How to time: what the host costs with its clock, everything else as the device can."""
        if not self.on_gpu:
            return HostTimer()
        if case is not None and case.is_host:
            return HostTimer(torch.cuda.synchronize)
        return CudaTimer()

    def contestants(self, case: Case) -> tuple[str, ...]:
        """Who runs in ``case``."""
        if self.names is not None:
            return self.names
        return case.rivals if self.quick else contestants.USUAL


def rough_seconds(case: Case, options: Options) -> float:
    """How long a case may take where nobody has run it yet."""
    budget = options.effort.budget
    if options.on_gpu:
        return _ROUGH_COMPILING + budget
    elements = case.sources * case.queries * case.tokens * case.hidden
    plain = _ROUGH_ELEMENT * elements * (4 if case.has_backward else 1)
    # It runs four times before it is timed, and others, who are faster, get as much time together.
    return _ROUGH_COMPILING + 4 * plain + 2 * min(budget, 10 * plain)


def run_case(case: Case, options: Options, report: Report = lambda _: None) -> list[Result]:
    """Runs one case: a result for the copy and one for every contestant.

    Args:
        case: what to run.
        options: how to run it.
        report: told what is going on, for a progress display.
    """
    report("inputs")
    inputs = make_inputs(case, device=options.device)
    gates: dict[object, Gate] = {}
    refused: dict[str, Result] = {}
    admitted: dict[str, Forward] = {}
    errors: dict[str, float] = {}
    names = options.contestants(case)
    for name in names:
        contestant = contestants.get(name)
        reason = contestant.unavailable(options.device)
        if reason is not None:
            refused[name] = _result(case, name, "absent", reason=reason)
            continue
        reason = contestant.unsupported(case, options.device)
        if reason is not None:
            refused[name] = _result(case, name, "unsupported", reason=reason)
            continue
        report(f"checking {name}")
        definition = getattr(contestant, "definition", None)
        dtype = weight_dtype(contestant)
        key = (name if definition is not None else "", dtype)
        if key not in gates:
            its_inputs = with_weights(inputs, dtype)
            gates[key] = Gate(case, its_inputs, _definition(definition, case))
        forward = contestant.prepare(case)
        verdict = gates[key].check(forward)
        if verdict.passed:
            admitted[name], errors[name] = forward, verdict.worst
        else:
            status = "failed" if verdict.failed else "wrong"
            refused[name] = _result(case, name, status, reason=verdict.reason)
    # The expected results are several times larger than the inputs and would occupy the caches.
    gates.clear()

    report("timing " + ", ".join(admitted))

    def refuse(name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {first_line(error)}"
        refused[name] = _result(case, name, "failed", reason=reason)

    timings = _time(case, inputs, admitted, options, refuse)
    if options.on_gpu:
        # Graphs keep the memory they were captured with.
        torch.cuda.empty_cache()
    results = []
    for name in ("copy", *names):
        if name in refused:
            results.append(refused[name])
        elif name in timings:
            results.append(_result(case, name, "timed", timings[name], error=errors.get(name)))
    return results


def _time(
    case: Case,
    inputs: Inputs,
    admitted: dict[str, Forward],
    options: Options,
    refuse: Callable[[str, Exception], None],
) -> dict[str, Timing]:
    if not admitted:
        return {}
    effort = options.effort
    sets = [inputs]
    if case.is_host:
        # Long samples: a call takes microseconds, and the clock and the loop must not show.
        effort = Effort(effort.rounds, effort.turn, shortest=5e-3, budget=effort.budget)
    elif options.cold:
        num_bytes = sum(t.numel() * t.element_size() for t in inputs.leaves().values())
        count = _sets_past_cache(num_bytes, options.device)
        sets += [copy_inputs(inputs) for _ in range(count - 1)]
    actions = {}
    for name, forward in admitted.items():
        dtype = weight_dtype(contestants.get(name))
        actions[name] = _action(case, forward, [with_weights(one, dtype) for one in sets])
    if not case.is_host:
        num_bytes = traffic.bytes_moved(case)
        pairs = _sets_past_cache(num_bytes, options.device) if options.cold else 1
        actions["copy"] = bandwidth.copy_action(num_bytes, pairs, options.device)
    threads = torch.get_num_threads()
    try:
        if case.is_host:
            torch.set_num_threads(1)
        return measure(actions, effort, options.timer(case), refuse)
    finally:
        torch.set_num_threads(threads)


def _action(case: Case, forward: Forward, sets: Sequence[Inputs]) -> Action:
    count = len(sets)
    if case.gradients == "none":
        return Action(lambda call: forward(sets[call % count]), context=torch.no_grad, period=count)
    if case.gradients == "graph":
        return Action(lambda call: forward(sets[call % count]), period=count)

    if case.gradients == "fresh":
        leaves = [list(inputs.leaves().values()) for inputs in sets]

        def run_and_return(call: int) -> object:
            inputs = sets[call % count]
            outputs = forward(inputs)
            return torch.autograd.grad(
                outputs, leaves[call % count], inputs.upstream, allow_unused=True
            )

        return Action(run_and_return, period=count)

    def run_and_add(call: int) -> object:
        inputs = sets[call % count]
        torch.autograd.backward(forward(inputs), inputs.upstream)

    return Action(
        run_and_add,
        before=lambda call: sets[call % count].forget_gradients(),
        period=count,
    )


def weight_dtype(contestant: Any) -> torch.dtype | None:
    """The dtype that a contestant wants its weights in; None for float32, as they are."""
    return getattr(contestant, "WEIGHT_DTYPE", None)


def _sets_past_cache(num_bytes: int, device: str) -> int:
    """How many inputs of that size fill the caches twice over, from two to `_MOST_SETS`."""
    wanted = 2 * machine.last_cache(device)
    available = available_bytes(device)
    if available is not None:
        wanted = min(wanted, available // 4)
    return min(max(2, -(-wanted // max(num_bytes, 1))), _MOST_SETS)


def _definition(definition: Callable[..., Any] | None, case: Case) -> Forward | None:
    return None if definition is None else lambda inputs: definition(case, inputs)


def _bytes(name: str, case: Case) -> int:
    module: ModuleType | None = None if name == "copy" else contestants.get(name)
    count = getattr(module, "bytes_moved", traffic.bytes_moved)
    return count(case)


def _result(
    case: Case,
    contestant: str,
    status: str,
    timing: Timing | None = None,
    error: float | None = None,
    reason: str = "",
) -> Result:
    measured: dict[str, Any] = {}
    if timing is not None:
        measured = timing.figures()
        if not case.is_host:
            # A yardstick moves less than the operator, and multiplies nothing.
            own = contestant == "copy" or hasattr(contestants.get(contestant), "bytes_moved")
            measured["bytes"] = _bytes(contestant, case)
            measured["operations"] = None if own else traffic.operations(case)
    return Result(
        case=case.name,
        operator=case.operator,
        shape=case.shape,
        work=case.work,
        origin=case.origin,
        contestant=contestant,
        status=status,
        reason=reason,
        error=error,
        **measured,
    )


def describe_run(suite: str, device: str, options: Options, pages_kept: bool) -> dict[str, Any]:
    """What is common to all results of a run: the first line of its file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "suite": suite,
        "device": device,
        "threads": torch.get_num_threads(),
        "threads_bound": machine.threads_bound(),
        "cache": "cold" if options.cold else "warm",
        "pages_kept": pages_kept,
        **machine.code(),
        "machine": machine.describe(options.device),
        "versions": machine.versions(),
    }


def ceilings(options: Options) -> dict[str, Any]:
    """What the machine reaches at best, in this process: also in the first line of the file."""
    copies = bandwidth.ladder(_CEILINGS, options.device, options.timer())
    return {
        "copy_gbps_by_mib": {size: rate for size, (rate, _) in copies.items()},
        "matrix_tflops": bandwidth.matrix_rates(_CEILINGS, options.device, options.timer()),
    }
