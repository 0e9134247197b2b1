"""Counts the activations that a forward pass keeps for its backward, and writes them as a table.

``python tools/training_memory.py`` renders the table in docs/training-memory.md anew, ``--check``
fails if it is out of date. Bytes are those of tensors alive after a forward: the same on every
machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attnres_ext import AttentionResiduals

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "training-memory.md"

#: Kimi Linear 48B: 27 layers of two sublayers, blocks of three layers.
HIDDEN, SUBLAYERS, BLOCK = 2304, 54, 6
DTYPE = torch.bfloat16
#: The difference between two numbers of tokens is what is kept for tokens, and not for parameters.
TOKENS = (2, 4)

again = partial(checkpoint, use_reentrant=False)


class KeptBytes(TorchDispatchMode):
    """Collects the memory of all tensors made inside, but for views of ``given``.

    Some of it is freed again.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._given = given.untyped_storage().data_ptr()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() == self._given:
                    continue
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        return result

    def live(self) -> int:
        """Bytes that are still there."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())


class FusedNorm(torch.autograd.Function):
    """An RMSNorm that keeps its input and 1/rms, as fused ones do on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor) -> Tensor:  # noqa: D102
        wide = x.float()
        rstd = wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x, gain, rstd)
        return (wide * rstd).to(x.dtype) * gain


def sublayer(hidden: Tensor) -> Tensor:
    """Keeps its input, as a matrix product would."""
    return hidden.sin()


def plain(recompute: str, embedding: Tensor) -> Tensor:
    """``x + f(norm(x))`` in plain PyTorch."""
    gains = [nn.Parameter(torch.ones(HIDDEN, dtype=DTYPE)) for _ in range(SUBLAYERS + 1)]

    def site(index: int, x: Tensor, wrap: Callable) -> Tensor:
        return x + wrap(sublayer, FusedNorm.apply(x, gains[index]))

    def stretch(first: int, last: int, x: Tensor) -> Tensor:
        for index in range(first, last):
            x = site(index, x, lambda function, h: function(h))
        return x

    x = embedding
    length = {"sites": 1, "layers": 2}.get(recompute)
    if length:
        for first in range(0, SUBLAYERS, length):
            x = again(stretch, first, first + length, x)
    else:
        for index in range(SUBLAYERS):
            wrap = again if recompute == "sublayers" else lambda function, h: function(h)
            x = site(index, x, wrap)
    return FusedNorm.apply(x, gains[-1])


def read_and_write(residual: AttentionResiduals, recompute: str, embedding: Tensor) -> Tensor:
    """The same through ``AttentionResiduals``."""
    gains = [nn.Parameter(torch.ones(HIDDEN, dtype=DTYPE)) for _ in range(SUBLAYERS + 1)]
    state = residual.start(embedding)

    def stretch(first: int, last: int) -> None:
        for index in range(first, last):
            state.write(sublayer(state.read(index, gains[index])))

    length = {"sites": 1, "layers": 2}.get(recompute)
    if length:
        for first in range(0, SUBLAYERS, length):
            again(stretch, first, first + length)
    else:
        wrap = again if recompute == "sublayers" else lambda function, h: function(h)
        for index in range(SUBLAYERS):
            state.write(wrap(sublayer, state.read(index, gains[index])))
    return state.read_output(gains[-1])


def connections() -> dict[str, Callable[[str, Tensor], Tensor]]:
    """Every way to connect sublayers, by the table's names."""

    def ours(**options) -> Callable[[str, Tensor], Tensor]:
        return partial(read_and_write, AttentionResiduals(HIDDEN, SUBLAYERS, **options))

    block = {"sublayers_per_block": BLOCK}
    return {
        "`x + f(norm(x))`": plain,
        '`mode="standard"`': ours(mode="standard"),
        **{
            f'block, single pass, `save="{save}"`': ours(**block, two_phase=False, save=save)
            for save in ("nothing", "stats", "output")
        },
        **{
            f'block, two phases, `save="{save}"`': ours(**block, two_phase=True, save=save)
            for save in ("nothing", "stats")
        },
        'full, `save="nothing"`': ours(mode="full", save="nothing"),
        "full": ours(mode="full"),
    }


RECOMPUTED = {
    "nothing": "nothing",
    "sublayers": "each sublayer",
    "sites": "each sublayer with its read",
    "layers": "each layer of two",
}


def kept(connection: Callable[[str, Tensor], Tensor], recompute: str) -> int:
    """Bytes that a forward keeps for each token, without the embedding and the result."""

    def total(tokens: int) -> int:
        embedding = torch.randn(tokens, HIDDEN).to(DTYPE).requires_grad_()
        with KeptBytes(embedding) as counter:
            out = connection(recompute, embedding)
        return counter.live() - out.untyped_storage().nbytes()

    few, many = TOKENS
    return (total(many) - total(few)) // (many - few)


def rows() -> list[str]:
    """The table: tensors of the residual stream's size per sublayer."""
    unit = SUBLAYERS * HIDDEN * DTYPE.itemsize
    lines = [
        "| connection | " + " | ".join(RECOMPUTED.values()) + " |",
        "|---|" + "---:|" * len(RECOMPUTED),
    ]
    for name, connection in connections().items():
        cells = [f"{kept(connection, recompute) / unit:.2f}" for recompute in RECOMPUTED]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Writes the table, or checks it."""
    import marked

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the table is out of date")
    check = parser.parse_args().check
    text = "\n".join(["", *rows(), "", ""])
    return marked.write(DOCUMENT, "training memory", text, check)


if __name__ == "__main__":
    sys.exit(main())
