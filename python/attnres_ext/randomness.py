"""The same random numbers when a stretch of a forward pass is repeated.

``torch.utils.checkpoint`` brings back the CPU's generator, and those of the devices on which it
finds a tensor among the function's positional arguments. A stretch that reads from a residual state
may need none: where the state is an argument it is one for torch, too, a tree whose only leaf lies
on the state's device; where the function has it from elsewhere, by keyword or in a closure, the
first read of the stretch notes where the generator stands, and its repetition goes back there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_ext.recomputation import unseen
from attnres_ext.torch_internals import at_end_of_backward, backward_pass, register_pytree_node

__all__ = ["go_back_to", "register_as_argument", "where_it_stands"]

#: Where generators stood, by backward pass and device, before that pass moved them.
_before: dict[tuple[int, torch.device], Tensor] = {}


def where_it_stands(device: torch.device) -> Tensor | None:
    """The state of the generator of ``device``; None where there is none, or while a CUDA graph is
    captured, when it cannot be asked for."""
    generator = _generator(device)
    return None if generator is None else generator.get_state()


def go_back_to(device: torch.device, state: Tensor | None) -> None:
    """From here on ``device`` draws what it drew after ``state``; at the end of the backward pass
    under way it goes on where it is now."""
    generator = _generator(device)
    if state is None or generator is None:
        return
    now, task = generator.get_state(), backward_pass()
    with unseen():
        if torch.equal(now, state):
            return  # torch has brought it back, or nothing was drawn
    if task != -1 and (task, device) not in _before:
        _before[task, device] = now
        at_end_of_backward(lambda: generator.set_state(_before.pop((task, device))))
    generator.set_state(state)


def register_as_argument(kind: type) -> None:
    """Makes torch see on which device an argument of the class ``kind`` is: its ``_device``, which
    is None before anything was written."""
    register_pytree_node(
        kind,
        lambda state: (
            [] if state._device is None else [torch.empty(0, device=state._device)],
            state,
        ),
        lambda leaves, state: state,
    )


def _generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.cuda.default_generators[device.index]
    return None
