"""``attnres bench``: how fast the operators are, against what, and how close to a plain copy."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_ext.cli import bench_report
from attnres_ext.cli.arguments import HelpFormatter, list_of, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from attnres_ext.benchmarks.registry import Case
    from attnres_ext.benchmarks.results import Result

_DESCRIPTION = """\
Times the operators against plain PyTorch, torch.compile and the standard residual.

Whoever is wrong is not timed: results and gradients are first compared with the definition in
float64. Contestants take turns, and so does a copy of exactly the bytes that the operator must
move; "% of copy" says how close an operator comes to that copy.
"""

_EXAMPLES = """\
examples:
  attnres bench                                       the headline figures, within a minute
  attnres bench --suite ops --out benchmarks/results  every operator, results kept as JSON lines
  attnres bench --suite all --filter D7168            every case of hidden size 7168
  attnres bench --contestants ours,compile --filter 'depth_attention/*/fresh'
  attnres bench report benchmarks/results             the results of a folder as one HTML page
"""


def add_parser(subparsers: Any) -> None:
    """Adds the ``bench`` subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time the operators against eager PyTorch, torch.compile and a plain copy",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where to run: cpu, cuda or cuda:1"
    )
    parser.add_argument(
        "--suite",
        choices=["quick", "ops", "all"],
        default="quick",
        help="quick: headline figures; ops: every operator; all: also the largest shapes",
    )
    parser.add_argument(
        "--filter", metavar="TEXT", help="only cases whose name contains or matches this"
    )
    parser.add_argument(
        "--contestants",
        metavar="NAMES",
        type=list_of(str),
        help="of ours, eager and others, separated by commas; `--list` names them all",
    )
    parser.add_argument(
        "--threads", type=number(int, least=1), help="threads of PyTorch (default: one per core)"
    )
    parser.add_argument(
        "--repeats", type=number(int, least=2), help="turns that each contestant gets in a case"
    )
    parser.add_argument(
        "--seconds",
        type=number(int, least=1),
        help="start no case after this long (default: run them all)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="rotate inputs so that no cache holds them from the last call",
    )
    parser.add_argument(
        "--allocator",
        choices=["keep", "system"],
        default="keep",
        help="keep: freed memory stays mapped, so that no page faults are timed; system: as usual",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results as JSON lines"
    )
    parser.add_argument(
        "--list", action="store_true", help="name the cases and contestants, and stop"
    )
    instead = parser.add_subparsers(
        dest="action", metavar="[report DIR]", help="instead of measuring:"
    )
    bench_report.add_parser(instead)


def run(args: argparse.Namespace) -> int:
    """Runs ``attnres bench``."""
    if args.action == "report":
        return bench_report.run(args)
    from rich.console import Console

    from attnres_ext.benchmarks import contestants, registry
    from attnres_ext.cli.devices import check_device
    from attnres_ext.training.errors import UserError

    if args.device.split(":")[0] not in registry.DEVICES:
        raise UserError(f"--device is {args.device}, expected cpu, cuda or cuda:1")
    check_device(args.device)
    try:
        kind = "cuda" if args.device.startswith("cuda") else "cpu"
        cases = registry.select(args.suite, args.filter, kind)
        if args.seconds is not None:
            cases = registry.most_wanted_first(cases, kind)
        for name in args.contestants or ():
            contestants.check(name)
    except (registry.UnknownCaseError, contestants.UnknownContestantError) as error:
        raise UserError(str(error)) from None
    if args.list:
        for case in cases:
            print(f"{case.name}  ({registry.ORIGINS[case.origin]})")
        # Not cases, so not among them where a script reads the list.
        for name in contestants.NAMES:
            reason = contestants.get(name).unavailable(args.device)
            note = f" [{reason}]" if reason else ""
            print(f"contestant {name}: {contestants.get(name).ABOUT}{note}", file=sys.stderr)
        return 0
    cores = os.cpu_count() or 1
    if args.threads is not None and args.threads > cores:
        raise UserError(f"--threads is {args.threads}, but this machine has {cores} cores")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out} cannot be made: {error.strerror}") from None
        if not os.access(args.out, os.W_OK):
            raise UserError(f"--out {args.out} cannot be written to")
    console = Console()
    if not console.is_terminal:
        # A pipe or a file has no width; rich would fold the table into 80 columns.
        console = Console(width=120)
    _bench(args, cases, console)
    return 0


def _bench(args: argparse.Namespace, cases: list[Case], console: Console) -> None:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from attnres_ext.benchmarks import memory, results, runner

    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pages_kept = args.allocator == "keep" and memory.keep_pages()
    effort = runner.effort_for(args.suite, args.device)
    if args.repeats is not None:
        effort = replace(effort, rounds=args.repeats)
    options = runner.Options(
        effort=effort,
        names=args.contestants,
        quick=args.suite == "quick",
        # What a GPU's cache holds is gone by the time a model comes back to it.
        cold=args.cold or on_gpu,
        device=args.device,
    )
    run_facts = runner.describe_run(args.suite, args.device, options, pages_kept)
    run_facts["command"] = args.command_line
    run_facts.update(runner.ceilings(options))
    path = None
    if args.out is not None:
        stamp = run_facts["date"].replace(":", "").replace("+0000", "Z")
        path = args.out / f"{args.device}-{args.suite}-{stamp}.jsonl"

    table = _table()
    collected: list[Result] = []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Tables go to stdout, where they may be piped; what is going on right now does not.
        console=Console(stderr=True),
        transient=True,
    )
    with progress:
        task = progress.add_task("", total=len(cases))

        def report(case: Case, step: str) -> None:
            progress.update(task, description=f"{case.operator} {case.shape}: {step}")

        seconds = math.inf if args.seconds is None else args.seconds
        for case, rows in runner.run_cases(cases, options, report, seconds):
            collected += rows
            _add_rows(table, case, rows)
            progress.advance(task)
            if path is not None:
                # After every case: a suite that is interrupted keeps what it has.
                results.write(path, run_facts, collected)
    console.print(table)
    left_out = len(cases) - len({row.case for row in collected})
    if left_out:
        note = f"{left_out} of {len(cases)} cases were left out after {args.seconds} s"
        console.print(f"[yellow]{note}[/yellow]")
    _print_notes(console, run_facts, collected)
    if path is not None:
        console.print(f"results: {path}", soft_wrap=True)


def _table() -> Table:
    from rich.table import Table

    table = Table(title="Operators", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("contestant", no_wrap=True)
    for name in ("time", "spread", "GB/s", "% of copy", "ours is"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_rows(table: Table, case: Case, rows: list[Result]) -> None:
    by_name = {row.contestant: row for row in rows}
    copy, ours = by_name.get("copy"), by_name.get("ours")
    labels = [f"[bold]{case.operator}[/bold]", case.shape, case.work]
    for row in rows:
        if row.status == "absent":
            continue  # said once, below the table
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
            f"{row.bandwidth / 1e9:.1f}" if row.bandwidth else "",
            share,
            speedup,
        )
    for label in labels:
        table.add_row(label, "", "", "", "", "", "")
    table.add_section()


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms"


def _print_notes(console: Console, run_facts: dict[str, Any], rows: list[Result]) -> None:
    from attnres_ext.benchmarks import contestants

    machine = run_facts["machine"]
    where = (
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {run_facts['versions'].get('cuda')}"
        if "gpu" in machine
        else f"{machine['processor']}, {run_facts['threads']} threads, {machine['instructions']}"
    )
    console.print(
        f"{where}, "
        f"torch {run_facts['versions']['torch']}; caches {run_facts['cache']}, "
        f"memory {'kept' if run_facts['pages_kept'] else 'returned to the system after each call'}",
        highlight=False,
        soft_wrap=True,
    )
    rates = ", ".join(
        f"{size} MiB {rate:.1f}" for size, rate in run_facts["copy_gbps_by_mib"].items()
    )
    console.print(f"copy by buffer size, GB/s: {rates}", highlight=False, soft_wrap=True)
    products = ", ".join(
        f"{dtype} {rate:.2f}" for dtype, rate in run_facts["matrix_tflops"].items()
    )
    console.print(f"matrix products, TFLOP/s: {products}", highlight=False, soft_wrap=True)
    plain = sum(1 for row in rows if row.timer == "events")
    if plain:
        console.print(
            f"[yellow]{plain} contestants could not be captured in a CUDA graph; their times hold "
            "the host's launches, too[/yellow]",
            soft_wrap=True,
        )
    for name in dict.fromkeys(row.contestant for row in rows if row.contestant != "copy"):
        console.print(f"{name}: {contestants.get(name).ABOUT}", highlight=False, soft_wrap=True)
    excuses = dict.fromkeys(
        (row.contestant, row.operator if row.status in ("wrong", "failed") else "", row.reason)
        for row in rows
        if row.status not in ("timed", "unsupported")
    )
    for name, operator, reason in excuses:
        where = f" in {operator}" if operator else ""
        console.print(f"[red]{name} was not timed{where}: {reason}[/red]", soft_wrap=True)
    disturbed = sum(1 for row in rows if row.preemptions and row.preemptions > len(row.samples))
    if disturbed:
        timed = sum(1 for row in rows if row.status == "timed")
        console.print(
            f"[yellow]{disturbed} of {timed} measurements shared their cores with other processes; "
            "figures are only as good as the machine was quiet.[/yellow]",
            soft_wrap=True,
        )
