"""Cases of phase 1 for the runner, and what they should give."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from attnres_ext import reference

from .build import Runner
from .cases import (
    Launched,
    Limits,
    Rows,
    Sources,
    encode_absent,
    encode_config,
    encode_head,
    encode_output,
    encode_rows,
    encode_tensor,
    rows,
    run_cases,
)


@dataclass
class InterBlock(Sources):
    """One call of phase 1's forward: S queries against N sources."""

    sources: list[Rows]
    queries: Rows
    key_weights: Rows | None = None
    eps: float = 1e-6
    scale: float = 1.0
    ring: str = "bulk"
    order: str = "forward"
    limits: Limits = field(default_factory=Limits)
    known_rstd: Tensor | None = None
    save_stats: bool = True
    #: ATTNRES_CUDA_CONFIG; the general body, unless a case is about the tile.
    config: str = "inter_block_attention=rows,backward_inter_block_attention=rows"

    @property
    def num_queries(self) -> int:
        return self.queries.view.shape[1]

    @property
    def compute(self) -> torch.dtype:
        dtypes = [source.view.dtype for source in self.sources]
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def output_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of out, lse and stats."""
        count, queries, tokens = len(self.sources), self.num_queries, self.num_tokens
        stats = (count + queries * count, tokens) if self.save_stats else (0,)
        return [
            ((queries, tokens, self.hidden), self.out_dtype),
            ((queries, tokens), self.compute),
            (stats, self.compute),
        ]

    def encode_inputs(self) -> bytes:
        """Sources, queries and gains."""
        parts = [encode_rows(source) for source in self.sources]
        parts.append(encode_rows(self.queries))
        parts.append(encode_absent() if self.key_weights is None else encode_rows(self.key_weights))
        return b"".join(parts)

    def encode(self, seed: int) -> bytes:
        """The bytes of the case in the order in which the runner takes them."""
        parts = [encode_head(self, seed, "inter_block_forward")]
        parts += [struct.pack("=q", self.num_queries), encode_config(self.config)]
        parts.append(self.encode_inputs())
        known = self.known_rstd
        parts.append(encode_absent() if known is None else encode_tensor(known, 1, 0, 0))
        parts += [encode_output(shape, dtype, self.hidden) for shape, dtype in self.output_shapes()]
        return b"".join(parts)


@dataclass
class InterBlockResult(Launched):
    """What a launch was, and its outputs."""

    out: Tensor
    lse: Tensor
    stats: Tensor


def make(
    count: int,
    queries: int,
    hidden: int,
    dtypes: torch.dtype | list[torch.dtype] = torch.bfloat16,
    *,
    tokens: tuple[int, int] = (2, 3),
    layouts: str | list[str] = "contiguous",
    query_layout: str = "contiguous",
    gains: bool = True,
    gain_dtype: torch.dtype = torch.float32,
    **options: object,
) -> InterBlock:
    """A case whose sources take their dtypes and layouts from the lists in turn."""
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
    layouts = layouts if isinstance(layouts, list) else [layouts]
    options.setdefault("scale", 2 / hidden**0.5)
    return InterBlock(
        sources=[
            rows(tokens, hidden, dtype, layout)
            for _, dtype, layout in zip(
                range(count), itertools.cycle(dtypes), itertools.cycle(layouts), strict=False
            )
        ],
        queries=rows((1, queries), hidden, gain_dtype, query_layout),
        key_weights=rows((1, queries), hidden, gain_dtype) if gains else None,
        **options,  # type: ignore[arg-type]
    )


def definition(case: InterBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output by the reference, in ``dtype``; ``logits`` besides."""
    values = torch.stack([v.view.to(dtype).reshape(-1, case.hidden) for v in case.sources])
    rstd = torch.rsqrt(values.square().mean(-1) + case.eps)
    logits = []
    for s in range(case.num_queries):
        gain = None if case.key_weights is None else case.key_weights.view[0, s].to(dtype)
        query = case.queries.view[0, s].to(dtype)
        logits.append(reference.logits(values, query, gain, case.eps, case.scale))
    scores = torch.stack(logits)  # [S, N, M]
    if case.known_rstd is not None:
        scores = scores * (case.known_rstd.to(dtype) / rstd)
        rstd = case.known_rstd.to(dtype)
    out = torch.einsum("snm,nmd->smd", torch.softmax(scores, 1), values)
    stats = torch.cat([rstd, scores.flatten(0, 1)])
    return {
        "out": out,
        "lse": torch.logsumexp(scores, 1),
        "stats": stats if case.save_stats else stats[:0].flatten(),
        "logits": scores,
    }


def check(case: InterBlock, result: InterBlockResult) -> None:
    """Within twice the error of plain PyTorch in the compute dtype plus one rounding."""
    exact = definition(case, torch.float64)
    plain = definition(case, case.compute)
    # Sums in another order, and a rounding of a logit, which is a relative error of its weight.
    roundings = 8 + exact["logits"].abs().max()
    for name in ("out", "lse", "stats"):
        got, want = getattr(result, name), exact[name]
        if got.numel() == 0:
            continue
        assert got.isfinite().all(), f"{name} holds NaN or infinity"
        error = (got.double() - want).abs().max()
        order = roundings * torch.finfo(case.compute).eps * want.abs().max()
        rounding = torch.finfo(got.dtype).eps / 2 * want.abs().max()
        if case.compute == torch.float64:
            allowed = 64 * order + rounding
        else:
            allowed = 2 * (plain[name].double() - want).abs().max() + rounding + order
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run(runner: Runner, cases: list[InterBlock], folder: Path) -> list[InterBlockResult]:
    """Runs forwards."""
    return [
        InterBlockResult(
            **vars(launched), **dict(zip(("out", "lse", "stats"), outputs, strict=True))
        )
        for launched, outputs in run_cases(runner, cases, folder)
    ]


def run_and_check(runner: Runner, cases: list[InterBlock], folder: Path) -> list[InterBlockResult]:
    """Runs forwards and compares them with the definition."""
    results = run(runner, cases, folder)
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        try:
            check(case, result)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from None
    return results
