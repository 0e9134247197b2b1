"""Cases for the runner: tensors in awkward layouts, and what came back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import Runner

#: attnres::DType; what is absent has none, 0.
DTYPES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
RINGS = {"cp_async": 0, "bulk": 1}
ORDERS = {"forward": 0, "backward": 1, "random": 2}
#: Kinds of cases, in the order of the runner's functions.
KINDS = {
    name: number
    for number, name in enumerate(
        [
            "forward",
            "backward",
            "exchange",
            "inter_block_forward",
            "inter_block_backward",
            "matrices",
        ]
    )
}
OUTPUTS = ("out", "mix", "weights", "stats", "new_partial", "last_rstd")


@dataclass
class Limits:
    """What a pretended device has."""

    multiprocessors: int = 2
    shared_per_multiprocessor: int = 228 * 1024
    shared_per_cta: int = 227 * 1024
    #: CTAs; 1: no clusters. By default 8 on devices with an odd number of multiprocessors, else 16.
    largest_cluster: int | None = None


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


class Sources:
    """Sizes and dtypes of a case, as its ``sources`` have them."""

    sources: list[Rows]

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
    def out_dtype(self) -> torch.dtype:
        dtype = self.sources[0].view.dtype
        for source in self.sources[1:]:
            dtype = torch.promote_types(dtype, source.view.dtype)
        return dtype


@dataclass
class Case(Sources):
    """One call of the forward, ready to be written.

    With ``delta`` the last source is a partial sum (``absent_partial``: there is none, its rows are
    only what the sum looks like); ``in_place`` puts the sum where the partial was.
    """

    sources: list[Rows]
    query: Tensor | None
    key_weight: Tensor | None = None
    out_weight: Tensor | None = None
    eps: float = 1e-6
    out_eps: float = 1e-5
    scale: float = 1.0
    ring: str = "bulk"
    order: str = "forward"
    limits: Limits = field(default_factory=Limits)
    keep_mix: bool = True
    keep_stats: bool = True  # weights, too
    delta: Rows | None = None
    absent_partial: bool = False
    in_place: bool = False
    first_logit: Tensor | None = None
    known_rstd: Tensor | None = None
    attend: bool = True
    #: ATTNRES_CUDA_CONFIG: the general bodies, unless a test is about the tile.
    config: str = "depth_attention=rows,backward_depth_attention=rows"

    @property
    def values(self) -> list[Tensor]:
        """The rows that are scored and mixed."""
        values = [source.view for source in self.sources]
        if self.delta is not None:
            dtype = self.compute
            total = self.delta.view.to(dtype)
            if not self.absent_partial:
                total = total + values[-1].to(dtype)
            values[-1] = total.to(values[-1].dtype)
        return values

    @property
    def compute(self) -> torch.dtype:
        dtypes = [source.view.dtype for source in self.sources]
        dtypes += [] if self.delta is None else [self.delta.view.dtype]
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def output_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of out, mix, weights, stats, new_partial and last_rstd."""
        count, tokens = len(self.sources), self.num_tokens
        rows = (tokens, self.hidden)
        outputs = [
            (rows if self.attend else (0,), self.out_dtype),
            (rows if self.attend and self.keep_mix else (0,), self.compute),
            ((count, tokens) if self.keep_stats else (0,), self.compute),
            ((2 * count + 1, tokens) if self.keep_stats else (0,), self.compute),
            ((0,), self.sources[-1].view.dtype),
            ((0,), self.compute),
        ]
        if self.delta is not None:
            outputs[4] = (rows, self.sources[-1].view.dtype)
            outputs[5] = ((tokens,), self.compute)
        return outputs

    def encode_head(self, seed: int, kind: str) -> bytes:
        """How to run the case, and its sizes."""
        return encode_head(self, seed, kind, self.out_eps)

    def encode(self, seed: int) -> bytes:
        """The bytes of the case in the order in which the runner takes them."""
        known = 0 if self.known_rstd is None else len(self.known_rstd)
        parts = [self.encode_head(seed, "forward"), struct.pack("=2q", known, self.in_place)]
        parts.append(encode_config(self.config))
        parts += [encode_rows(source) for source in self.sources]
        if self.absent_partial:
            parts[-1] = encode_absent()
        for vector in (self.query, self.key_weight, self.out_weight):
            parts.append(encode_absent() if vector is None else encode_tensor(vector, 1, 0, 0))
        parts.append(encode_absent() if self.delta is None else encode_rows(self.delta))
        for vector in (self.first_logit, self.known_rstd):
            parts.append(encode_absent() if vector is None else encode_tensor(vector, 1, 0, 0))
        parts += [encode_output(shape, dtype, self.hidden) for shape, dtype in self.output_shapes()]
        return b"".join(parts)


def encode_head(case: Any, seed: int, kind: str, out_eps: float = 0.0) -> bytes:
    """How to run a case of one of the ``KINDS``, and its sizes."""
    limits = case.limits
    return b"".join(
        [
            struct.pack("=4q", KINDS[kind], RINGS[case.ring], ORDERS[case.order], seed),
            struct.pack(
                "=4q",
                limits.multiprocessors,
                limits.shared_per_multiprocessor,
                limits.shared_per_cta,
                limits.largest_cluster or (8 if limits.multiprocessors % 2 else 16),
            ),
            struct.pack(
                "=4q", case.num_tokens, case.hidden, len(case.sources), DTYPES[case.compute]
            ),
            struct.pack("=3d", case.eps, out_eps, case.scale),
        ]
    )


def encode_config(config: str) -> bytes:
    """What the environment asks for."""
    text = config.encode()
    return struct.pack("=q", len(text)) + text


def encode_absent() -> bytes:
    """A tensor that is not there: it has no dtype."""
    return struct.pack("=6q", 0, 1, 0, 0, 0, -1)


def encode_rows(rows: Rows) -> bytes:
    """Rows with their strides, offset and storage."""
    outer, inner, _ = rows.view.stride()
    return encode_tensor(rows.storage, rows.view.shape[1], outer, inner, offset=rows.offset)


def encode_tensor(
    data: Tensor, inner: int, outer_stride: int, inner_stride: int, offset: int = 0
) -> bytes:
    """A tensor of any shape, contiguous in its storage."""
    raw = bytes(data.contiguous().view(torch.uint8).numpy())
    header = (DTYPES[data.dtype], inner, outer_stride, inner_stride, offset, len(raw))
    return struct.pack("=6q", *header) + raw


def encode_output(
    shape: tuple[int, ...], dtype: torch.dtype, hidden: int, offset: int = 0
) -> bytes:
    """An output of contiguous rows; one of no elements is absent."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return encode_absent()
    return struct.pack("=6q", DTYPES[dtype], 1 << 40, 0, hidden, offset, size)


@dataclass
class Launched:
    """What a case's launch was."""

    uses_slots: bool
    resident: bool
    num_spans: int
    num_slots: int
    num_threads: int
    num_ctas: int
    shared_bytes: int
    cluster_size: int
    warps: int
    columns: int
    matrices: int
    wavefronts: int


@dataclass
class Result(Launched):
    """What a forward's launch was, and its outputs."""

    out: Tensor
    mix: Tensor
    weights: Tensor
    stats: Tensor
    new_partial: Tensor
    last_rstd: Tensor


def run_cases(
    runner: Runner, cases: Sequence[Any], folder: Path
) -> list[tuple[Launched, list[Tensor]]]:
    """Runs the cases in one process; fails with what the process said."""
    (folder / "cases").write_bytes(b"".join(case.encode(seed) for seed, case in enumerate(cases)))
    (folder / "printed").write_text(runner(folder / "cases", folder / "results"))
    data = bytearray((folder / "results").read_bytes())
    results = []
    position = 0
    for case in cases:
        report = struct.unpack_from("=12q", data, position)
        position += 12 * 8
        outputs = []
        for shape, dtype in case.output_shapes():
            count = torch.Size(shape).numel()
            if count == 0:
                outputs.append(torch.empty(shape, dtype=dtype))
                continue
            outputs.append(
                torch.frombuffer(data, dtype=dtype, count=count, offset=position)
                .clone()
                .reshape(shape)
            )
            position += count * dtype.itemsize
        results.append((Launched(bool(report[0]), bool(report[1]), *report[2:]), outputs))
    assert position == len(data)
    return results


def run(runner: Runner, cases: Sequence[Case], folder: Path) -> list[Result]:
    """Runs forwards."""
    return [
        Result(**vars(launched), **dict(zip(OUTPUTS, outputs, strict=True)))
        for launched, outputs in run_cases(runner, cases, folder)
    ]
