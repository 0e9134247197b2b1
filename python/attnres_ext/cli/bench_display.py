"""The tables and notes that ``attnres bench`` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnres_ext.benchmarks import baselines, results, wording
from attnres_ext.benchmarks.results import ModelResult

if TYPE_CHECKING:
    from rich.console import Console

    from attnres_ext.benchmarks.results import Result


def tables(rows: Sequence[Result | ModelResult]) -> list[Table]:
    """One for the operators, one for whole models; those that have rows."""
    operators = _table(
        "Operators",
        ("case", "who"),
        ("time", "spread", "rate", "% of copy", "ours is"),
    )
    models = _table(
        "Models",
        ("stack", "residual", "by"),
        ("time", "spread", "tokens/s", "peak memory", "over standard"),
    )
    by_case: dict[str, list[Any]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    for group in by_case.values():
        if isinstance(group[0], ModelResult):
            _add_model(models, group)
        else:
            _add_operator(operators, group)
    return [table for table in (operators, models) if table.row_count]


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        # Where a terminal is narrow, words are folded and figures stay whole.
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_operator(table: Table, rows: list[Result]) -> None:
    """Adds a case: who ran in it, and how they compare."""
    by_name = {row.contestant: row for row in rows}
    copy, ours = by_name.get("copy"), by_name.get("ours")
    labels = [f"[bold]{rows[0].operator}[/bold]", rows[0].shape, rows[0].work]
    for row in _present(rows):
        label = labels.pop(0) if labels else ""
        if row.status != "timed":
            table.add_row(label, row.contestant, f"[dim]{row.status}[/dim]", "", "", "", "")
            continue
        share, speedup = "", ""
        if row is not copy and copy is not None and row.bandwidth and copy.bandwidth:
            share = f"{100 * row.bandwidth / copy.bandwidth:.0f} %"
        if row is not ours and row is not copy and ours is not None and ours.seconds:
            ratio = row.seconds / ours.seconds
            speedup = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
            # Within a few percent nobody is faster.
            speedup = "even" if 0.95 < ratio < 1.05 else speedup
        table.add_row(
            label,
            row.contestant,
            _seconds(row.seconds),
            f"{100 * row.spread:.0f} %",
            _rate(row),
            share,
            speedup,
        )
    for label in labels:
        table.add_row(label, "", "", "", "", "", "")
    table.add_section()


def _add_model(table: Table, rows: list[ModelResult]) -> None:
    """Adds a stack: its variants, and what they cost over the standard residual."""
    work = {
        "train": "training step",
        "prefill": "prefill",
        "decode": "decoding step",
        "reads": "reads of a step",
    }[rows[0].work]
    layers, hidden, blocks, *tokens = rows[0].shape.split(", ")
    labels = [f"[bold]{work}[/bold]", f"{layers}, {hidden}", blocks, ", ".join(tokens)]
    for row in _present(rows):
        label = labels.pop(0) if labels else ""
        names = (label, row.residual, row.contestant)
        if row.status != "timed":
            table.add_row(*names, f"[dim]{row.status}[/dim]", "", "", "", "")
            continue
        over = "" if row.overhead is None else f"{100 * row.overhead:+.1f} %"
        if row.overhead_quartiles is not None:
            low, high = (100 * share for share in row.overhead_quartiles)
            over += f" ({low:+.1f} to {high:+.1f})"
        table.add_row(
            *names,
            _seconds(row.seconds),
            f"{100 * row.spread:.0f} %",
            f"{row.tokens_per_second:,.0f}"
            if row.work != "reads"
            else f"{_seconds(row.seconds / row.sites)} a site",
            f"{row.peak_bytes / 2**20:,.1f} MiB",
            over,
        )
    for label in labels:
        table.add_row(label, "", "", "", "", "", "", "")
    table.add_section()


def _present(rows: Sequence[Any]) -> Sequence[Any]:
    """Without those who are absent, which is said once, below the table; unless nobody is here."""
    return [row for row in rows if row.status != "absent"] or rows


def _rate(row: Result) -> str:
    """Bytes per second; calls per second where there are none to speak of."""
    if row.bandwidth is not None:
        return f"{row.bandwidth / 1e9:.1f} GB/s"
    return f"{row.calls_per_second:,.0f}/s"


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms"


def print_notes(
    console: Console, run_facts: dict[str, Any], rows: Sequence[Result | ModelResult]
) -> None:
    """What a reader of the tables must know: the machine, who is who, who is missing and why."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    machine = run_facts["machine"]
    where = (
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {run_facts['versions'].get('cuda')}"
        if "gpu" in machine
        else f"{machine['processor']}, {_threads(run_facts)}, {machine['instructions']}"
    )
    words = [f"caches {run_facts['cache']}", *filter(None, [wording.memory(run_facts)])]
    say(f"{where}, torch {run_facts['versions']['torch']}; {', '.join(words)}")
    rates = run_facts["copy_gbps_by_mib"].items()
    say("copy by buffer size, GB/s: " + ", ".join(f"{n} MiB {rate:.1f}" for n, rate in rates))
    products = run_facts["matrix_tflops"].items()
    say("matrix products, TFLOP/s: " + ", ".join(f"{n} {rate:.2f}" for n, rate in products))
    _print_baselines(rows, say)
    plain = sum(row.timer == "events" for row in rows if hasattr(row, "operator"))
    if plain:
        say(
            f"{plain} baselines could not be captured in a CUDA graph; their times hold the "
            "host's launches, too",
            style="yellow",
        )
    shared, timed = results.shared_cores(rows)
    if shared:
        say(
            f"{wording.shared_cores(shared, timed)}; figures are only as good as the machine was "
            "quiet.",
            style="yellow",
        )


def _threads(run_facts: dict[str, Any]) -> str:
    count = run_facts["threads"]
    bound = " bound to cores" if run_facts.get("threads_bound") else ""
    return f"{count} thread{'' if count == 1 else 's'}{bound}"


def _print_baselines(rows: Sequence[Result | ModelResult], say: Callable[..., None]) -> None:
    operators = [row for row in rows if hasattr(row, "operator")]
    for name in dict.fromkeys(row.contestant for row in operators if row.contestant != "copy"):
        say(f"{name}: {baselines.get(name).about}")
    if len(operators) < len(rows):
        say(
            "models: layers of the reference Kimi Linear, dense feed-forwards; time over the "
            "standard residual's, which is this library's own, one kernel a site; median over "
            "turns of the ratio, and its quartiles"
        )
    excuses = {}
    for row in rows:
        if row.status not in ("timed", "unsupported"):
            what = getattr(row, "operator", None) or f"{row.residual} {row.work}"
            told = f" in {what}" if row.status in ("wrong", "failed") else ""
            excuses[f"{row.contestant} was not timed{told}: {row.reason}"] = None
    for excuse in excuses:
        say(excuse, style="red")
