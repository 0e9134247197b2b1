"""Every record, so that nothing is shown that cannot be looked up."""

from __future__ import annotations

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.frame import code, reason, source
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Run
from attnres_ext.benchmarks.results import ModelResult, Result

_HEADER = ["case", "who", "median", "best", "spread", "samples", "GB/s", "error", "disturbed"]


def section(kept: Kept) -> Html | None:
    """A table for each run, folded."""
    if not kept.runs:
        return None
    return part(
        "records",
        "Every record",
        "Median, fastest sample, distance between the quartiles as a share of the median, number "
        "of samples, bandwidth, largest error as a share of what the correctness gate allows, and "
        "how often the system took a core away meanwhile. A click on a heading sorts.",
        [_run(run) for run in reversed(kept.runs)],
    )


def _run(run: Run) -> Html:
    rows = [_row(row) for row in run.rows]
    return tag(
        "details",
        tag("summary", code(run.name), f", {len(rows)} rows"),
        source(run.facts, run.name),
        table(_HEADER, rows, numbers=7, caption=f"All rows of {run.name}", sortable=True),
    )


def _row(row: Result | ModelResult) -> list[Content]:
    who: Content = code(row.contestant)
    if isinstance(row, ModelResult):
        who = [who, f" {row.residual}"]
    if row.seconds is None:
        why = tag("small", reason(row.status, row.reason))
        return [code(row.case), [who, why], *["–"] * 7]
    rate = row.bandwidth if isinstance(row, Result) else None
    return [
        code(row.case),
        who,
        value(row.seconds, wording.seconds(row.seconds)),
        value(row.best_seconds, wording.seconds(row.best_seconds)) if row.best_seconds else "–",
        "–" if row.spread is None else value(row.spread, f"{100 * row.spread:.0f} %"),
        str(len(row.samples)) if row.timer == "clock" else f"{len(row.samples)}, {row.timer}",
        value(rate, f"{rate / 1e9:.1f}") if rate else "–",
        "–" if row.error is None else value(row.error, f"{row.error:.2f}"),
        "–" if row.preemptions is None else str(row.preemptions),
    ]
