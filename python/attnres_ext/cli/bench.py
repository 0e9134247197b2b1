"""``attnres bench``: how fast the operators are, against what, and how close to a plain copy."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_ext.cli import bench_report
from attnres_ext.cli.arguments import HelpFormatter, list_of, number

if TYPE_CHECKING:
    from rich.console import Console

    from attnres_ext.benchmarks.model_registry import ModelCase
    from attnres_ext.benchmarks.registry import Case
    from attnres_ext.benchmarks.results import ModelResult, Result

_DESCRIPTION = """\
Times the operators, and whole models, against plain PyTorch, torch.compile, other people's kernels
and the standard residual.

Whoever is wrong is not timed: results and gradients are first compared with the definition in
float64. Contestants take turns, and so does a copy of exactly the bytes that the operator must
move; "% of copy" says how close an operator comes to that copy.
"""

_EXAMPLES = """\
examples:
  attnres bench                                       the headline figures, within a minute
  attnres bench --suite ops --out benchmarks/results  every operator, results kept as JSON lines
  attnres bench --suite model                         training steps of Kimi Linear stacks
  attnres bench --suite decode                        prefill and decoding steps
  attnres bench --device cuda --suite all             everything, on an NVIDIA GPU
  attnres bench --suite all --filter D7168            every case of hidden size 7168
  attnres bench --contestants ours,compile --filter 'depth_attention/*/fresh'
  attnres bench report benchmarks/results             the results of a folder as one HTML page
"""


def add_parser(subparsers: Any) -> None:
    """Adds the ``bench`` subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time operators and models against eager PyTorch, torch.compile and a plain copy",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where to run: cpu, cuda or cuda:1"
    )
    parser.add_argument(
        "--suite",
        choices=["quick", "ops", "model", "decode", "all"],
        default="quick",
        help="quick: headline figures; ops: every operator; model: training steps; decode: prefill "
        "and decoding steps; all: everything, also the largest shapes",
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

    from attnres_ext.benchmarks import contestants, model_registry, registry
    from attnres_ext.cli.devices import check_device
    from attnres_ext.training.errors import UserError

    if args.device.split(":")[0] not in registry.DEVICES:
        raise UserError(f"--device is {args.device}, expected cpu, cuda or cuda:1")
    check_device(args.device)
    try:
        kind = "cuda" if args.device.startswith("cuda") else "cpu"
        cases = registry.select(args.suite, args.filter, kind)
        stacks = model_registry.select(args.suite, kind, args.filter)
        if not cases and not stacks:
            raise registry.UnknownCaseError(
                f"no case of suite '{args.suite}' matches '{args.filter}'; "
                f"`attnres bench --suite {args.suite} --list` names them"
            )
        if args.seconds is not None:
            cases = registry.most_wanted_first(cases, kind)
            stacks = model_registry.cheapest_first(stacks)
        for name in args.contestants or ():
            contestants.check(name)
    except (registry.UnknownCaseError, contestants.UnknownContestantError) as error:
        raise UserError(str(error)) from None
    if args.list:
        for case in cases:
            print(f"{case.name}  ({registry.ORIGINS[case.origin]})")
        for stack in stacks:
            print(f"{stack.name}  ({model_registry.ORIGINS[stack.origin]})")
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
    _bench(args, cases, stacks, console)
    return 0


def _bench(
    args: argparse.Namespace, cases: list[Case], stacks: list[ModelCase], console: Console
) -> None:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from attnres_ext.benchmarks import memory, model_runner, results, runner
    from attnres_ext.cli import bench_display

    on_gpu = args.device.startswith("cuda")
    if torch.device(args.device).index is not None:
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

    operators, models = bench_display.operators_table(), bench_display.models_table()
    collected: list[Result | ModelResult] = []
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
        task = progress.add_task("", total=len(cases) + len(stacks))
        end = time.monotonic() + (math.inf if args.seconds is None else args.seconds)

        def done(rows: Sequence[Result | ModelResult]) -> None:
            collected.extend(rows)
            progress.advance(task)
            if path is not None:
                # After every case: a suite that is interrupted keeps what it has.
                results.write(path, run_facts, collected)

        for case in cases:
            if time.monotonic() > end:
                break

            def report(step: str, what: str = f"{case.operator} {case.shape}") -> None:
                progress.update(task, description=f"{what}: {step}")

            rows = runner.run_case(case, options, report)
            bench_display.add_operator(operators, case, rows)
            done(rows)
        for stack in stacks:
            if time.monotonic() > end:
                break

            def report(step: str, what: str = stack.name) -> None:
                progress.update(task, description=f"{what}: {step}")

            arms = model_runner.run_case(stack, args.device, args.contestants, report, args.repeats)
            bench_display.add_model(models, stack, arms)
            done(arms)
    for table in (operators, models):
        if table.row_count:
            console.print(table)
    left_out = len(cases) + len(stacks) - len({row.case for row in collected})
    if left_out:
        note = f"{left_out} of {len(cases) + len(stacks)} cases were left out"
        console.print(f"[yellow]{note} after {args.seconds} s[/yellow]")
    bench_display.print_notes(console, run_facts, collected)
    if path is not None:
        console.print(f"results: {path}", soft_wrap=True)
