"""What a forward pass keeps so that activation checkpointing can read again.

``torch.utils.checkpoint`` (``use_reentrant=False``) runs a function a second time during the
backward pass, for the tensors that autograd would have saved the first time. A function that reads
from a residual state then reads sites that the state has left behind. For this the first read under
a checkpoint keeps a :class:`Snapshot`: the blocks, which are kept anyway, and the sum it read last,
one tensor of the size of the residual stream, that a standard residual would keep in its place.

A snapshot belongs to the autograd node of its read: it travels in what the node saves, past the
checkpoint, and is freed when the engine frees the node, so that memory falls as the backward pass
goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext.torch_internals import WithoutModes, records_selectively

if TYPE_CHECKING:
    from attnres_ext.phase_one import PhaseOneResults

__all__ = ["Region", "Snapshot", "keep", "unseen", "unselected"]


class Region:
    """A stretch of a forward pass whose saved tensors go through the same hooks.

    Every call of a checkpointed function, the first and each recomputation, has hooks of its own:
    whose hooks are in force says in which of them one is.
    """

    __slots__ = ("_hook",)

    def __init__(self, hook: Callable) -> None:
        # The hook keeps the checkpointed function alive, and that often the state.
        self._hook = weakref.ref(hook)

    def contains(self, hook: Callable | None) -> bool:
        """Whether the hook in force is this region's."""
        return hook is not None and self._hook() is hook


class Snapshot:
    """What the first read under a checkpoint needs to be repeated.

    Attributes:
        blocks: Finished blocks before the read, detached.
        needs: Which of them require a gradient.
        randomness: Where the device's generator stood before the read.
        phase: Results of phase 1 for the block that the site belongs to; None in a single pass.
        value: The last source of the read, detached: the running sum with what was written before
            the read, or the block that this closed.
        value_needs: Whether it requires a gradient.
        hidden_needs: Whether what was read does.
    """

    __slots__ = (
        "__weakref__", "blocks", "hidden_needs", "needs", "phase", "randomness", "value",
        "value_needs",
    )  # fmt: skip

    def __init__(self, blocks: Sequence[Tensor], randomness: Tensor | None) -> None:
        self.randomness = randomness
        self.blocks = [block.detach() for block in blocks]
        self.needs = [block.requires_grad for block in blocks]
        self.phase: PhaseOneResults | None = None
        self.value: Tensor | None = None
        self.value_needs = self.hidden_needs = False

    def complete(self, hidden: Tensor, value: Tensor, phase: PhaseOneResults | None) -> None:
        """Notes what was read."""
        # Detached: the snapshot is held by the node that made `value`.
        self.value, self.phase = value.detach(), phase
        self.value_needs, self.hidden_needs = value.requires_grad, hidden.requires_grad


def keep(owned: object | None) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, saved tensors are kept as they are whatever hooks are in force outside, and ``owned``
    lives as long as they."""
    # Detached: what a node saves of its own results must not lead back to it. Autograd connects
    # what is unpacked to the graph again.
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.detach(), owned), lambda packed: packed[0]
    )


def unseen() -> AbstractContextManager:
    """Inside, operators are called behind the back of dispatch modes.

    Selective checkpointing counts operators and pairs those of a repetition with the first ones: it
    must not see what is done in one of them alone.
    """
    return WithoutModes()


def unselected() -> AbstractContextManager:
    """:func:`unseen`, if selective checkpointing is recording what it sees."""
    return unseen() if records_selectively() else nullcontext()
