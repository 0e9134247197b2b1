"""What a person sees of a pipeline's plan: a table of stages, one of ranks, one of traffic."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from attnres_ext.parallel import PipelinePlan, count_traffic

# Width of tables that go to a file or a pipe.
_PLAIN_WIDTH = 110


def print_plan(plan: PipelinePlan, described: str, tensor: int) -> None:
    """Prints a plan.

    Args:
        plan: What is printed.
        described: The model and sizes, in a line.
        tensor: Bytes of one sum or block of a microbatch.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH, highlight=False)
    console.print(described, markup=False, soft_wrap=True)
    console.print(
        f"{plan.num_stages} stages on {plan.num_ranks} ranks; cache: {plan.cache}, gradients: "
        f"{plan.gradients}; plan {plan.hash}",
        markup=False,
        soft_wrap=True,
    )
    for table in (_stages(plan), _ranks(plan, tensor), _traffic(plan, tensor)):
        console.print(table)


def _table(title: str, *columns: str, left: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _stages(plan: PipelinePlan) -> Table:
    blocks = ("sites", "received", "from cache", "closed", "kept", "gradients back")
    table = _table(
        "stages: blocks that the hop before brings beside the sum, and what becomes of them",
        *("stage", "rank", "sites", "received", "from cache", "closed", "kept"),
        *("gradients back", "tensors in", "uncached"),
        left=blocks,
    )  # fmt: skip
    for stage in plan.stages:
        hop = plan.hops[stage.index - 1] if stage.index else None
        sent = "–" if hop is None else str(1 + len(hop.blocks)) if hop.crosses else "0"
        naive = "–" if hop is None else str(1 + len(hop.closed)) if hop.crosses else "0"
        table.add_row(
            str(stage.index),
            str(stage.rank),
            spans(stage.sites),
            spans(stage.receives),
            spans(stage.cached),
            spans(stage.closes),
            spans(stage.keeps),
            "–" if hop is None else spans(hop.gradients),
            sent,
            naive,
        )
    return table


def _ranks(plan: PipelinePlan, tensor: int) -> Table:
    table = _table(
        "ranks: what each keeps of a microbatch",
        *("rank", "stages", "blocks", "received", "closed", "finished", "MB"),
        left=("stages", "blocks", "received", "closed", "finished"),
    )
    for rank in range(plan.num_ranks):
        kept = plan.kept_by(rank)
        ways = {
            way: spans(sorted({k.block for k in kept if k.by == way}))
            for way in ("receiving", "closing", "finishing")
        }
        table.add_row(
            str(rank),
            spans(stage.index for stage in plan.stages_of(rank)),
            str(len(kept)),
            *ways.values(),
            _megabytes(len(kept) * tensor),
        )
    return table


def _traffic(plan: PipelinePlan, tensor: int) -> Table:
    traffic = count_traffic(plan)
    table = _table(
        "traffic between ranks",
        *("", "tensors a microbatch", "MB a microbatch", "MB a step", "widest hop"),
        left=("",),
    )
    for name, tensors, widest in (
        ("forward", traffic.forward, traffic.widest),
        ("backward", traffic.backward, traffic.widest_backward),
        ("one way without a cache", traffic.naive, traffic.widest_naive),
        ("one way, padded to the widest hop", traffic.padded, traffic.widest),
    ):
        size = tensors * tensor
        table.add_row(
            name,
            str(tensors),
            _megabytes(size),
            _megabytes(plan.num_microbatches * size),
            str(widest),
        )
    return table


def spans(numbers: Iterable[int]) -> str:
    """Ascending whole numbers with runs as spans: ``0–3, 5``."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and runs[-1][-1] == value - 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join("–".join(map(str, run)) for run in runs) or "–"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
