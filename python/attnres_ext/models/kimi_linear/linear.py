"""The matrices and norms of the model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "RMSNorm"]


class Linear(nn.Linear):
    """A bias-free ``nn.Linear`` whose values are left to the model.

    All matrices of Kimi Linear start from one normal distribution: drawing PyTorch's default first
    would cost as much again, and the 48B model has twenty thousand matrices.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: see ``KimiLinearForCausalLM.reset_parameters``."""


class RMSNorm(nn.RMSNorm):
    """An ``nn.RMSNorm`` that returns its input's dtype, whatever that of its gain.

    Under autocast a norm's input is narrower than its gain; PyTorch then takes a slow path, and
    returns the wider dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
