"""``attnres bench``: how fast the operators are, against what, and how close to a plain copy."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_ext.cli import bench_report
from attnres_ext.cli.arguments import HelpFormatter, list_of, number
from attnres_ext.training.errors import UserError
from attnres_ext.training.files import check_folder

if TYPE_CHECKING:
    from rich.console import Console

    from attnres_ext.benchmarks.model_registry import ModelCase
    from attnres_ext.benchmarks.registry import Case
    from attnres_ext.benchmarks.results import ModelResult, Result
    from attnres_ext.benchmarks.runner import Options
    from attnres_ext.benchmarks.session import Session

_DESCRIPTION = """\
Times the operators, and whole models, against plain PyTorch, torch.compile, other people's kernels
and the standard residual.

Whoever is wrong is not timed: results and gradients are first compared with the definition in
float64. Everybody takes turns, and so does a copy of exactly the bytes that the operator must
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
  attnres bench --baselines ours,compile --filter 'depth_attention/*/fresh'
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
        "--without", metavar="NAMES", type=list_of(str), default=(), help="cases to leave out"
    )
    parser.add_argument(
        "--baselines",
        "--contestants",
        metavar="NAMES",
        type=list_of(str),
        help="who runs: ours, eager and others, separated by commas; `--list` names them all "
        "(formerly --contestants)",
    )
    parser.add_argument(
        "--threads", type=number(int, least=1), help="threads of PyTorch (default: one per core)"
    )
    parser.add_argument(
        "--repeats", type=number(int, least=2), help="turns that everybody gets in a case"
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
        help="keep: freed memory stays mapped, so that no page faults are timed; system: as in any "
        "process",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results as JSON lines, and for a page that draws all it holds",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the newest such run in --out that was interrupted, if there is one",
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help="also say each step of a case: what hangs, or crashes, has named itself before",
    )
    parser.add_argument(
        "--list", action="store_true", help="name the cases and baselines, and stop"
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

    from attnres_ext.benchmarks import baselines, model_registry, registry
    from attnres_ext.cli.devices import check_device

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
        names = {case.name for case in (*cases, *stacks)}
        for name in args.without:
            if name not in names:
                raise registry.UnknownCaseError(
                    f"--without names '{name}', expected some of what "
                    f"`attnres bench --suite {args.suite} --list` names"
                )
        cases = [case for case in cases if case.name not in args.without]
        stacks = [stack for stack in stacks if stack.name not in args.without]
        if args.seconds is not None:
            cases = registry.most_wanted_first(cases, kind)
            stacks = model_registry.cheapest_first(stacks)
        for name in args.baselines or ():
            baselines.get(name)
    except (registry.UnknownCaseError, baselines.UnknownBaselineError) as error:
        raise UserError(str(error)) from None
    if args.list:
        for case in cases:
            print(f"{case.name}  ({registry.ORIGINS[case.origin]})")
        for stack in stacks:
            print(f"{stack.name}  ({model_registry.ORIGINS[stack.origin]})")
        # Not cases, so not among them where a script reads the list.
        for name, one in baselines.BASELINES.items():
            reason = one.unavailable(args.device)
            note = f" [{reason}]" if reason else ""
            print(f"baseline {name}: {one.about}{note}", file=sys.stderr)
        return 0
    cores = os.cpu_count() or 1
    if args.threads is not None and args.threads > cores:
        raise UserError(f"--threads is {args.threads}, but this machine has {cores} cores")
    if args.resume and args.out is None:
        raise UserError("--resume needs the folder of the run to go on with: --out DIR")
    if args.out is not None:
        check_folder("--out", args.out)
    console = Console()
    if not console.is_terminal:
        # A pipe or a file has no width; rich would fold the tables into 80 columns.
        console = Console(width=160)
    _bench(args, cases, stacks, console)
    return 0


@dataclass(frozen=True)
class _Job:
    """A case: its name, what people call it, how long it may take, how to run it, and whether
    everybody runs in it."""

    name: str
    label: str
    guess: float
    run: Callable[[Callable[[str], None]], Sequence[Result | ModelResult]]
    whole: bool = True


def _bench(
    args: argparse.Namespace, cases: list[Case], stacks: list[ModelCase], console: Console
) -> None:
    import torch

    from attnres_ext.benchmarks import memory, runner, session

    on_gpu = args.device.startswith("cuda")
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pages_kept = memory.pages_kept(keep=args.allocator == "keep")
    effort = runner.effort_for(args.suite, args.device)
    if args.repeats is not None:
        effort = replace(effort, rounds=args.repeats)
    options = runner.Options(
        effort=effort,
        names=args.baselines,
        quick=args.suite == "quick",
        # What a GPU's cache holds is gone by the time a model comes back to it.
        cold=args.cold or on_gpu,
        device=args.device,
        turns=args.repeats,
    )
    facts = runner.describe_run(args.suite, args.device, options, pages_kept)
    # What makes such a run from its beginning.
    facts["command"] = args.command_line.replace(" --resume", "")
    jobs = _jobs(cases, stacks, options)
    guesses = {job.name: job.guess for job in jobs if job.whole}
    now = session.Session(facts, session.expected_seconds(args.out, args.device, guesses))
    if args.resume and now.resume(args.out):
        done = f"{len(now.finished)} of {len(guesses)} cases are done"
        print(f"going on with {now.path}: {done}", file=sys.stderr)
    else:
        now.facts.update(runner.ceilings(options))
        if args.out is not None:
            stamp = facts["date"].replace(":", "").replace("+0000", "Z")
            now.path = args.out / f"{args.device}-{args.suite}-{stamp}.jsonl"
    try:
        _run(jobs, now, math.inf if args.seconds is None else args.seconds, args.steps)
    finally:
        # Whatever ended it: what it has is shown.
        if now.rows:
            _show(args, now, console)


def _jobs(cases: list[Case], stacks: list[ModelCase], options: Options) -> list[_Job]:
    """Every case; on a GPU us and the yardstick in every case before that.

    There everybody else compiles kernels and tunes them by trial, minutes for some cases: what a
    run is for should not have to wait for it.
    """
    jobs = [_job(case, options) for case in (*cases, *stacks)]
    if not options.on_gpu:
        return jobs
    ours = {"ours"}
    cases = [case for case in cases if ours < {*options.baselines(case)}]
    stacks = stacks if options.names is None or ours < {*options.names} else []
    alone = replace(options, names=("ours",))
    return [*(replace(_job(case, alone), whole=False) for case in (*cases, *stacks)), *jobs]


def _job(case: Case | ModelCase, options: Options) -> _Job:
    from attnres_ext.benchmarks import runner

    label = f"{case.operator} {case.shape} {case.work}" if hasattr(case, "operator") else case.name
    run = partial(runner.run_case, case, options)
    return _Job(case.name, label, runner.rough_seconds(case, options), run)


def _run(jobs: list[_Job], now: Session, seconds: float, steps: bool) -> None:
    from attnres_ext.cli.bench_progress import Display

    end = time.monotonic() + seconds
    finished, begun = now.finished, now.begun
    with Display(now, steps) as display:
        for job in jobs:
            if job.name in (finished if job.whole else begun):
                continue
            begin = time.monotonic()
            if begin > end:
                break
            display.begin(job.name)
            rows = job.run(partial(display.step, job.label))
            took = time.monotonic() - begin
            try:
                now.add(job.name, rows, took, job.whole)
            except OSError as error:
                raise UserError(
                    f"{now.path} cannot be written ({error.strerror}); it holds what it held before"
                ) from None
            display.done(job.label, took)
            _check_context(job.name)


def _check_context(name: str) -> None:
    """Ends the run where the GPU's context is of no use any more: all that follow would fail."""
    import torch

    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise UserError(
            f"in case {name} the GPU was lost to this process ({str(error).splitlines()[0]}); the "
            "cases after it were not run"
        ) from None


def _show(args: argparse.Namespace, now: Session, console: Console) -> None:
    from attnres_ext.cli import bench_display

    for table in bench_display.tables(now.rows):
        console.print(table)
    left = len(now.expected) - len(now.finished)
    if left:
        after = "" if args.seconds is None else f" after {args.seconds} s"
        note = f"{left} of {len(now.expected)} cases were left out{after}"
        if now.path is not None:
            note += "; the same command with --resume goes on"
        console.print(f"[yellow]{note}[/yellow]")
    bench_display.print_notes(console, now.facts, now.rows)
    if now.path is None or not now.path.exists():
        return
    console.print(f"results: {now.path}", soft_wrap=True)
    try:
        page = bench_report.draw(args.out, args.out / bench_report.PAGE, args.command_line)
    except UserError as error:
        console.print(f"no report: {error}", style="yellow", soft_wrap=True, markup=False)
    else:
        console.print(f"report: {page}", soft_wrap=True)
