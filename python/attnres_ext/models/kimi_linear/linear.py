"""The matrices and norms of the model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "RMSNorm"]


class Linear(nn.Linear):
    """A bias-free ``nn.Linear`` that starts from a normal distribution.

    It is made empty, and filled with the whole model: drawing PyTorch's default first would cost as
    much again, and the 48B model has twenty thousand matrices.

    Args:
        in_features: Columns.
        out_features: Rows.
        deviation: Standard deviation of what it starts from.
    """

    def __init__(self, in_features: int, out_features: int, deviation: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.deviation = deviation

    def reset_parameters(self) -> None:
        """Draws the matrix from N(0, deviation)."""
        if hasattr(self, "deviation"):  # nn.Linear calls this while it makes the matrix
            nn.init.normal_(self.weight, std=self.deviation)


class RMSNorm(nn.RMSNorm):
    """An ``nn.RMSNorm`` that returns its input's dtype, whatever that of its gain.

    Under autocast a norm's input is narrower than its gain; PyTorch then takes a slow path, and
    returns the wider dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
