"""Every way in which a kernel is launched on a GPU of compute capability 9.0: by what its rows are
read, how many CTAs share one, and what its elements are.

tests/simt/test_ways.py holds it against what the launchers do with the limits of an H100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


#: ATTNRES_CUDA_CONFIG for the general bodies, where there are tensor-core tiles.
ROWS = "depth_attention=rows,backward_depth_attention=rows,inter_block_attention=rows"

#: One more than an H100 has multiprocessors.
MANY_TOKENS = 133


@dataclass(frozen=True)
class Way:
    """A shape that takes one way.

    Attributes:
        name: of the way, for people.
        sources: N.
        hidden: D.
        dtypes: of the sources, in turn.
        queries: S of phase 1.
        tokens: on a GPU. Elsewhere two are enough where rows are long, and where they are short as
            many as are not few for any GPU.
        cluster: CTAs that share a row forward; None for a kernel that knows no clusters.
        cluster_backward: the same of the backward.
        in_place: whether rows are read where they are instead of through shared memory.
        resident: whether a row is read once.
        tile: warps and columns of the tensor-core tile of the forward; None where the general body
            is asked for, which serves everything.
    """

    name: str
    sources: int
    hidden: int
    dtypes: tuple[torch.dtype, ...]
    queries: int = 1
    tokens: int = 5
    cluster: int | None = None
    cluster_backward: int | None = None
    in_place: bool = False
    resident: bool = True
    tile: tuple[int, int] | None = None

    @property
    def config(self) -> str:
        """ATTNRES_CUDA_CONFIG."""
        return "" if self.tile else ROWS

    def tokens_on(self, device: str) -> int:
        """M."""
        if device == "cuda":
            return self.tokens
        return min(self.tokens, 2 if self.hidden > 1000 or self.queries > 1 else MANY_TOKENS)


DEPTH = [
    Way("in place", 4, 67, (BF16,), in_place=True),
    Way("in place, float64", 4, 67, (FP64,), in_place=True),
    Way("in place, two spans", 2, 4001, (FP32,), in_place=True),
    Way("ring, few tokens, bfloat16", 4, 256, (BF16,), cluster=1),
    Way("ring, few tokens, float32", 4, 256, (FP32,), cluster=1),
    Way("ring, bfloat16", 4, 256, (BF16,), tokens=300),
    Way("ring, float16", 4, 256, (FP16,), tokens=300),
    Way("ring, float32", 4, 256, (FP32,), tokens=300),
    Way("ring, mixed dtypes", 4, 256, (BF16, FP32), tokens=300),
    Way("ring, many sources", 20, 256, (BF16,), tokens=300),
    Way("ring, more rows than CTAs", 3, 72, (BF16,), tokens=3000),
    Way("ring, long rows", 2, 7688, (BF16,), tokens=2, cluster_backward=2),
    Way("cluster, few tokens, bfloat16", 9, 7168, (BF16,), tokens=2, cluster=8),
    Way("cluster, few tokens, float16", 9, 7168, (FP16,), tokens=2, cluster=8),
    Way("cluster, few tokens, float32", 4, 4096, (FP32,), tokens=2, cluster=8),
    Way("cluster, few tokens, mixed dtypes", 5, 4096, (BF16, FP32), tokens=2, cluster=8),
    Way("cluster, few tokens, many sources", 20, 4096, (BF16,), tokens=2, cluster=8),
    Way("cluster, large rows", 54, 7168, (BF16,), tokens=40, cluster=8, cluster_backward=8),
    Way(
        "cluster, rows read twice", 130, 7168, (BF16,), tokens=2, cluster=8, cluster_backward=8,
        resident=False,
    ),
    Way("tile, bfloat16", 4, 256, (BF16,), tokens=300, tile=(2, 128)),
    Way("tile, float16", 4, 256, (FP16,), tokens=300, tile=(2, 128)),
    Way("tile, one token", 9, 2304, (BF16,), tokens=1, tile=(12, 192)),
    Way("tile, more rows than CTAs", 3, 72, (BF16,), tokens=3000, tile=(2, 64)),
    Way("tile, columns to spare", 10, 1000, (FP16,), tokens=300, tile=(8, 128)),
    Way("tile, cluster of 2", 9, 7168, (BF16,), tokens=300, cluster=2, tile=(14, 256)),
    Way("tile, cluster of 4, many sources", 54, 2304, (FP16,), tokens=300, cluster=4, tile=(9, 64)),
]  # fmt: skip

PHASE_ONE = [
    Way("in place", 4, 67, (BF16,), 3, in_place=True),
    Way("in place, float64", 4, 67, (FP64,), 3, in_place=True),
    Way("tensor cores, bfloat16", 4, 256, (BF16,), 3, tokens=300),
    Way("tensor cores, float16", 4, 256, (FP16,), 3, tokens=300),
    Way("tensor cores, many sources", 20, 256, (BF16,), 3, tokens=300),
    Way("arithmetic, float32", 4, 256, (FP32,), 3, tokens=300),
    Way("arithmetic, mixed dtypes", 4, 256, (BF16, FP32), 3, tokens=300),
    Way("tensor cores, Kimi Linear 48B", 9, 2304, (BF16,), 6, tokens=300, cluster_backward=2),
    Way("tensor cores, cluster", 8, 4096, (FP16,), 16, tokens=300, cluster=2, cluster_backward=8),
    Way("tensor cores, Kimi K3", 8, 7168, (BF16,), 24, tokens=300, cluster=8, cluster_backward=16),
    Way("arithmetic, cluster", 8, 4096, (FP32,), 16, tokens=40, cluster=4, cluster_backward=8),
    Way("tile, two tokens to a stage", 4, 256, (FP16,), 3, tokens=301, tile=(2, 128)),
    Way("tile, Kimi Linear 48B", 9, 2304, (BF16,), 6, tokens=300, tile=(12, 192)),
    Way("tile, cluster", 8, 4096, (FP16,), 16, tokens=300, cluster=4, tile=(5, 224)),
    Way("tile, Kimi K3", 8, 7168, (BF16,), 24, tokens=300, cluster=8, tile=(4, 224)),
]
