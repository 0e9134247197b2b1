"""What the cases of all backwards share: bases of source gradients, and how outputs are written."""

from __future__ import annotations

import struct
from typing import Any

import torch

from .cases import Rows, encode_absent, encode_output, encode_rows, rows

#: What the gradient of a source is added to: nothing, other rows, what its own rows hold, or what
#: the source before has left in the rows that both share.
NO_BASE, OTHER_BASE, OWN_BASE, SHARED_BASE = range(4)

Shapes = list[tuple[tuple[int, ...], torch.dtype]]


class GradientCase:
    """One call of a backward; the dataclasses that inherit have these fields, among others."""

    case: Any
    base_kinds: list[int]
    wanted: list[bool]
    gains: bool
    grad_layout: str
    bases: list[Rows | None]

    def choose_bases(self) -> None:
        """Makes the rows that gradients are added to; by default there are none."""
        case, count = self.case, len(self.case.sources)
        self.base_kinds = self.base_kinds or [NO_BASE] * count
        self.wanted = self.wanted or [True] * count
        self.bases = [
            rows(case.tokens, case.hidden, source.view.dtype)
            if kind in (OTHER_BASE, OWN_BASE)
            else None
            for kind, source in zip(self.base_kinds, case.sources, strict=True)
        ]

    @property
    def num_parts(self) -> int:
        return min(self.case.num_tokens, 2 * self.case.limits.multiprocessors) if self.gains else 0

    def source_gradient_shapes(self) -> Shapes:
        """Shape and dtype of the gradient of each source."""
        case = self.case
        return [
            (
                (case.num_tokens, case.hidden) if wanted and kind != SHARED_BASE else (0,),
                source.view.dtype,
            )
            for wanted, kind, source in zip(self.wanted, self.base_kinds, case.sources, strict=True)
        ]

    def encode_bases(self) -> bytes:
        """Kind and rows of each base."""
        parts = []
        for kind, base in zip(self.base_kinds, self.bases, strict=True):
            parts.append(struct.pack("=q", kind))
            parts.append(encode_absent() if base is None else encode_rows(base))
        return b"".join(parts)

    def encode_outputs(self, shapes: Shapes) -> bytes:
        """Room for outputs of these shapes, in the gradients' layout."""
        parts = []
        for shape, dtype in shapes:
            offset = dtype.itemsize if self.grad_layout == "misaligned" and len(shape) == 2 else 0
            parts.append(encode_output(shape, dtype, self.case.hidden, offset))
        return b"".join(parts)
