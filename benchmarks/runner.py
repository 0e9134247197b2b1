"""Runs cases: gate first, then the timing of those who passed.

An operator's case and a model's differ in who runs, in what a call is, and in what is kept of it:
see :class:`OperatorWork` and :class:`attnres_ext.benchmarks.model_work.ModelWork`.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import bandwidth, baselines, machine, traffic
from .baselines import Forward
from .cuda_timing import CudaTimer
from .gate import Gate, Verdict, first_line
from .inputs import Inputs, copy_inputs, make_inputs, with_weights
from .memory import available_bytes
from .registry import Case
from .results import ModelResult, Result
from .timing import Action, Effort, HostTimer, Timer, Timing, measure

if TYPE_CHECKING:
    from .model_registry import ModelCase

Row = Result | ModelResult
Report = Callable[[str], None]
#: ``refuse(name, error)``.
Refuse = Callable[[str, Exception], None]

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
#: A model's case: turns, and layers, checks and memory beside them.
_ROUGH_MODEL = 28.0


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        effort: how long to measure.
        names: baselines; None takes each case's own ("quick") or the usual ones.
        quick: whether cases choose their baselines themselves.
        cold: whether inputs are rotated past the last-level cache.
        device: "cpu" or a CUDA device.
        turns: of everybody in a model's case; None is as many as there is time for.
    """

    effort: Effort = _THOROUGH
    names: tuple[str, ...] | None = None
    quick: bool = False
    cold: bool = False
    device: str = "cpu"
    turns: int | None = None

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

    def baselines(self, case: Case) -> tuple[str, ...]:
        """Who runs in ``case``."""
        if self.names is not None:
            return self.names
        return case.baselines if self.quick else baselines.USUAL


def rough_seconds(case: Case | ModelCase, options: Options) -> float:
    """How long a case may take where nobody has run it yet."""
    if not isinstance(case, Case):
        return _ROUGH_MODEL
    budget = options.effort.budget
    if options.on_gpu:
        return _ROUGH_COMPILING + budget
    elements = case.sources * case.queries * case.tokens * case.hidden
    plain = _ROUGH_ELEMENT * elements * (4 if case.has_backward else 1)
    # It runs four times before it is timed, and others, who are faster, get as much time together.
    return _ROUGH_COMPILING + 4 * plain + 2 * min(budget, 10 * plain)


class Work(Protocol):
    """A case and those who run in it, by name."""

    names: Sequence[str]

    def refusal(self, name: str) -> tuple[str, str] | None:
        """Status and reason of who cannot run here, or does not do this."""

    def prepare(self, names: Sequence[str], report: Report) -> None:
        """Makes what the case works on, and what its results must be."""

    def check(self, name: str) -> Verdict:
        """What the correctness gate finds."""

    def time(self, names: Sequence[str], refuse: Refuse, report: Report) -> dict[str, Timing]:
        """Times those who passed, in turns."""

    def result(self, name: str, status: str, reason: str, timing: Timing | None) -> Row:
        """What is kept."""


def run_case(
    case: Case | ModelCase, options: Options, report: Report = lambda _: None
) -> list[Row]:
    """Runs one case: a result for the copy or the yardstick, and one for everybody.

    Args:
        case: what to run.
        options: how to run it.
        report: told what is going on, for a progress display.
    """
    work: Work
    if isinstance(case, Case):
        work = OperatorWork(case, options)
    else:
        from .model_work import ModelWork

        work = ModelWork(case, options)
    rows: dict[str, Row] = {}
    errors: dict[str, float | None] = {}

    def refuse(name: str, status: str, reason: str) -> None:
        rows[name] = work.result(name, status, reason, None)

    for name in work.names:
        if (refusal := work.refusal(name)) is not None:
            refuse(name, *refusal)
    waiting = [name for name in work.names if name not in rows]
    try:
        work.prepare(waiting, report)
        for name in waiting:
            report(f"checking {name}")
            verdict = work.check(name)
            if verdict.passed:
                errors[name] = verdict.worst
            else:
                refuse(name, "failed" if verdict.failed else "wrong", verdict.reason)
        failed = partial(_failed, refuse)
        timings = work.time(list(errors), failed, report) if errors else {}
    except torch.OutOfMemoryError as error:
        for name in waiting:
            refuse(name, "failed", f"the case does not fit: {first_line(error)}")
        timings = {}
    _collect(options)
    for name, timing in timings.items():
        row = work.result(name, "timed", "", timing)
        rows[name] = replace(row, error=errors.get(name))
    first = [name for name in rows if name not in work.names]
    return [rows[name] for name in (*first, *work.names) if name in rows]


def _failed(refuse: Callable[[str, str, str], None], name: str, error: Exception) -> None:
    refuse(name, "failed", f"{type(error).__name__}: {first_line(error)}")


def _collect(options: Options) -> None:
    """Graphs keep the memory that they were captured with."""
    if options.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


class OperatorWork:
    """An operator's case, beside a copy of the bytes that it must move."""

    def __init__(self, case: Case, options: Options):
        self.case = case
        self.names = options.baselines(case)
        self._options = options
        self._gates: dict[object, Gate] = {}
        self._forwards: dict[str, Forward] = {}

    def refusal(self, name: str) -> tuple[str, str] | None:
        """Who is absent, or does not do this case."""
        device, baseline = self._options.device, baselines.get(name)
        if (reason := baseline.unavailable(device)) is not None:
            return "absent", reason
        reason = baseline.unsupported(self.case, device)
        return None if reason is None else ("unsupported", reason)

    def prepare(self, names: Sequence[str], report: Report) -> None:
        """Makes the inputs."""
        report("inputs")
        self._inputs = make_inputs(self.case, device=self._options.device)

    def check(self, name: str) -> Verdict:
        """Against the operator's definition, or a yardstick's own, with weights as wanted."""
        baseline = baselines.get(name)
        key = baseline.definition, baseline.weight_dtype
        if key not in self._gates:
            inputs = with_weights(self._inputs, baseline.weight_dtype)
            self._gates[key] = Gate(self.case, inputs, baseline.definition)
        self._forwards[name] = baseline.prepare(self.case)
        return self._gates[key].check(self._forwards[name])

    def time(self, names: Sequence[str], refuse: Refuse, report: Report) -> dict[str, Timing]:
        """Everybody and the copy, which stands first."""
        report("timing " + ", ".join(names))
        # The expected results are several times larger than the inputs and would occupy the caches.
        self._gates.clear()
        case, options, effort = self.case, self._options, self._options.effort
        sets = [self._inputs]
        if case.is_host:
            # Long samples: a call takes microseconds, and the clock and the loop must not show.
            effort = replace(effort, shortest=5e-3)
        elif options.cold:
            leaves = self._inputs.leaves().values()
            num_bytes = sum(t.numel() * t.element_size() for t in leaves)
            count = _sets_past_cache(num_bytes, options.device)
            sets += [copy_inputs(self._inputs) for _ in range(count - 1)]
        actions = {}
        for name in names:
            dtype = baselines.get(name).weight_dtype
            mine = [with_weights(one, dtype) for one in sets]
            actions[name] = _action(case, self._forwards[name], mine)
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

    def result(self, name: str, status: str, reason: str, timing: Timing | None) -> Result:
        """Time, bytes and operations."""
        case = self.case
        measured: dict[str, Any] = {} if timing is None else timing.figures()
        if timing is not None and not case.is_host:
            # A yardstick moves less than the operator, and multiplies nothing.
            who = None if name == "copy" else baselines.get(name)
            works = who is not None and who.definition is None
            measured["bytes"] = traffic.bytes_moved(case) if who is None else who.bytes_moved(case)
            measured["operations"] = traffic.operations(case) if works else None
        return Result(
            case.name, case.operator, case.shape, case.work, case.origin, name, status=status,
            reason=reason, **measured,
        )  # fmt: skip


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


def _sets_past_cache(num_bytes: int, device: str) -> int:
    """How many inputs of that size fill the caches twice over, from two to `_MOST_SETS`."""
    wanted = 2 * machine.last_cache(device)
    available = available_bytes(device)
    if available is not None:
        wanted = min(wanted, available // 4)
    return min(max(2, -(-wanted // max(num_bytes, 1))), _MOST_SETS)


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
