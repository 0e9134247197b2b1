"""What attending over depth costs, compared with the standard residual."""

from __future__ import annotations

from typing import Any

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report import lines
from attnres_ext.benchmarks.report.bars import Axis, Bar, Row, chart
from attnres_ext.benchmarks.report.frame import code, figure, source, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place, Run
from attnres_ext.benchmarks.report.palette import series
from attnres_ext.benchmarks.report.scales import Scale, linear_ticks
from attnres_ext.benchmarks.results import ModelResult

#: What lies along the axis, by the name of the axis.
AXES = {
    "layers": ("layers", lambda row: row.layers),
    "blocks": ("blocks at the end of the stack, with the embedding", lambda row: row.blocks),
    "tokens": ("tokens in a call", lambda row: row.batch * row.tokens),
    "hidden": ("hidden size", lambda row: row.hidden),
}
WORKS = {
    "train": "Training step",
    "prefill": "Prefill",
    "decode": "Decode step",
    "reads": "Reads of a decode step",
}


def section(kept: Kept) -> Html | None:
    """Curves over the size of a model, training runs, and single sites."""
    figures = [drawn for place in kept.places for drawn in _curves(kept, place)]
    if kept.trainings:
        figures.append(_training(kept.trainings[-1]))
    figures += [drawn for place in kept.places if (drawn := _sites(kept, place))]
    if not figures:
        return None
    return part(
        "overhead",
        "Over the standard residual",
        "What Attention Residuals cost a model, against the same model that adds its sublayers "
        "up. Overheads of models are medians over turns in which both ran, with the quartiles as "
        "thin lines.",
        figures,
    )


def _curves(kept: Kept, place: Place) -> list[Html]:
    """A chart for each kind of work and axis that has at least two points."""
    curves: dict[tuple[str, str, str], list[tuple[Run, ModelResult]]] = {}
    for case, run in kept.newest_models(place).items():
        for row in run.models_by_case[case].values():
            for axis in row.scaling:
                if row.overhead is not None and axis in AXES and row.residual != "standard":
                    curves.setdefault((row.work, row.origin, axis), []).append((run, row))
    found = []
    for (work, _, axis), rows in curves.items():
        label, position = AXES[axis]
        if len({position(row) for _, row in rows}) < 2:
            continue
        drawn = _chart(f"{WORKS.get(work, work)} over {label}", rows, label, position)
        by = "hidden size" if axis == "hidden" else axis
        heading = [f"{WORKS.get(work, work)}, by {by}", tag("small", place.label)]
        found.append(figure(heading, drawn, *sources(run for run, _ in rows)))
    return found


def _chart(title: str, rows: list[tuple[Run, ModelResult]], label: str, position: Any) -> Html:
    by_line: dict[tuple[str, str], list[ModelResult]] = {}
    for _, row in rows:
        by_line.setdefault((row.contestant, row.residual), []).append(row)
    drawn = []
    for (contestant, residual), points in by_line.items():
        points.sort(key=position)
        drawn.append(
            lines.Line(
                f"{residual}, {wording.contestant(contestant)}",
                series(contestant),
                [
                    lines.Point(
                        position(row),
                        100 * row.overhead,
                        *(100 * share for share in row.overhead_quartiles or ()),
                    )
                    for row in points
                ],
                dashed=residual == "full",
            )
        )
    said = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{wording.percent(p.y / 100)} at {p.x:g}" for p in line.points)
        for line in drawn
    )
    return lines.chart(
        f"{title}. {said}",
        drawn,
        x_label=label,
        y_label="time over the standard residual's",
        y_text=lambda percent: wording.percent(
            percent / 100, 0 if percent == round(percent) else 1
        ),
    )


def _training(record: dict[str, Any]) -> Html:
    rows = []
    for arm in record["arms"]:
        over = arm.get("overhead")
        interval: Content = "–"
        if over:
            interval = " to ".join(wording.percent(over[end] / 100) for end in ("low", "high"))
        loss = arm.get("val_loss")
        rows.append(
            [
                arm["arm"],
                f"{arm['parameters']:,}",
                "–" if loss is None else value(loss, f"{loss:.3f}"),
                wording.seconds(arm["ms_per_step"] / 1e3) if arm.get("ms_per_step") else "–",
                tag("b", value(over["percent"], wording.percent(over["percent"] / 100)))
                if over
                else "–",
                interval,
            ]
        )
    header = ["residual", "parameters", "validation loss", "a step takes", "over standard"]
    drawn = table([*header, "95 % interval"], rows, numbers=5, caption="A training run, arm by arm")
    heading = [
        f"A training run of {record['steps']} steps",
        tag("small", f"{record['tokens_per_step']:,} tokens a step, {record['text']}"),
    ]
    return figure(heading, drawn, source(record, record["name"]))


def _sites(kept: Kept, place: Place) -> Html | None:
    """Single sites: what a read costs where a standard model adds and normalises."""
    runs, groups, most = [], {}, 1.0
    for case, run in kept.newest(place).items():
        rows = run.by_case[case]
        ours = rows.get("ours")
        # One kernel is the stricter yardstick; older runs have two operators alone.
        yardsticks = [rows[n] for n in ("standard-fused", "standard") if n in rows]
        standard = next((row for row in yardsticks if row.seconds), None)
        if ours is None or standard is None or not ours.seconds or not standard.seconds:
            continue
        ratio = ours.seconds / standard.seconds
        most = max(most, ratio)
        columns = [
            value(ours.seconds, wording.seconds(ours.seconds)),
            value(standard.seconds, wording.seconds(standard.seconds)),
            "one kernel" if standard.contestant == "standard-fused" else "two operators",
        ]
        bar = Bar(ratio, "s-ours", tag("b", value(ratio, f"{ratio:.1f} ×")))
        groups.setdefault(ours.operator, []).append(
            Row([ours.shape, tag("small", ours.work)], [bar], columns)
        )
        runs.append(run)
    if not groups:
        return None
    ticks = linear_ticks(0, most)
    axis = Axis(Scale(0, ticks[-1]), ticks, " ×", mark=1.0)
    drawn = chart(
        f"Time of one site over the standard residual's add and norm: {place.label}",
        ("one site", "ours", "add and norm", "which is"),
        axis,
        [(code(operator), rows) for operator, rows in groups.items()],
    )
    heading = ["One site against add and norm", tag("small", place.label)]
    note = tag(
        "p",
        "Add and norm as one kernel is this library's standard residual; as two operators it is "
        "PyTorch's in eager mode. A site reads every finished block where they read two tensors, "
        "so more than 1 × is its nature; what it costs a model depends on what the sublayers take.",
        class_="source",
    )
    return figure(heading, drawn, note, *sources(runs))
