"""What is checked, in order: answers first, and whatever may take long after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tools.gpu_check import benching, sanitizer, testing
from tools.gpu_check.process import Setting

#: Every kernel once, on few tokens.
_KERNELS = "tests/ops/test_every_kernel.py"
#: Others beside us in the headline's cases, the most wanted first. Those on a line share a process:
#: there is nothing to compile for the second.
OTHERS = ("fla", "eager,standard-fused", "liger,flash-attn-res,fast-attnres,fla-gluon")
#: A decoding step, its reads alone, and a training step of 8192 tokens: what the goals are set for.
STACKS = "[drt]*/L12-D2304-S6-B1-T[18]*"
#: The same on a CPU, small.
_SMALL_STACKS = "[dr]*/L8-D256-S4-B1-*"
#: What there is a goal for, in as many turns as there is time for.
_HEADLINE = ("--suite", "quick", "--repeats", "5")


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Attributes:
        name: as ``--parts`` takes it.
        about: for people.
        seconds: that it may take; what one leaves goes to those after it.
        check: ``check(setting, seconds)`` returns its entry in the record: ``status`` ("passed",
            "failed", "out of time" or "unavailable"), ``reason``, ``seconds`` and what it found.
    """

    name: str
    about: str
    seconds: float
    check: Callable[[Setting, float], dict[str, Any]]


def _tests(suite: testing.Suite, setting: Setting, seconds: float) -> dict[str, Any]:
    suite = replace(suite, options=["--device", setting.device, *suite.options])
    return testing.run(setting, suite, seconds)[0]


def _headline(setting: Setting, seconds: float) -> dict[str, Any]:
    return benching.run(setting, "headline", seconds, [benching.OURS], _HEADLINE, 30.0)


def _others(setting: Setting, seconds: float) -> dict[str, Any]:
    # Their kernels are compiled, and tuned by trial, within a step.
    return benching.run(setting, "others", seconds, OTHERS, _HEADLINE, 30.0)


def _models(setting: Setting, seconds: float) -> dict[str, Any]:
    stacks = STACKS if setting.device == "cuda" else _SMALL_STACKS
    arguments = ("--suite", "all", "--filter", stacks, "--repeats", "5")
    return benching.run(setting, "models", seconds, [benching.OURS], arguments, 60.0)


#: In the order in which they run.
PARTS = (
    Part(
        "kernels",
        "each kernel, each way in which it is launched",
        60.0,
        partial(_tests, testing.Suite("kernels", [_KERNELS], patience=20.0, processes=6)),
    ),
    Part("headline", "our headline figures, and the copy beside them", 60.0, _headline),
    Part(
        "tests",
        "the tests of operators, module and interfaces",
        95.0,
        partial(
            _tests,
            testing.Suite(
                "tests",
                ["tests/ops", "tests/module", "tests/compat", "tests/cuda"],
                ["--ignore", _KERNELS],
                processes=6,
            ),
        ),
    ),
    Part(
        "uses",
        "models, training, the transformers library, the command line",
        80.0,
        # Other people's kernels are compiled within a test, and sublayers in the last ones.
        partial(_tests, testing.Suite("uses", ["tests/uses"], patience=75.0, processes=4)),
    ),
    Part("others", "other people's kernels in the headline's cases", 90.0, _others),
    Part("models", "a decoding step, its reads, a training step", 50.0, _models),
    *(
        Part(tool, about, seconds, partial(sanitizer.check, tool))
        for tool, about, seconds in (
            ("memcheck", "accesses out of bounds", 30.0),
            ("racecheck", "races in shared memory", 25.0),
            ("synccheck", "wrong use of barriers", 20.0),
        )
    ),
)
#: What ``--parts first`` stands for: whether it works at all, and how fast it is.
FIRST = ("kernels", "headline")
