"""Every case of the benchmark, once: which operator, which shape, and where the shape comes from.

Benchmarks and tests draw from here. Letters as everywhere: ``N`` sources, ``S`` queries, ``M``
tokens, ``D`` hidden.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

#: Where shapes come from.
ORIGINS = {
    "kimi-linear-48b": "Kimi Linear 48B: D 2304, 6 sublayers a block, 9 blocks and the embedding",
    "kimi-k3": "Kimi K3: D 7168, 24 sublayers a block, 8 blocks and the embedding",
    "paper-194m": "smallest model of the paper's Table 2: D 896, 8 blocks, context 8192",
    "paper-528m": "largest model of the paper's Table 2: D 1264, 8 blocks, context 8192",
    "flaggems": "shapes of FlagGems-vllm's published H100 table (D 7168)",
    "full": "full depth attention over 27 layers of Kimi Linear: 54 sublayers, D 2304",
    "sweep": "sources and hidden sizes between the models', to see where a kernel's limits are",
    "fla": "hidden size and sources of flash-linear-attention's published figures; fewer tokens",
    "liger": "hidden size and sources of Liger's published figures; tokens chosen by us",
    "host": "tensors so small that only the cost of the call is left",
}

#: What happens to gradients: no graph; a graph is recorded but not run; gradients are returned;
#: gradients are added to the `.grad` that every input has already.
GRADIENTS = ("none", "graph", "fresh", "accumulate")

#: Operators in `quick`, `ops` and, with larger shapes, `all`; `model` and `decode` are whole models
#: (:mod:`attnres_ext.benchmarks.model_registry`), which `all` runs, too.
SUITES = ("quick", "ops", "model", "decode", "all")
_OPERATOR_SUITES = ("quick", "ops", "all")
#: Where there are other cases: a GPU is not filled by what a CPU has time for.
DEVICES = ("cpu", "cuda")
_SHORT_DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


class UnknownCaseError(ValueError):
    """No case answers to a suite or filter; the message is for people."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        operator: name of the public function.
        sources: N. For ``accumulate_depth_attention`` the finished blocks, without the partial sum;
            for ``merge_partial``, whose cost does not depend on it, the sources behind ``out``.
        tokens: M.
        hidden: D.
        dtype: of sources and results; weights are float32.
        queries: S, more than one for ``inter_block_attention`` only.
        gradients: one of GRADIENTS.
        norm: whether the following RMSNorm is fused.
        layout: "contiguous", or "padded" for rows of a wider tensor.
        origin: key of ORIGINS.
        suite: the smallest suite that runs it on the CPU, None for none; larger ones include
            smaller ones.
        cuda: the same on a GPU.
        baselines: who runs in the quick suite, which has a minute in all.
    """

    operator: str
    sources: int
    tokens: int
    hidden: int
    dtype: str = "bfloat16"
    queries: int = 1
    gradients: str = "none"
    norm: bool = False
    layout: str = "contiguous"
    origin: str = "kimi-linear-48b"
    suite: str | None = "ops"
    cuda: str | None = None
    baselines: tuple[str, ...] = ("ours", "eager")

    @property
    def shape(self) -> str:
        """For example ``N9 M2048 D2304 bf16``."""
        queries = f" S{self.queries}" if self.operator == "inter_block_attention" else ""
        sources = "" if self.operator == "merge_partial" else f"N{self.sources}{queries} "
        return f"{sources}M{self.tokens} D{self.hidden} {_SHORT_DTYPES[self.dtype]}"

    @property
    def work(self) -> str:
        """What one timed call does, for people."""
        words = {
            "none": "forward",
            "graph": "forward, recording",
            "fresh": "forward + backward",
            "accumulate": "forward + backward into .grad",
        }[self.gradients]
        extras = [
            word for word, on in (("norm", self.norm), ("padded", self.layout == "padded")) if on
        ]
        return f"{words} ({', '.join(extras)})" if extras else words

    @property
    def name(self) -> str:
        """Unique, without spaces; what ``--filter`` matches."""
        parts = [self.operator, self.shape.replace(" ", "-"), self.gradients]
        if self.norm:
            parts.append("norm")
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "/".join(parts)

    def smallest_suite(self, device: str) -> str | None:
        """The smallest suite that runs it on "cpu" or "cuda"."""
        return self.cuda if device == "cuda" else self.suite

    @property
    def has_backward(self) -> bool:
        """Whether a timed call runs the backward, too."""
        return self.gradients in ("fresh", "accumulate")

    @property
    def is_host(self) -> bool:
        """Whether the cost of the call is measured rather than bytes moved."""
        return self.origin == "host"


def _cases() -> list[Case]:
    site = Case("depth_attention", sources=9, tokens=2048, hidden=2304)
    everybody = ("ours", "eager", "compile")
    cases = [
        # The figures that the project sets itself goals for.
        replace(site, dtype=dtype, gradients=gradients, suite="quick", baselines=who)
        for gradients, who in (("none", everybody), ("fresh", ("ours", "eager")))
        for dtype in ("float32", "bfloat16")
    ]
    add = Case("accumulate_depth_attention", sources=8, tokens=2048, hidden=2304, norm=True)
    inter = Case("inter_block_attention", sources=9, queries=6, tokens=2048, hidden=2304)
    merge = Case("merge_partial", sources=9, tokens=2048, hidden=2304, norm=True)
    cases += [
        replace(add, suite="quick", baselines=("ours", "eager", "standard-fused")),
        replace(inter, suite="quick"),
        replace(merge, suite="quick", baselines=("ours", "eager", "standard-fused")),
    ]
    cases += [
        Case(
            "depth_attention",
            8,
            1,
            64,
            "float32",
            gradients=gradients,
            origin="host",
            suite="quick",
            cuda="quick",
        )
        for gradients in ("none", "graph", "fresh")
    ]
    cases += [
        Case(
            "accumulate_depth_attention", 8, 1, 64, "float32", norm=True, origin="host", cuda="ops"
        ),
        Case("merge_partial", 8, 1, 64, "float32", norm=True, origin="host", cuda="ops"),
        Case("inter_block_attention", 8, 1, 64, "float32", queries=6, origin="host", cuda="ops"),
    ]

    # One site and one block of Kimi Linear, every operator in every direction.
    cases += [
        replace(site, dtype="float16"),
        replace(site, gradients="accumulate"),
        replace(site, norm=True),
        replace(site, norm=True, gradients="fresh"),
        replace(site, layout="padded"),
        replace(
            site,
            sources=10,
            tokens=8192,
            cuda="quick",
            baselines=("ours", "eager", "compile", "fla"),
        ),
    ]
    for case in (add, inter, merge):
        cases += [
            replace(case, dtype="float32"),
            replace(case, gradients="fresh"),
            replace(case, dtype="float32", gradients="fresh"),
        ]
    cases += [replace(add, gradients="accumulate")]

    # Serving: one token to a few hundred at K3's width, as in the peers' tables.
    decode = Case(
        "depth_attention", sources=9, tokens=128, hidden=7168, origin="flaggems", cuda="ops"
    )
    cases += [
        replace(decode, sources=2, tokens=1, cuda="quick"),
        replace(decode, sources=2, tokens=1, norm=True),
        replace(decode, sources=5, cuda="quick"),
        replace(decode, sources=5, norm=True),
        replace(decode, cuda="quick"),
    ]

    # Everything that takes a while.
    everything = [
        replace(decode, sources=5, tokens=1024, cuda="ops"),
        replace(decode, tokens=8192, cuda="quick", baselines=("ours", "eager", "fla")),
        Case("inter_block_attention", 8, 2048, 7168, queries=24, origin="kimi-k3"),
        Case("accumulate_depth_attention", 8, 2048, 7168, norm=True, origin="kimi-k3"),
        Case("depth_attention", 9, 2048, 7168, gradients="fresh", origin="kimi-k3"),
        Case("depth_attention", 10, 2048, 4096, gradients="accumulate", origin="fla"),
        Case("depth_attention", 8, 2048, 4096, "float16", origin="liger"),
        Case("depth_attention", 8, 2048, 4096, "float16", gradients="fresh", origin="liger"),
    ]
    for origin, hidden in (("paper-194m", 896), ("paper-528m", 1264)):
        everything += [
            Case("depth_attention", 9, 8192, hidden, gradients=gradients, origin=origin)
            for gradients in ("none", "fresh")
        ]
    return cases + [replace(case, suite="all") for case in everything]


def _cuda_cases() -> list[Case]:
    everybody = ("ours", "eager", "fla")
    site = Case("depth_attention", 9, 8192, 7168, origin="kimi-k3", suite=None)
    layer = Case("depth_attention", 10, 8192, 2304, suite=None)
    add = Case("accumulate_depth_attention", 8, 8192, 2304, norm=True, suite=None)
    inter = Case("inter_block_attention", 9, 8192, 2304, queries=6, suite=None)
    inter_k3 = replace(inter, sources=8, queries=24, hidden=7168, origin="kimi-k3")
    merge = Case("merge_partial", 9, 8192, 2304, norm=True, suite=None)
    full = Case("depth_attention", 54, 8192, 2304, origin="full", suite=None)
    narrow = Case("depth_attention", 9, 16384, 512, origin="sweep", suite=None)
    few = Case("depth_attention", 9, 128, 7168, origin="kimi-k3", suite=None)
    add_up = ("ours", "eager", "standard-fused")
    # What the project sets itself goals for, forward before backward: others tune longer for that.
    headline = [
        replace(full, baselines=everybody),
        replace(add, baselines=add_up),
        inter,
        inter_k3,
        replace(merge, baselines=add_up),
        *(replace(narrow, hidden=hidden, baselines=everybody) for hidden in (512, 1024)),
        *(
            replace(case, gradients=gradients, baselines=everybody)
            for case in (site, layer)
            for gradients in ("fresh", "accumulate")
        ),
        replace(inter, gradients="fresh"),
        replace(inter_k3, gradients="fresh"),
        replace(merge, gradients="fresh", baselines=add_up),
        *(
            replace(narrow, hidden=hidden, gradients="fresh", baselines=everybody)
            for hidden in (512, 1024)
        ),
    ]
    # What training and inference do with these.
    more = [
        replace(layer, norm=True),
        replace(layer, norm=True, gradients="fresh"),
        replace(layer, layout="padded"),
        replace(layer, dtype="float32"),
        replace(add, gradients="fresh"),
        replace(add, gradients="accumulate"),
        replace(merge, hidden=7168, origin="kimi-k3"),
        replace(full, gradients="fresh"),
    ]
    # A token to a few hundred: latency.
    more += [
        replace(few, sources=sources, tokens=tokens)
        for sources in (2, 5, 9)
        for tokens in (1, 8, 32, 128)
        if (sources, tokens) not in ((2, 1), (5, 128), (9, 128))  # the peers' own
    ]
    for case in (add, merge, inter):
        more += [replace(case, tokens=tokens) for tokens in (1, 32, 128)]
    sweep = [
        Case("depth_attention", sources, 8192, hidden, gradients=gradients, origin="sweep")
        for hidden in (2048, 4096)
        for sources in (8, 12, 17)
        for gradients in ("none", "fresh")
    ]
    return [
        *(replace(case, cuda="quick") for case in headline),
        *(replace(case, cuda="ops") for case in more),
        *(replace(case, cuda="ops", suite=None) for case in sweep),
    ]


CASES: tuple[Case, ...] = (*_cases(), *_cuda_cases())


def select(suite: str = "all", pattern: str | None = None, device: str | None = None) -> list[Case]:
    """The operators' cases of a suite whose name contains, or matches as a shell pattern,
    ``pattern``.

    Args:
        suite: one of SUITES; those of whole models have no operators.
        pattern: a filter.
        device: one of DEVICES; None takes the cases of all.

    Raises:
        UnknownCaseError: there is no such suite.
    """
    if suite not in SUITES:
        raise UnknownCaseError(f"suite '{suite}' is not one of {', '.join(SUITES)}")
    included: tuple[str, ...] = ()
    if suite in _OPERATOR_SUITES:
        included = _OPERATOR_SUITES[: _OPERATOR_SUITES.index(suite) + 1]
    devices = DEVICES if device is None else (device,)
    return [
        case
        for case in CASES
        if any(case.smallest_suite(one) in included for one in devices)
        and (pattern is None or matches(case, pattern))
    ]


def most_wanted_first(cases: Sequence[Case], device: str) -> list[Case]:
    """The same cases, those of smaller suites first: for runs that end before the last one."""
    return sorted(
        cases, key=lambda case: _OPERATOR_SUITES.index(case.smallest_suite(device) or "all")
    )


class Named(Protocol):
    """Anything with a name that filters match."""

    @property
    def name(self) -> str:
        """Unique, without spaces."""


def matches(case: Named, pattern: str) -> bool:
    """Whether ``pattern`` is a part of the case's name, or matches all of it as a shell pattern."""
    return pattern in case.name or fnmatch.fnmatchcase(case.name, pattern)


def operators(cases: Sequence[Case] = CASES) -> list[str]:
    """The operators that cases cover, in order of appearance."""
    return list(dict.fromkeys(case.operator for case in cases))
