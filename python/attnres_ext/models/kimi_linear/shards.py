"""Parameters that are spread over processes (DTensors), read and filled like any others."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gathered", "is_shard", "share_of"]


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is spread over processes."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of ``tensor``, if it is a shard; then every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(values: Tensor, tensor: Tensor) -> Tensor:
    """What of ``values`` belongs to this process's shard ``tensor``; all, if it is no shard."""
    if not isinstance(tensor, DTensor):
        return values
    # Every process has all values already: none is sent.
    return distribute_tensor(
        values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
    )
