"""What a person sees of a training run: a progress bar, or lines in a log, and a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from attnres_ext.training.loop import Record
from attnres_ext.training.settings import Settings
from attnres_ext.training.summary import Row

# Width of tables that go to a file or a pipe.
_PLAIN_WIDTH = 110


class Display:
    """Progress of a run on stderr.

    On a terminal a bar with the losses of the last step, otherwise a line per validation.

    Args:
        settings: The run's settings.
        done: Steps done when the display begins.
        quiet: Show nothing: another process does.
    """

    def __init__(self, settings: Settings, done: int, quiet: bool = False):
        self._quiet = quiet
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=settings.steps, completed=done, losses=""
        )
        self._steps = settings.steps

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, records: Sequence[Record]) -> None:
        """Shows one step of every arm."""
        step = records[0].step
        several = len({record.seed for record in records}) > 1
        names = [
            f"{record.arm} seed {record.seed}" if several else record.arm for record in records
        ]
        losses = "  ".join(
            f"{name} {record.loss:.3f}"
            for name, record in zip(names, records, strict=True)
            if record.loss is not None
        )
        self._progress.update(self._task, completed=step, losses=losses)
        if records[0].val_loss is not None and not self._quiet:
            validation = "  ".join(
                f"{name} {record.val_loss:.4f}" for name, record in zip(names, records, strict=True)
            )
            line = f"step {step:>5}/{self._steps}  validation loss  {validation}"
            if self._progress.disable:
                print(line, file=sys.stderr, flush=True)
            else:
                self._progress.console.print(line, highlight=False)


def print_table(rows: Sequence[Row]) -> None:
    """Prints the outcome of every arm on stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    # Narrow headings: the table has to fit a terminal of 80 columns.
    table = Table(box=SIMPLE_HEAD)
    table.add_column("residual")
    for heading in ("parameters", "train\nloss", "val\nloss", "bits/\nbyte", "ms/\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("overhead", justify="right", no_wrap=True)
    for row in rows:
        deviation = f" ± {row.val_loss_deviation:.4f}" if row.val_loss_deviation else ""
        table.add_row(
            row.arm,
            f"{row.parameters:,}",
            _number(row.train_loss, ".4f"),
            _number(row.val_loss, ".4f") + deviation,
            _number(row.bits_per_byte, ".4f"),
            _number(row.ms_per_step, ".1f"),
            _overhead(row),
        )
    console.print(table)
    if any(row.overhead for row in rows):
        print(
            "overhead: median over steps of the time against standard at the same step, with its "
            "95 % interval"
        )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _overhead(row: Row) -> str:
    if row.overhead is None:
        return "–"
    return f"{row.overhead.percent:+.1f} % [{row.overhead.low:+.1f}, {row.overhead.high:+.1f}]"
