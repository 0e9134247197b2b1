"""Memory: what is free, what plain PyTorch needs, and keeping freed pages in the process."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .registry import Case

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    if device.startswith("cuda"):
        # What torch has reserved and does not use is free, too.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def missing_memory(case: Case, device: str) -> str | None:
    """Why plain PyTorch cannot run ``case`` on this machine, or None."""
    # Float32 copies of all sources; forward holds about five of them at its peak, backward eight.
    copies = 8 if case.has_backward else 5
    # The reference attends once per query and autograd keeps what each left.
    if case.has_backward:
        copies *= case.queries
    needed = copies * case.sources * case.tokens * case.hidden * 4
    available = available_bytes(device)
    if available is not None and needed > 0.8 * available:
        return f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"
    return None


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that ``call`` held at once, beyond what was there before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler would otherwise announce itself on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(0, *itertools.accumulate(change for _, change in changes), 0)


#: By which a user makes the C library keep freed memory, or replaces its allocator.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")


def pages_kept(keep: bool) -> bool | None:
    """Whether freed memory stays in this process, which decides on many a figure of a CPU.

    Args:
        keep: whether to make the C library keep it.

    Returns:
        None where nobody knows: the environment has settings of its own.
    """
    if keep and keep_pages():
        return True
    return None if any(os.environ.get(name) for name in _SETTINGS) else False


def keep_pages() -> bool:
    """Makes the C library keep freed memory, so that results land on pages that are mapped already.

    By default glibc returns large blocks to the system and maps them anew: every call then pays
    page faults for its result, about as much time as the kernel's own traffic, whoever the
    baseline. GPUs (PyTorch's caching allocator) and servers (jemalloc, tcmalloc) do not work like
    that.

    Returns:
        Whether the C library obeyed; it stays so for the rest of the process.
    """
    if os.name != "posix":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
