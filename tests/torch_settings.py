"""What a process may set torch to, as it pleases, and a library must neither lean on nor change."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _PassingOn(TorchFunctionMode):
    """Calls what it is told to call."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def _set(setter: Callable, value: object, default: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(default)


#: By name, how to make a context that sets it.
SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    # Stands for any device that the tensors at hand are not on.
    "device": lambda: _set(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "function mode": _PassingOn,
}


def state() -> tuple:
    """What all of it is set to just now, and where the default generator is."""
    return (
        torch.get_default_device(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
    )  # fmt: skip
