"""Measures what a pipeline's bookkeeping costs the host, beside the step that it belongs to.

``python tools/pipelines.py`` runs all stages of 93 layers in turn in one process, with a dictionary
for the network, and writes the table in docs/parallel.md.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from typing import Any

import marked
import torch
from torch import nn

from attnres_ext import AttentionResiduals
from attnres_ext.parallel import (
    RankBlocks,
    StageBlocks,
    StagePlan,
    first_sites_of,
    place_stages,
    plan_pipeline,
)

SUBLAYERS, BLOCK, RANKS, VIRTUAL = 186, 24, 4, 2
HIDDEN, TOKENS, ROUNDS = 256, 512, 9


class Stage(nn.Module):
    """Square layers with the reads before them."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__()
        self.residual = AttentionResiduals(HIDDEN, SUBLAYERS, sublayers_per_block=BLOCK)
        self.residual.keep_sites(plan.sites)
        sites = [site for site in plan.sites if site < SUBLAYERS]
        self.layers = nn.ModuleDict({str(site): nn.Linear(HIDDEN, HIDDEN) for site in sites})

    def forward(self, x: Any) -> Any:
        """From the embedding or a suspended pass, to the next or the output."""
        resumed = not isinstance(x, torch.Tensor)
        state = self.residual.resume(x) if resumed else self.residual.start(x)
        for site, layer in self.layers.items():
            state.write(layer(state.read(int(site))))
        return state.read_output() if SUBLAYERS in self.residual.sites else state.suspend()


def measure() -> tuple[float, float]:
    """Medians over microbatches: seconds of bookkeeping a stage, and of all else a stage."""
    sizes = [SUBLAYERS // (RANKS * VIRTUAL)] * (RANKS * VIRTUAL)
    sizes[-1] += SUBLAYERS - sum(sizes)
    plan = plan_pipeline(
        SUBLAYERS, BLOCK, first_sites_of(sizes), place_stages(RANKS, VIRTUAL, "loop")
    )
    ranks = [RankBlocks() for _ in range(RANKS)]
    blocks = [StageBlocks(plan, stage.index, ranks[stage.rank]) for stage in plan.stages]
    modules = [Stage(stage) for stage in plan.stages]
    count = len(modules)
    spent: dict[int, float] = defaultdict(float)

    def timed(microbatch: int, function: Callable, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments)
        spent[microbatch] += time.perf_counter() - begin
        return result

    totals = []
    for microbatch in range(ROUNDS):
        begin = time.perf_counter()
        network: dict[int, Any] = {}
        kept = []
        embedding = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        for index, (stage, module) in enumerate(zip(blocks, modules, strict=True)):
            sent = network.pop(index, ())
            received = [t.detach().requires_grad_(t.requires_grad) for t in sent]
            entered = timed(microbatch, stage.enter, microbatch, received)
            output = module(embedding if entered is None else entered)
            output = timed(microbatch, stage.leave, microbatch, output)
            kept.append((received, output))
            network[index + 1] = output
        loss = output.square().mean()
        for index in reversed(range(count)):
            stage, (received, output) = blocks[index], kept[index]
            leaves = timed(microbatch, stage.leaves, microbatch)
            outputs, gradients = (loss,), (None,)
            if index + 1 < count:
                back = network.pop(index)
                outputs, gradients = timed(
                    microbatch, stage.begin_backward, microbatch, output,
                    back[: len(output)], back[len(output) :],
                )  # fmt: skip
            torch.autograd.backward(outputs, gradients)
            found = [leaf.grad for leaf in leaves]
            more = timed(microbatch, stage.end_backward, microbatch, found)
            network[index - 1] = [tensor.grad for tensor in received] + more
        totals.append(time.perf_counter() - begin)
    own = statistics.median(spent.values()) / count
    return own, statistics.median(totals) / count - own


def main() -> None:
    """Measures, and writes the sentence."""
    own, rest = measure()
    text = (
        f"A stage and microbatch of {SUBLAYERS // 2} layers on P {RANKS}, V {VIRTUAL}: "
        f"{own * 1e6:.0f} µs of bookkeeping on the host, "
        f"beside {rest * 1e3:.1f} ms of forward and backward at D {HIDDEN} and {TOKENS} tokens on "
        f"{torch.get_num_threads()} threads of a CPU (medians of {ROUNDS}; torch "
        f"{torch.__version__}, {date.today()}, `python tools/pipelines.py`).\n"
    )
    marked.write(marked.DOCS / "parallel.md", "bookkeeping", text)
    print(text, end="")


if __name__ == "__main__":
    main()
