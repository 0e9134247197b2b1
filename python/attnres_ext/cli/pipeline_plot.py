"""A picture of a pipeline's plan: who holds which block when."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from attnres_ext.parallel import PipelinePlan
from attnres_ext.parallel.routing import KeptBlock
from attnres_ext.training.files import shown, writing
from attnres_ext.training.plot_style import STYLE, head, save

_COLOURS = {"receiving": "#0072B2", "closing": "#009E73", "finishing": "#D55E00"}
_WORDS = {
    "receiving": "received",
    "closing": "closed by a site of the rank",
    "finishing": "finished here, closed by the next rank",
}
_LANE = 0.8  # of a lane's height is bar
_MOST_INCHES = 60


def plot_plan(path: Path, plan: PipelinePlan, described: str) -> None:
    """Draws one microbatch on its way through the stages and back: a lane for each block on each
    rank, from when it comes to when it is given up in training.

    Args:
        path: PNG to write.
        plan: What is drawn.
        described: The model and sizes, for the heading.
    """
    lanes = sum(max(1, len(plan.kept_by(rank))) for rank in range(plan.num_ranks))
    height = min(_MOST_INCHES, 2 + 0.19 * lanes + 0.15 * plan.num_ranks)
    width = min(_MOST_INCHES, max(9, 3 + 0.55 * 2 * plan.num_stages))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        head(
            figure,
            f"{described}; {plan.num_stages} stages on {plan.num_ranks} ranks, cache {plan.cache}, "
            f"gradients {plan.gradients}",
        )
        _draw(figure.subplots(), plan)
        with writing(f"--out {shown(path)}"):
            save(figure, path)


def _draw(axes: Axes, plan: PipelinePlan) -> None:
    top, ticks = 0.0, []
    for rank in range(plan.num_ranks):
        kept = plan.kept_by(rank)
        height = max(1, len(kept))
        for stage in plan.stages_of(rank):
            for time in (stage.index, _backward(plan, stage.index)):
                axes.add_patch(_box(time, top, 1, height, "#E9E9E9", zorder=0))
        for lane, block in enumerate(kept):
            _draw_block(axes, plan, block, top + lane)
        ticks.append(top + height / 2)
        axes.axhline(top + height + 0.2, color="#BBBBBB", linewidth=0.7)
        top += height + 0.4
    steps = 2 * plan.num_stages
    axes.axvline(plan.num_stages, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, steps)
    axes.set_ylim(top, 0)
    axes.set_yticks(ticks, [f"rank {rank}" for rank in range(plan.num_ranks)])
    axes.tick_params(axis="y", length=0)
    every = -(-steps // 64)
    times = range(0, steps, every)
    names = [t if t < plan.num_stages else _backward(plan, t) for t in times]
    axes.set_xticks([time + 0.5 for time in times], names, fontsize=8)
    axes.set_xlabel("stage: forward, then backward (grey: the rank's own)")
    used = {kept.by for kept in plan.kept}
    axes.legend(
        handles=[Patch(color=_COLOURS[by], label=_WORDS[by]) for by in _COLOURS if by in used],
        frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1),
    )  # fmt: skip


def _backward(plan: PipelinePlan, stage: int) -> int:
    """When the backward of a stage is, or which stage's backward is then."""
    return 2 * plan.num_stages - 1 - stage


def _draw_block(axes: Axes, plan: PipelinePlan, kept: KeptBlock, top: float) -> None:
    begin, end = _came(plan, kept), _backward(plan, kept.last_backward) + 1
    axes.add_patch(
        _box(begin, top + (1 - _LANE) / 2, end - begin, _LANE, _COLOURS[kept.by], zorder=2)
    )
    axes.text(
        begin + 0.08, top + 0.52, kept.block, color="white", fontsize=7, va="center", zorder=3,
        clip_on=True,
    )  # fmt: skip


def _came(plan: PipelinePlan, kept: KeptBlock) -> float:
    stage = plan.stages[kept.stage]
    if kept.by == "receiving":
        return stage.index
    if kept.by == "finishing":
        return stage.index + 1
    site = kept.block * plan.sublayers_per_block
    return stage.index + (site - stage.first_site) / len(stage.sites)


def _box(x: float, y: float, width: float, height: float, colour: str, zorder: int) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", zorder=zorder)
