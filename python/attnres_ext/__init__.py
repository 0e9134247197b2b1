"""Attention Residuals: compiled depth attention, block summation and cross-block caching for
PyTorch."""

from attnres_ext.cache import BlockCache
from attnres_ext.ops import (
    accumulate_depth_attention,
    depth_attention,
    inter_block_attention,
    merge_partial,
)
from attnres_ext.residual import AttentionResiduals
from attnres_ext.suspended import SuspendedPass
from attnres_ext.version import __version__

__all__ = [
    "AttentionResiduals",
    "BlockCache",
    "SuspendedPass",
    "__version__",
    "accumulate_depth_attention",
    "depth_attention",
    "inter_block_attention",
    "merge_partial",
]
