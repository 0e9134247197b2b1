"""Runs cases: gate first, then the timing of those who passed."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnres_ext.benchmarks import bandwidth, contestants, machine, traffic
from attnres_ext.benchmarks.gate import Gate
from attnres_ext.benchmarks.inputs import Inputs, copy_inputs, make_inputs
from attnres_ext.benchmarks.memory import available_bytes
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.results import Result
from attnres_ext.benchmarks.timing import Action, Effort, Timing, measure

Forward = Callable[[Inputs], tuple[Tensor, ...]]
Report = Callable[[str], None]

#: Copies of inputs of a few kilobytes would take longer to make than to time.
_MOST_SETS = 1024

#: Effort by suite. `quick` is part of the demo and has a minute in all.
EFFORTS = {
    "quick": Effort(rounds=5, turn=3, budget=1.0),
    "ops": Effort(rounds=9, turn=3, budget=6.0),
    "all": Effort(rounds=9, turn=3, budget=6.0),
}


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        effort: how long to measure.
        names: contestants; None takes each case's `rivals` ("quick") or all.
        quick: whether cases choose their rivals themselves.
        cold: whether inputs are rotated past the last-level cache.
    """

    effort: Effort = EFFORTS["ops"]
    names: tuple[str, ...] | None = None
    quick: bool = False
    cold: bool = False

    def contestants(self, case: Case) -> tuple[str, ...]:
        """Who runs in ``case``."""
        if self.names is not None:
            return self.names
        return case.rivals if self.quick else contestants.NAMES


def run_case(case: Case, options: Options, report: Report = lambda _: None) -> list[Result]:
    """Runs one case: a result for the copy and one for every contestant.

    Args:
        case: what to run.
        options: how to run it.
        report: told what is going on, for a progress display.
    """
    report("inputs")
    inputs = make_inputs(case)
    gates: dict[str, Gate] = {}
    refused: dict[str, Result] = {}
    admitted: dict[str, Forward] = {}
    errors: dict[str, float] = {}
    names = options.contestants(case)
    for name in names:
        contestant = contestants.get(name)
        reason = contestant.unavailable()
        if reason is not None:
            refused[name] = _result(case, name, "absent", reason=reason)
            continue
        reason = contestant.unsupported(case)
        if reason is not None:
            refused[name] = _result(case, name, "unsupported", reason=reason)
            continue
        report(f"checking {name}")
        definition = getattr(contestant, "definition", None)
        key = name if definition is not None else ""
        if key not in gates:
            gates[key] = Gate(case, inputs, _definition(definition, case))
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
    timings = _time(case, inputs, admitted, options)
    results = []
    for name in ("copy", *names):
        if name in refused:
            results.append(refused[name])
        elif name in timings:
            num_bytes = None if case.is_host else _bytes(name, case)
            results.append(_result(case, name, "timed", timings[name], num_bytes, errors.get(name)))
    return results


def _time(
    case: Case, inputs: Inputs, admitted: dict[str, Forward], options: Options
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
        sets += [copy_inputs(inputs) for _ in range(_sets_past_cache(num_bytes) - 1)]
    actions = {name: _action(case, forward, sets) for name, forward in admitted.items()}
    if not case.is_host:
        num_bytes = traffic.bytes_moved(case)
        pairs = _sets_past_cache(num_bytes) if options.cold else 1
        actions["copy"] = bandwidth.copy_action(num_bytes, pairs)
    threads = torch.get_num_threads()
    try:
        if case.is_host:
            torch.set_num_threads(1)
        return measure(actions, effort)
    finally:
        torch.set_num_threads(threads)


def _action(case: Case, forward: Forward, sets: Sequence[Inputs]) -> Action:
    count = len(sets)
    if case.gradients == "none":
        return Action(lambda call: forward(sets[call % count]), context=torch.no_grad)
    if case.gradients == "graph":
        return Action(lambda call: forward(sets[call % count]))

    if case.gradients == "fresh":
        leaves = [list(inputs.leaves().values()) for inputs in sets]

        def run_and_return(call: int) -> object:
            inputs = sets[call % count]
            outputs = forward(inputs)
            return torch.autograd.grad(
                outputs, leaves[call % count], inputs.upstream, allow_unused=True
            )

        return Action(run_and_return)

    def run_and_add(call: int) -> object:
        inputs = sets[call % count]
        torch.autograd.backward(forward(inputs), inputs.upstream)

    return Action(run_and_add, before=lambda call: sets[call % count].forget_gradients())


def _sets_past_cache(num_bytes: int) -> int:
    """How many inputs of that size fill the caches twice over, from two to `_MOST_SETS`."""
    sizes = machine.caches()
    last = sizes[max(sizes)] if sizes else 64 * 2**20
    wanted = 2 * last
    available = available_bytes()
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
    num_bytes: int | None = None,
    error: float | None = None,
    reason: str = "",
) -> Result:
    measured: dict[str, Any] = {}
    if timing is not None:
        measured = {
            "seconds": timing.median,
            "best_seconds": timing.best,
            "spread": timing.spread,
            "samples": tuple(timing.samples),
            "preemptions": timing.preemptions,
        }
    return Result(
        case=case.name,
        operator=case.operator,
        shape=case.shape,
        work=case.work,
        origin=case.origin,
        contestant=contestant,
        status=status,
        reason=reason,
        bytes=num_bytes,
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
        "cache": "cold" if options.cold else "warm",
        "pages_kept": pages_kept,
        **machine.commit(),
        "csrc_sha256": machine.source_hash(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def run_cases(
    cases: Sequence[Case],
    options: Options,
    report: Callable[[Case, str], None],
    seconds: float = math.inf,
) -> Iterator[tuple[Case, list[Result]]]:
    """Runs ``cases`` one by one, and starts none once ``seconds`` have passed."""
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            return
        yield case, run_case(case, options, lambda step, case=case: report(case, step))
