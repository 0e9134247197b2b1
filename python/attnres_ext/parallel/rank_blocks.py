"""What one rank keeps of the microbatches under way."""

from __future__ import annotations

from torch import Tensor

__all__ = ["RankBlocks"]


class RankBlocks:
    """Blocks that later stages of a rank take from earlier ones, and gradients that travel back
    between them.

    The stages of a rank share it. Everything is kept for one microbatch and goes with it.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], tuple[Tensor, bool]] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}

    def keep(self, microbatch: int, block: int, value: Tensor) -> None:
        """Keeps a block ``[..., D]``; its memory, not the graph that it is part of."""
        self._values[microbatch, block] = value.detach(), value.requires_grad

    def leaf(self, microbatch: int, block: int) -> Tensor:
        """A kept block as a leaf of another graph."""
        value, needs_gradient = self._values[microbatch, block]
        return value.detach().requires_grad_(needs_gradient)

    def drop(self, microbatch: int, block: int) -> None:
        """Gives up a block; graphs that it is part of go on."""
        self._values.pop((microbatch, block), None)

    def leave_gradient(self, microbatch: int, block: int, gradient: Tensor) -> None:
        """Leaves a block's gradient for an earlier stage."""
        self._gradients[microbatch, block] = gradient

    def take_gradient(self, microbatch: int, block: int) -> Tensor | None:
        """What a later stage left, if any did."""
        return self._gradients.pop((microbatch, block), None)

    def clear(self, microbatch: int | None = None) -> None:
        """Gives up everything, or what is left of one microbatch."""
        for kept in (self._values, self._gradients):
            for key in [key for key in kept if microbatch in (None, key[0])]:
                del kept[key]

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._values)
