"""A model's case: every variant of the residual in one set of layers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from .cuda_timing import CudaTimer
from .gate import Verdict
from .memory import peak_bytes
from .model_gate import ModelGate
from .model_registry import ModelCase
from .model_stack import action, make_stack
from .model_variants import VARIANTS, YARDSTICK
from .results import ModelResult
from .runner import Options, Refuse, Report
from .timing import HostTimer, InStep, Timer, Timing, measure

#: Seconds for the turns of a case, all variants together.
_SECONDS = 20.0
#: What a result has of its case.
_SHARED = {field.name for field in fields(ModelResult)} & {
    field.name for field in fields(ModelCase)
}


class ModelWork:
    """As :class:`attnres_ext.benchmarks.runner.Work` has it. The yardstick runs in any case."""

    def __init__(self, case: ModelCase, options: Options):
        self.case = case
        self._device, self._turns = options.device, options.turns
        self._variants = {
            one.name: one
            for one in VARIANTS
            if one is YARDSTICK or options.names is None or one.baseline in options.names
        }
        self.names = list(self._variants)
        self._yardstick: Timing | None = None
        self._peaks: dict[str, int] = {}

    def refusal(self, name: str) -> tuple[str, str] | None:
        """Who is absent."""
        reason = self._variants[name].unavailable(self._device)
        return None if reason is None else ("absent", reason)

    def prepare(self, names: Sequence[str], report: Report) -> None:
        """Makes the layers."""
        report("layers")
        mine = tuple(self._variants[name] for name in names)
        self._stack = make_stack(self.case, self._device, mine)
        self._gate: ModelGate | None = ModelGate(make_stack(self.case, self._device))

    def check(self, name: str) -> Verdict:
        """Against the same stack in float64."""
        return self._gate.check(self._variants[name])

    def time(self, names: Sequence[str], refuse: Refuse, report: Report) -> dict[str, Timing]:
        """Turn by turn, and then the memory that a call takes."""
        # Twice the layers, once in float64, would take the memory that the variants need.
        self._gate = None
        optimizer = None
        if self.case.work == "train":
            # Its own passes over the parameters are fused: what remains of a step is the model's.
            optimizer = torch.optim.AdamW(self._stack.parameters(), lr=1e-6, fused=True)
        actions = {name: action(self._stack, self._variants[name], optimizer) for name in names}
        report("timing")
        timings = measure(actions, InStep(_SECONDS, self._turns), self._timer(), refuse)
        self._yardstick = timings.get(YARDSTICK.name)
        for name in timings:
            report(f"memory of {name}")
            with actions[name].context():
                if actions[name].before is not None:
                    actions[name].before(0)
                self._peaks[name] = peak_bytes(lambda n=name: actions[n].run(0), self._device)
        return timings

    def _timer(self) -> Timer:
        if not self._device.startswith("cuda"):
            return HostTimer()
        # A server replays a decoding step as a graph; longer work is launched as it comes.
        return CudaTimer(graphs=self.case.work in ("decode", "reads"))

    def result(self, name: str, status: str, reason: str, timing: Timing | None) -> ModelResult:
        """Time, speed, memory, and what it costs over the yardstick."""
        case, variant = self.case, self._variants[name]
        measured: dict[str, Any] = {}
        if timing is not None:
            measured = timing.figures()
            measured["tokens_per_second"] = case.batch * case.tokens / timing.median
            measured["peak_bytes"] = self._peaks[name]
            if self._yardstick is not None and variant is not YARDSTICK:
                pairs = zip(timing.samples, self._yardstick.samples, strict=True)
                over = [mine / its - 1 for mine, its in pairs]
                low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
                measured |= {"overhead": middle, "overhead_quartiles": (low, high)}
        return ModelResult(
            case=case.name, residual=variant.residual, contestant=variant.baseline,
            blocks=case.num_blocks, status=status, reason=reason, shape=case.shape,
            **{name: getattr(case, name) for name in _SHARED}, **measured,
        )  # fmt: skip
