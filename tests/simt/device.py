"""The simulated GPU: the operators' real library, its kernels run on the CPU by the executor.

Tensors lie in host memory, so a test's ``device`` is "cpu"; whatever an operator does with them is
what it does on a GPU: checks, allocations, parameters, the choice of kernel and its launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .build import build_library, missing

__all__ = ["DEVICES", "Device", "Launched", "Simulator", "load", "missing"]

ORDERS = ("forward", "backward", "random")


@dataclass(frozen=True)
class Device:
    """What a simulated GPU is. Memory in bytes; clusters with opt-in, 0 for none."""

    capability: int
    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_cta: int
    most_ctas_in_cluster: int = 0


@dataclass(frozen=True)
class Launched:
    """A launch: see ``simt::Launched``."""

    num_ctas: int
    num_threads: int
    shared_bytes: int
    cluster_size: int
    starts_early: bool
    uses_slots: bool
    num_slots: int
    num_spans: int
    resident: bool
    warps: int
    columns: int
    kernel: str


#: By the names that ``--simulate`` takes. "small" has the least shared memory of all, and so
#: few multiprocessors that tokens are many.
DEVICES = {
    "h100": Device(90, 132, 228 << 10, 227 << 10, 16),
    "a100": Device(80, 108, 164 << 10, 163 << 10),
    "small": Device(120, 3, 100 << 10, 99 << 10, 8),
}


_READ = {"int": int, "bool": lambda word: word == "1", "str": str}


class _DeviceFacts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "capability",
            "multiprocessors",
            "shared_per_multiprocessor",
            "shared_per_cta",
            "most_ctas_in_cluster",
        )
    ]


class Simulator:
    """The loaded library."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.simt_launches.restype = ctypes.c_char_p
        self._now: tuple[Any, ...] = ()

    def use(self, device: Device, order: str = "random", seed: int = 0) -> None:
        """Operators run on this device from now on, its threads in this order."""
        facts = _DeviceFacts(*vars(device).values())
        self._library.simt_use(
            ctypes.byref(facts), ctypes.c_int64(ORDERS.index(order)), ctypes.c_uint64(seed)
        )
        self._now = (device, order, seed)

    @contextmanager
    def using(self, device: Device, order: str = "random", seed: int = 0) -> Iterator[None]:
        """The same for a while."""
        before = self._now
        self.use(device, order, seed)
        yield
        self.use(*before)

    def launches(self) -> list[Launched]:
        """What was launched since it was asked last."""
        found = []
        for line in self._library.simt_launches().decode().splitlines():
            words = line.split(" ", 11)
            kinds = Launched.__annotations__.values()
            found.append(Launched(*(_READ[kind](w) for kind, w in zip(kinds, words, strict=True))))
        return found


def load() -> Simulator:
    """Puts the simulated GPU in the place of the operators' library, before that is loaded."""
    path = build_library()
    really_load = torch.ops.load_library

    def load_simulated(_: str) -> None:
        really_load(str(path))

    torch.ops.load_library = load_simulated
    try:
        import attnres_ext._native  # noqa: F401
    finally:
        torch.ops.load_library = really_load
    return Simulator(path)
