"""Who connects the layers of a stack: the arms of a model's benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from attnres_ext import AttentionResiduals, reference

from .contestants import fla
from .plain_residual import Mix, PlainResidual


@dataclass(frozen=True)
class Arm:
    """One residual by one implementation.

    Attributes:
        residual: "standard", "block" or "full".
        contestant: whose.
        make: its module from ``AttentionResiduals``, whose parameters it shares.
        unavailable: ``unavailable(device)`` says why it cannot run there, or None.
    """

    residual: str
    contestant: str
    make: Callable[[AttentionResiduals], nn.Module]
    unavailable: Callable[[str], str | None] = lambda device: None

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.residual}, {self.contestant}"


def _eager(
    sources: list[Tensor], query: Tensor, gain: Tensor, eps: float, weight: Tensor, out_eps: float
) -> Tensor:
    return reference.depth_attention(
        sources, query, gain, out_weight=weight, eps=eps, out_eps=out_eps
    )


def _fla(
    sources: list[Tensor], query: Tensor, gain: Tensor, eps: float, weight: Tensor, out_eps: float
) -> Tensor:
    from fla.ops.attnres import fused_attnres

    # Its norms share one epsilon, and so do Kimi Linear's.
    return fused_attnres(query, sources, gain, output_rms_weight=weight, rms_eps=out_eps)


def _plain(mix: Mix) -> Callable[[AttentionResiduals], nn.Module]:
    return lambda residual: PlainResidual(residual, mix)


def _as_it_is(residual: AttentionResiduals) -> nn.Module:
    return residual


#: The yardstick comes first: this library's standard residual, one kernel that adds and normalises
#: at every site, and so the strictest measure of what attention over depth costs.
ARMS = (
    Arm("standard", "standard", _as_it_is),
    Arm("standard", "eager", _plain(_eager)),
    *(
        Arm(residual, contestant, make, unavailable)
        for residual in ("block", "full")
        for contestant, make, unavailable in (
            ("ours", _as_it_is, lambda device: None),
            ("eager", _plain(_eager), lambda device: None),
            ("fla", _plain(_fla), fla.missing),
        )
    ),
)
#: Whose time the others' is compared with.
YARDSTICK = ARMS[0]
