"""The yardstick: what ``dst.copy_(src)`` reaches here and now.

A kernel that does nothing but move its bytes takes as long as a copy of as many bytes. So each case
gets a copy of its own: source and destination are half of the case's bytes each, and the copy takes
turns with the baselines. (One figure for the machine would not do: a copy that fits into a cache
is several times faster than one that does not.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .timing import Action, Effort, Timer, Timing, measure

#: Sizes of the buffers in `ladder`, in MiB.
LADDER = (1, 8, 32, 128, 256)
#: Rows and columns of the matrices in `matrix_rates`.
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}


def copy_action(num_bytes: int, sets: int = 1, device: str = "cpu") -> Action:
    """A copy that reads and writes ``num_bytes`` in all, over ``sets`` pairs of buffers."""
    count = max(1, num_bytes // 2 // torch.float32.itemsize)
    pairs = [
        (torch.rand(count, device=device), torch.zeros(count, device=device)) for _ in range(sets)
    ]

    def run(call: int) -> None:
        source, destination = pairs[call % sets]
        destination.copy_(source)

    return Action(run, period=sets)


def ladder(
    effort: Effort, device: str = "cpu", timer: Timer | None = None
) -> dict[int, tuple[float, Timing]]:
    """GB/s, bytes read and bytes written, of copies between buffers of the sizes in `LADDER`."""
    result = {}
    for size in LADDER:
        num_bytes = 2 * size * 2**20
        timing = measure({"copy": copy_action(num_bytes, device=device)}, effort, timer)["copy"]
        result[size] = (num_bytes / timing.median / 1e9, timing)
    return result


def matrix_rates(
    effort: Effort, device: str = "cpu", timer: Timer | None = None
) -> dict[str, float]:
    """TFLOP/s of a large product of square matrices, by dtype: the ceiling of phase 1's products.

    On the CPU in float32 alone: what it does with other dtypes says little about its limits.
    """
    on_gpu = device.startswith("cuda")
    size = MATRIX_SIZES["cuda" if on_gpu else "cpu"]
    rates = {}
    for name in ("bfloat16", "float16") if on_gpu else ("float32",):
        # Zeros would run faster than data does: they cost less power.
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        product = torch.empty_like(a)

        def run(call: int, a: Tensor = a, b: Tensor = b, product: Tensor = product) -> None:
            torch.mm(a, b, out=product)

        timing = measure({"product": Action(run, context=torch.no_grad)}, effort, timer)["product"]
        rates[name] = 2 * size**3 / timing.median / 1e12
    return rates
