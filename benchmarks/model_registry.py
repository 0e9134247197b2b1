"""Every model that is timed, once: the stack of layers, the work, and the curves it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import registry
from .registry import UnknownCaseError

#: Where stacks come from.
ORIGINS = {
    "scaled": "Kimi Linear's layers, narrow enough for a CPU",
    "48b-like": "Kimi Linear 48B's layers; feed-forwards are dense, as wide as its active experts",
}

_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class ModelCase:
    """A stack of Kimi Linear layers and what it does in one timed call.

    Three layers of linear attention (KDA) are followed by one of full attention (MLA). Experts are
    left out: which of them a token takes may turn on a rounding, and two residuals would then be
    compared on different work.

    Attributes:
        work: "train" (forward, backward, optimizer step), "prefill", "decode" (one token), or
            "reads" (what a decoding step does between the sublayers, which are left out).
        layers: token mixer and feed-forward each.
        hidden: D.
        intermediate: of the feed-forward.
        heads: of the token mixers.
        head_dim: of the token mixers.
        sublayers_per_block: two sublayers a layer.
        tokens: of each sequence in a call; 1 for "decode".
        batch: sequences.
        context: tokens that came before the call.
        dtype: of parameters and activations; pseudo-queries are float32.
        scaling: axes along which the case is a point.
        origin: key of ORIGINS.
        device: the kind of device that it is sized for.
    """

    work: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    sublayers_per_block: int
    tokens: int
    batch: int = 1
    context: int = 0
    dtype: str = "float32"
    scaling: tuple[str, ...] = ()
    origin: str = "scaled"
    device: str = "cpu"

    @property
    def suite(self) -> str:
        """Training steps are "model", inference is "decode"."""
        return "model" if self.work == "train" else "decode"

    @property
    def num_blocks(self) -> int:
        """Sources at the end of the stack with "block", the embedding among them."""
        return -(-2 * self.layers // self.sublayers_per_block) + 1

    @property
    def shape(self) -> str:
        """For people: ``12 layers, D2304, 6 sublayers a block, 1 x 8192 tokens, bf16``."""
        after = f" after {self.context}" if self.context else ""
        return (
            f"{self.layers} layers, D{self.hidden}, {self.sublayers_per_block} sublayers a block, "
            f"{self.batch} x {self.tokens} token{'s' if self.tokens > 1 else ''}{after}, "
            f"{_SHORT_DTYPES[self.dtype]}"
        )

    @property
    def name(self) -> str:
        """Unique, without spaces; what ``--filter`` matches."""
        context = f"-C{self.context}" if self.context else ""
        return (
            f"{self.work}/L{self.layers}-D{self.hidden}-S{self.sublayers_per_block}-"
            f"B{self.batch}-T{self.tokens}{context}-{_SHORT_DTYPES[self.dtype]}"
        )


def _curves(base: ModelCase, **axes: Sequence[dict[str, int]]) -> list[ModelCase]:
    """``base``, and along each axis its changes; ``base`` is a point of every axis."""
    cases = [replace(base, scaling=tuple(axes))]
    for axis, changes in axes.items():
        cases += [replace(base, scaling=(axis,), **change) for change in changes]
    return cases


def _cases() -> list[ModelCase]:
    small = ModelCase("train", 8, 256, 704, heads=4, head_dim=64, sublayers_per_block=4, tokens=256)
    large = ModelCase(
        "train", 12, 2304, 9216, heads=32, head_dim=128, sublayers_per_block=6, tokens=8192,
        dtype="bfloat16", origin="48b-like", device="cuda",
    )  # fmt: skip
    cases = _curves(
        small,
        layers=[{"layers": 4}, {"layers": 16}],
        blocks=[{"sublayers_per_block": 2}, {"sublayers_per_block": 8}],
        tokens=[{"tokens": 64}, {"tokens": 1024}],
        hidden=[
            {"hidden": 128, "intermediate": 352, "heads": 2},
            {"hidden": 512, "intermediate": 1408, "heads": 8},
        ],
    )
    cases += _curves(
        replace(small, work="decode", tokens=1, context=128),
        layers=[{"layers": 16}],
        tokens=[{"batch": 8}],
        hidden=[{"hidden": 512, "intermediate": 1408, "heads": 8}],
    )
    cases.append(replace(small, work="reads", tokens=1, context=128))
    cases += _curves(replace(small, work="prefill", tokens=256), tokens=[{"tokens": 1024}])
    cases += _curves(
        large,
        layers=[{"layers": 6}, {"layers": 24}],
        blocks=[{"sublayers_per_block": 3}, {"sublayers_per_block": 12}],
        tokens=[{"tokens": 2048}],
        hidden=[{"hidden": 1152, "intermediate": 4608, "heads": 16}],
    )
    cases += _curves(
        replace(large, work="decode", tokens=1, context=1024),
        layers=[{"layers": 27}],
        tokens=[{"batch": 8}, {"batch": 32}, {"batch": 128}],
    )
    cases += _curves(
        replace(large, work="reads", tokens=1, context=1024),
        tokens=[{"batch": 32}, {"batch": 128}],
    )
    cases += _curves(replace(large, work="prefill"), tokens=[{"tokens": 2048}])
    return cases


CASES: tuple[ModelCase, ...] = tuple(_cases())


def cheapest_first(cases: Sequence[ModelCase]) -> list[ModelCase]:
    """The same stacks, those with least to do first: for runs that end before the last one."""
    return sorted(cases, key=lambda case: case.batch * case.tokens * case.layers)


def select(suite: str, device: str, pattern: str | None = None) -> list[ModelCase]:
    """The stacks of a suite for a kind of device whose name contains or matches ``pattern``.

    Raises:
        UnknownCaseError: there is no such suite.
    """
    if suite not in registry.SUITES:
        raise UnknownCaseError(f"suite '{suite}' is not one of {', '.join(registry.SUITES)}")
    return [
        case
        for case in CASES
        if case.device == device
        and suite in (case.suite, "all")
        and (pattern is None or registry.matches(case, pattern))
    ]
