"""Cases of depth attention for the runner: tensors in awkward layouts, and what came back."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
RINGS = {"cp_async": 0, "bulk": 1}
ORDERS = {"forward": 0, "backward": 1, "random": 2}


@dataclass
class Limits:
    """What a pretended device has."""

    multiprocessors: int = 2
    shared_per_multiprocessor: int = 228 * 1024
    shared_per_cta: int = 227 * 1024


@dataclass
class Rows:
    """Rows ``[outer, inner, D]`` of an allocation that starts ``offset`` bytes into its block."""

    storage: Tensor
    view: Tensor
    offset: int = 0


def rows(
    tokens: tuple[int, int], hidden: int, dtype: torch.dtype, layout: str = "contiguous"
) -> Rows:
    """Random rows: contiguous, sliced (two aligned strides), odd (odd strides) or misaligned."""
    outer, inner = tokens
    pad_columns = {"sliced": 16 // dtype.itemsize, "odd": 1}.get(layout, 0)
    pad_rows = 2 if layout in {"sliced", "odd"} else 0
    shape = (outer, inner + pad_rows, hidden + pad_columns)
    whole = torch.randn(shape, dtype=torch.float64).to(dtype)
    if pad_rows:
        whole[:, inner:] = float("nan")
    if pad_columns:
        whole[..., hidden:] = float("nan")
    view = whole[:, :inner, :hidden]
    # Nothing after the last value may be touched: the allocation ends there.
    used = 1 + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)
    )
    storage = whole.flatten()[:used].clone()
    return Rows(storage, view, offset=dtype.itemsize if layout == "misaligned" else 0)


@dataclass
class Case:
    """One call of the kernel, ready to be written."""

    sources: list[Rows]
    query: Tensor
    key_weight: Tensor | None = None
    out_weight: Tensor | None = None
    eps: float = 1e-6
    out_eps: float = 1e-5
    scale: float = 1.0
    ring: str = "bulk"
    order: str = "forward"
    limits: Limits = field(default_factory=Limits)
    keep_mix: bool = True

    @property
    def tokens(self) -> tuple[int, int]:
        return tuple(self.sources[0].view.shape[:2])

    @property
    def num_tokens(self) -> int:
        return self.tokens[0] * self.tokens[1]

    @property
    def hidden(self) -> int:
        return self.sources[0].view.shape[2]

    @property
    def values(self) -> list[Tensor]:
        return [source.view for source in self.sources]

    @property
    def out_dtype(self) -> torch.dtype:
        dtype = self.sources[0].view.dtype
        for source in self.sources[1:]:
            dtype = torch.promote_types(dtype, source.view.dtype)
        return dtype

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.out_dtype == torch.float64 else torch.float32

    def output_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of out, mix, weights and stats."""
        count, tokens = len(self.sources), self.num_tokens
        mix = [((tokens, self.hidden), self.compute)] if self.keep_mix else [((0,), self.compute)]
        return [
            ((tokens, self.hidden), self.out_dtype),
            *mix,
            ((count, tokens), self.compute),
            ((2 * count + 1, tokens), self.compute),
        ]

    def encode(self, seed: int) -> bytes:
        """The bytes of the case in the order in which the runner takes them."""
        limits = self.limits
        parts = [
            struct.pack("=3q", RINGS[self.ring], ORDERS[self.order], seed),
            struct.pack(
                "=3q",
                limits.multiprocessors,
                limits.shared_per_multiprocessor,
                limits.shared_per_cta,
            ),
            struct.pack(
                "=4q", self.num_tokens, self.hidden, len(self.sources), DTYPES[self.compute]
            ),
            struct.pack("=3d", self.eps, self.out_eps, self.scale),
        ]
        for source in self.sources:
            outer, inner, _ = source.view.stride()
            parts.append(
                _tensor(source.storage, self.tokens[1], outer, inner, offset=source.offset)
            )
        for gain in (self.query, self.key_weight, self.out_weight):
            parts.append(_absent() if gain is None else _tensor(gain, 1, 0, 0))
        for shape, dtype in self.output_shapes():
            size = torch.Size(shape).numel() * dtype.itemsize
            header = (DTYPES[dtype], max(self.num_tokens, 1), 0, self.hidden, 0, size or -1)
            parts.append(struct.pack("=6q", *header))
        return b"".join(parts)


def _absent() -> bytes:
    return struct.pack("=6q", 0, 1, 0, 0, 0, -1)


def _tensor(
    data: Tensor, inner: int, outer_stride: int, inner_stride: int, offset: int = 0
) -> bytes:
    raw = bytes(data.contiguous().view(torch.uint8).numpy())
    header = (DTYPES[data.dtype], inner, outer_stride, inner_stride, offset, len(raw))
    return struct.pack("=6q", *header) + raw


@dataclass
class Result:
    """What a case's launch was, and its outputs."""

    uses_slots: bool
    resident: bool
    num_spans: int
    num_slots: int
    num_threads: int
    num_ctas: int
    shared_bytes: int
    out: Tensor
    mix: Tensor
    weights: Tensor
    stats: Tensor


def run(runner: Path, cases: list[Case], folder: Path) -> list[Result]:
    """Runs the cases in one process; fails with what the process said."""
    (folder / "cases").write_bytes(b"".join(case.encode(seed) for seed, case in enumerate(cases)))
    done = subprocess.run(
        [str(runner), str(folder / "cases"), str(folder / "results")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    data = (folder / "results").read_bytes()
    results = []
    position = 0
    for case in cases:
        report = struct.unpack_from("=7q", data, position)
        position += 7 * 8
        outputs = []
        for shape, dtype in case.output_shapes():
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.tensor(list(data[position : position + size]), dtype=torch.uint8)
            outputs.append(raw.view(dtype).reshape(shape))
            position += size
        results.append(Result(bool(report[0]), bool(report[1]), *report[2:], *outputs))
    assert position == len(data)
    return results
