"""The matrices of the model."""

from __future__ import annotations

from torch import nn

__all__ = ["Linear"]


class Linear(nn.Linear):
    """A bias-free ``nn.Linear`` whose values are left to the model.

    All matrices of Kimi Linear start from one normal distribution: drawing PyTorch's default first
    would cost as much again, and the 48B model has twenty thousand matrices.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: see ``KimiLinearForCausalLM.reset_parameters``."""
