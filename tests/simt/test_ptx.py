"""What nvcc made of the kernels: none is left out, and what goes wrong is seen."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from . import (
    inter_block_cases,
    test_depth_attention,
    test_depth_attention_backward,
    test_inter_block_attention_backward,
)
from .build import Runner, runner_or_skip
from .cases import Limits
from .test_ways import H100

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: Devices by how they load: one of 8.x, one of 9.0, and a multiprocessor of that, for which rows
#: are never few enough to be shared.
DEVICES = [
    ("cp_async", Limits(108, 164 * 1024, 163 * 1024)),
    ("bulk", H100),
    ("bulk", Limits(1, 228 * 1024, 227 * 1024)),
]


@pytest.fixture(scope="module")
def ptx() -> Runner:
    return runner_or_skip("ptx")


def kernels_in(ptx: Runner) -> set[str]:
    """Architecture and name of every kernel, as the runner prints them."""
    found = set()
    for path in ptx.ptx:
        text = path.read_text()
        target = re.search(r"^\.target sm_(\d+)", text, re.M)
        assert target is not None
        found |= {f"{target[1]} {name}" for name in re.findall(r"\.entry (\w+)\(", text)}
    return found


#: N, D and dtypes: short and long tables of sources, few and many values a thread.
DEPTH = [
    *itertools.product((3, 20), (264, 8200), ([BF16], [FP16])),
    *itertools.product((3, 20), (264,), ([FP32], [BF16, FP32])),
    # Enough to be shared by a cluster where tokens are few.
    *itertools.product((9, 20), (2304,), ([BF16], [FP16], [FP32], [BF16, FP32])),
    *itertools.product((3,), (67,), ([BF16], [FP64])),
]
#: Wider than the eight CTAs of a cluster have room for: forward, and backward.
WIDE = [(17, 65544, [BF16]), (17, 65544, [FP16])], [(2, 65544, [BF16])]
#: N, S, D and dtypes.
PHASE_ONE = [
    *itertools.product((3, 20), [3], [264], ([BF16], [FP16], [FP32], [BF16, FP32])),
    *itertools.product([3], [3], [67], ([BF16], [FP64])),
]


def depth(sizes: list[Any], options: dict[str, Any]) -> list[test_depth_attention.Case]:
    return [test_depth_attention.make(*size, **options) for size in sizes]


def test_every_kernel_is_right(ptx: Runner, tmp_path: Path) -> None:
    """None is left out. By every way in which it is launched: tests/simt/test_ways.py."""
    ran: set[str] = set()

    def run(run_and_check: Any, cases: list[Any]) -> None:
        run_and_check(ptx, cases, tmp_path)
        ran.update((tmp_path / "printed").read_text().splitlines())

    for ring, limits in DEVICES:
        # More tokens than multiprocessors are not few.
        tokens = 2 if limits.multiprocessors == 1 else 1
        options = {"tokens": (1, tokens), "ring": ring, "limits": limits}
        wide = WIDE if limits is H100 else ([], [])
        run(test_depth_attention.run_and_check, depth(DEPTH + wide[0], options))
        run(
            test_depth_attention_backward.run_and_check,
            [
                test_depth_attention_backward.Backward(case)
                for case in depth(DEPTH + wide[1], options)
            ],
        )
        phase_one = [
            inter_block_cases.make(*size, **options)  # type: ignore[arg-type]
            for size in PHASE_ONE
        ]
        run(inter_block_cases.run_and_check, phase_one)
        run(
            test_inter_block_attention_backward.run_and_check,
            [test_inter_block_attention_backward.Backward(case) for case in phase_one],
        )
    assert sorted(kernels_in(ptx) - ran) == []


#: A mistake in an instruction, and what the runner says of it; None where only results show it.
MISTAKES = {
    "a kernel that does not wait for the one before it": (
        (r"griddepcontrol\.wait;", ""),
        "before it has waited for the previous kernel",
    ),
    "a cluster that is not waited for": (
        (r"barrier\.cluster\.wait\.acquire;", ""),
        "between arriving and waiting for a cluster",
    ),
    "warps that do not wait for one another": ((r"bar\.sync\s+1, \S+;", ""), None),
    "a ring whose slots are never free": (
        (r"mbarrier\.arrive\.shared::cta\.b64 _, \[\S+\];", ""),
        "all threads of a cluster wait for one another",
    ),
    "a slot that is read before it is filled": (
        (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 (\S+), \S+ \S+;", r"mov.pred \1, 1;"),
        None,
    ),
    "copies that nobody waits for": ((r"cp\.async\.wait_group (\S+);", ""), "were under way"),
    "copies to where others read": (
        (r"(cp\.async\.cg\.shared\.global \[\S+\], \[\S+)\], 16;", r"\1+8], 16;"),
        "is not aligned",
    ),
    "a row read beyond its end": (
        (r"(ld\.global\.v4\.u32 .*\[%rd\d+)\]", r"\1+65536]"),
        "every allocation is missed",
    ),
    "shared memory read beyond its end": (
        (r"(ld\.shared\.v4\.u32 .*\[%r\d+)\]", r"\1+262144]"),
        "shared memory is missed",
    ),
    "a store to the wrong CTA": (
        (r"(mapa\.shared::cluster\.u32 \S+ \S+) \S+;", r"\1 0;"),
        "a store reaches a CTA that has ended",
    ),
    "a kernel made for fewer threads than it gets: the error is handed back, and not left": (
        (r"\.maxntid \d+", ".maxntid 32"),
        r"a launch failed with error \d+\n",
    ),
}


@pytest.fixture(scope="module")
def right_cases(ptx: Runner, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Cases that pass: few tokens and many, in a ring, in a cluster and in place."""
    torch.manual_seed(0)
    cases = [
        test_depth_attention.make(9, 2304, tokens=(1, tokens), ring=ring, limits=limits)
        for tokens, (ring, limits) in zip((2, 2, 12), DEVICES, strict=True)
    ]
    cases.append(
        test_depth_attention.make(9, 264, layouts="odd", ring="bulk", tokens=(1, 3), limits=H100)
    )
    test_depth_attention.run_and_check(ptx, cases, tmp_path_factory.mktemp("right"))
    return cases


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(
    ptx: Runner, right_cases: list[Any], mistake: str, tmp_path: Path
) -> None:
    (pattern, replacement), said = MISTAKES[mistake]
    wrong = []
    for path in ptx.ptx:
        text, count = re.subn(pattern, replacement, path.read_text())
        if count > 0:
            wrong.append(tmp_path / path.name)
            wrong[-1].write_text(text)
    assert wrong, "no kernel has the instruction"
    names = {path.name for path in wrong}
    mistaken = Runner(ptx.executable, (*wrong, *(p for p in ptx.ptx if p.name not in names)))
    with pytest.raises(AssertionError, match=said):
        test_depth_attention.run_and_check(mistaken, right_cases, tmp_path)
