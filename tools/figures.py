"""Writes the tables of measured figures into the documentation, so that none is typed by hand.

    python tools/figures.py                            writes every table again
    python tools/figures.py --check                    only says whether one is out of date
    python tools/figures.py --add-training runs/demo   keeps a training run's figures, too

Figures come from ``benchmarks/results/``: ``*.jsonl`` as ``attnres bench --out benchmarks/results``
writes them, ``gpu-check-*.json`` as ``make gpu-check`` does, ``training-*.json`` as
``--add-training`` does, ``build-*.json`` as ``tools/time_build.py`` does. A document names a table
in a comment,

    <!-- figures: operators cpu quick -->
    <!-- /figures -->

and everything between the two comments is replaced. The tables:

``operators DEVICE SUITE``, ``limits DEVICE SUITE``, ``host DEVICE``, ``models DEVICE``,
``training``, ``build``
    what was measured;
``traffic``, ``intensity``, ``table1``
    what follows from the traffic plan (``tools/derived.py``);
``evidence NAME``
    residual modes at their best learning rates, as ``benchmarks/evidence.py`` keeps them;
``verification``
    every CUDA kernel, and where it was last checked.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/evidence.md",
    "docs/figures.md",
    "docs/performance.md",
    "docs/verification.md",
)

TABLE = re.compile(r"(<!-- figures: ([^>]*?) -->\n).*?(<!-- /figures -->)", re.DOTALL)
RIVALS = {"eager": "plain PyTorch", "compile": "torch.compile"}


def load(path: str) -> ModuleType:
    """A Python file of this checkout, by its path: none of these needs torch."""
    stem = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"_{stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


registry, results, sources, wording, builds, evidence_summary = (
    load(f"benchmarks/{name}.py")
    for name in ("registry", "results", "sources", "wording", "builds", "evidence_summary")
)
costs, derived = load("tools/costs.py"), load("tools/derived.py")
seconds, version = wording.seconds, wording.version


def runs(folder: Path) -> list[tuple[dict[str, Any], list[Any]]]:
    """Every benchmark run kept in ``folder``, oldest first."""
    found = [results.read(path) for path in results.files(folder)]
    return sorted(found, key=lambda run: run[0]["date"])


def best_run(
    folder: Path, device: str, suite: str
) -> tuple[dict[str, Any], list[Any], list[Any]] | None:
    """The run to show, and its cases of ``suite``.

    The run with most of these cases, so that a filtered one does not hide the others; then that of
    the largest suite, which meets most rivals; then the newest.
    """
    cases = registry.select(suite, device=device)
    names = {case.name for case in cases}

    def rank(run: tuple[dict[str, Any], list[Any]]) -> tuple[int, int, str]:
        found = {row.case for row in run[1] if row.contestant == "ours" and row.case in names}
        return len(found), registry.SUITES.index(run[0]["suite"]), run[0]["date"]

    candidates = [run for run in runs(folder) if run[0]["device"] == device and rank(run)[0]]
    if not candidates:
        return None
    run, rows = max(candidates, key=rank)
    return run, rows, cases


def markdown(header: list[str], rows: list[list[str]], numbers: int) -> list[str]:
    """A table whose last ``numbers`` columns are aligned to the right."""
    texts = len(header) - numbers
    rule = "|" + "---|" * texts + "---:|" * numbers
    return ["| " + " | ".join(cells) + " |" if cells else rule for cells in [header, [], *rows]]


def operators(device: str, suite: str, folder: Path) -> list[str]:
    """Our operators' times, against a copy of the same bytes and against the others."""
    chosen = best_run(folder, device, suite)
    if chosen is None:
        return missing(device, suite)
    run, everything, cases = chosen
    header = ["operator", "case", "one call", "time", "GB/s", "of copy"]
    header += [f"{name} takes" for name in RIVALS.values()]
    rows = []
    for case in cases:
        by_name = {row.contestant: row for row in everything if row.case == case.name}
        ours, copy = by_name.get("ours"), by_name.get("copy")
        if ours is None or ours.seconds is None:
            continue
        cells = [f"`{case.operator}`", case.shape, case.work, seconds(ours.seconds)]
        moved = copy is not None and copy.seconds is not None
        cells.append(f"{ours.bandwidth / 1e9:.1f}" if moved and ours.bandwidth else "–")
        cells.append(f"{100 * copy.seconds / ours.seconds:.0f} %" if moved else "–")
        for name in RIVALS:
            rival = by_name.get(name)
            timed = rival is not None and rival.seconds is not None
            cells.append(f"{rival.seconds / ours.seconds:.1f} ×" if timed else "–")
        rows.append(cells)
    return [*markdown(header, rows, numbers=5), "", origin(run, everything)]


def origin(record: dict[str, Any], rows: Iterable[Any] = ()) -> str:
    """Below a table: the command behind it, when, of what, and whether the machine was shared."""
    threads = f", {record['threads']} threads" if "threads" in record else ""
    where = f"{wording.processor(record)}{threads}, torch {record['versions']['torch']}"
    command = wording.command(record)
    shared, timed = results.shared_cores(rows)
    busy = f" In this run {wording.shared_cores(shared, timed)}." if shared else ""
    return f"`{command}`, {record['date'][:10]}, {version(record)}; {where}.{busy}"


def missing(device: str, suite: str) -> list[str]:
    """In the place of a table that nothing was measured for."""
    command = f"attnres bench --device {device} --suite {suite} --out benchmarks/results"
    return [f"Nothing is measured yet; `{command}` does it."]


def limits(device: str, suite: str, folder: Path) -> list[str]:
    """Derived bytes against measured time, and what limits each operator."""
    chosen = best_run(folder, device, suite)
    if chosen is None:
        return missing(device, suite)
    run, rows, cases = chosen
    return [*markdown(*costs.limits(rows, cases, wording)), "", origin(run, rows)]


def host(device: str, folder: Path) -> list[str]:
    """What a call costs."""
    chosen = best_run(folder, device, "all")
    if chosen is None:
        return missing(device, "all")
    run, rows, cases = chosen
    return [*markdown(*costs.host(rows, cases, wording)), "", origin(run, rows)]


def models(device: str, folder: Path) -> list[str]:
    """Whole models: of every case the newest run."""
    newest: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    kept = [results.read_models(path) for path in results.files(folder)]
    whole = {id(run): rows for run, rows in kept}
    for run, rows in sorted(kept, key=lambda one: one[0]["date"]):
        by_case: dict[str, list[Any]] = {}
        for row in rows if run["device"] == device else ():
            by_case.setdefault(row.case, []).append(row)
        newest |= {case: (run, found) for case, found in by_case.items()}
    if not newest:
        return [*missing(device, "model"), *missing(device, "decode")]
    rows = [row for _, found in newest.values() for row in found]
    origins = dict.fromkeys(origin(run, whole[id(run)]) for run, _ in newest.values())
    return [*markdown(*costs.models(rows, wording)), "", *origins]


def build(folder: Path) -> list[str]:
    """What a build costs, and what comes out of it."""
    kept = [json.loads(path.read_text()) for path in folder.glob(builds.PATTERN)]
    if not kept:
        return ["Nothing is measured yet; `python tools/time_build.py` does it."]
    record = max(kept, key=lambda one: one["date"])
    return [*markdown(*costs.build(record, wording)), "", origin(record)]


def traffic(folder: Path) -> list[str]:
    """What every operator must move."""
    return markdown(*derived.traffic())


def intensity(folder: Path) -> list[str]:
    """Arithmetic against bytes."""
    return [*markdown(*derived.intensity()), "", derived.ridge()]


def table1(folder: Path) -> list[str]:
    """Traffic of a whole model, by the paper's formulas and by our plan."""
    return markdown(*derived.table1())


def training(folder: Path) -> list[str]:
    """What the newest kept training run came to."""
    kept = [json.loads(path.read_text()) for path in folder.glob("training-*.json")]
    if not kept:
        return ["Nothing is kept yet; `make demo` trains, `tools/figures.py` keeps."]
    record = max(kept, key=lambda one: one["date"])
    header = ["residual", "parameters", "validation loss", "bits per byte", "ms per step"]
    header += ["over standard"]
    rows = []
    for arm in record["arms"]:
        over = arm["overhead"]
        rows.append(
            [
                arm["arm"],
                f"{arm['parameters']:,}",
                _number(arm["val_loss"], 3),
                _number(arm["bits_per_byte"], 3),
                _number(arm["ms_per_step"], 0),
                f"{over['percent']:+.1f} % ({over['low']:+.1f} to {over['high']:+.1f})"
                if over
                else "–",
            ]
        )
    machine = record["machine"]
    return [
        *markdown(header, rows, numbers=5),
        "",
        f"`{record['command']}`: {record['steps']} steps of {record['tokens_per_step']:,} tokens "
        f"on {record['text']}, {record['date'][:10]}, {version(record)}; "
        f"{machine['processor']}, torch {record['versions']['torch']}. Time over standard is the "
        "median over steps of the ratio within a step, with its 95 % interval.",
    ]


def evidence(name: str, folder: Path) -> list[str]:
    """Residual modes at each one's own best learning rate, over paired seeds."""
    path = folder / f"evidence-{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    arms = evidence_summary.summarize(record) if record else []
    if record is None or not arms:
        return ["Nothing is kept yet; the command above measures it."]
    design = record["design"]
    rates = sorted(design["learning_rates"])
    header = ["residual", "best rate", "validation loss", f"minus {arms[0].residual}"]
    header += [f"at {rate:g}" for rate in rates]
    rows = [
        [
            arm.residual,
            f"{arm.best:g}{'*' if arm.at_edge else ''}",
            str(arm.by_rate[arm.best]),
            str(arm.difference or "–"),
            *(str(arm.by_rate[rate]) for rate in rates),
        ]
        for arm in arms
    ]
    seeds = evidence_summary.complete_seeds(record)
    tokens = design["batch_size"] * design["sequence_length"]
    lines = [
        *markdown(header, rows, numbers=3 + len(rates)),
        "",
        f"`{record['command']}`, {record['date'][:10]}, {version(record)}; {record['text']}, "
        f"{design['steps']} steps of {tokens:,} tokens, {len(seeds)} seeds; mean ± standard "
        "deviation over seeds, nats per token.",
    ]
    if any(arm.at_edge for arm in arms):
        lines[-1] += " *: at the edge of the sweep, a better rate may lie beyond."
    image = f"images/evidence-{name}.png"
    if (ROOT / "docs" / image).is_file():
        lines += ["", f"![Losses over learning rates, and differences within seeds]({image})"]
    return lines


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def gpu_checks(folder: Path) -> list[dict[str, Any]]:
    """Every record of ``make gpu-check`` on a GPU, oldest first."""
    kept = [json.loads(path.read_text()) for path in folder.glob("gpu-check-*.json")]
    return sorted((one for one in kept if one["device"] == "cuda"), key=lambda one: one["date"])


def kernel_set(run: dict[str, Any]) -> str:
    """The set of kernels that the run's GPU takes, by its capability (10 * major + minor)."""
    return "sm90" if run["machine"]["compute_capability"] >= 90 else "sm80"


#: Operators that run the kernels of another one.
SHARING = {"depth_attention": ("accumulate_depth_attention", "merge_partial", "block_cache")}
CHECKERS = ("memcheck", "racecheck", "synccheck")


def tests_of(record: dict[str, Any], operator: str) -> str | None:
    """How the tests that run the operator's kernels went on the GPU.

    Returns:
        "passed", "failed", "passed in part" where time was over before all were run; None if none
        was run.
    """
    operators = (operator, *SHARING.get(operator, ()))
    prefixes = tuple(f"tests/ops/test_{name}.py::" for name in operators)
    prefixes += (f"tests/ops/test_every_kernel.py::test_{operator}",)
    outcomes: set[str] = set()
    not_reached = False
    for part in ("kernels", "tests"):
        entry = record["parts"].get(part, {})
        tests = entry.get("tests", {})
        outcomes |= {outcome for name, outcome in tests.items() if name.startswith(prefixes)}
        not_reached |= len(tests) < entry.get("collected", 0)
    if "failed" in outcomes:
        return "failed"
    if "passed" not in outcomes:
        return None
    return "passed in part" if not_reached or "unfinished" in outcomes else "passed"


def last_check(records: list[dict[str, Any]], kernels: str, operator: str) -> str:
    """When the kernels of a set ("sm90") last ran on a GPU, and whether that still stands."""
    ran = [
        record
        for record in records
        if kernel_set(record) == kernels and tests_of(record, operator) is not None
    ]
    if not ran:
        return "never"
    name = f"{kernels}/{operator}"
    record = ran[-1]
    when = f"{record['date'][:10]}, {version(record)}, {record['machine']['gpu']}"
    if record["kernels"].get(name) != sources.kernel_hashes(ROOT).get(name):
        return f"unverified: changed since {when}"
    found = [name for name in CHECKERS if record["parts"].get(name, {}).get("errors")]
    but = f", but {' and '.join(found)} found errors" if found else ""
    return f"{tests_of(record, operator)}{but}, {when}"


def verification(folder: Path) -> list[str]:
    """Every CUDA kernel, and how it was last checked."""
    records = gpu_checks(folder)
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("sm*/*.cu")):
        operator = source.stem
        body = (ROOT / "tests" / "simt" / f"test_{operator}.py").is_file()
        launchers = re.findall(rf"launch_{operator}_(\w+)<", source.read_text())
        rows += [
            [
                f"`{operator}` {direction}",
                source.parent.name,
                "every test run*" if body else "no",
                "every test run*",
                last_check(records, source.parent.name, operator),
            ]
            for direction in launchers
        ]
    header = ["kernel", "set", "body run on a CPU", "machine code read", "run on a GPU"]
    return markdown(header, rows, numbers=0)


TABLES = {
    table.__name__: table
    for table in (
        operators, training, evidence, verification, limits, host, models, build,
        traffic, intensity, table1,
    )
}  # fmt: skip


def render(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every table in it written anew from the results in ``folder``."""

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return match[1] + "\n".join(["", *TABLES[name](*arguments, folder), "", match[3]])

    return TABLE.sub(replace, text)


def write(path: Path, text: str) -> None:
    """Replaces a file at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def add_training(run_folder: Path, folder: Path) -> Path:
    """Keeps the summary of a training run, with the machine that made it."""
    from attnres_ext.benchmarks import machine

    description = json.loads((run_folder / "run.json").read_text())
    summary = json.loads((run_folder / "summary.json").read_text())
    settings = description["settings"]
    date = max(path.stat().st_mtime for path in run_folder.iterdir())
    stamp = datetime.datetime.fromtimestamp(date, datetime.timezone.utc)
    record = {
        "date": stamp.isoformat(timespec="seconds"),
        "command": f"attnres train --preset {description['model']} "
        f"--residual {','.join(settings['residuals'])} "
        f"--steps {settings['steps']} --batch-size {settings['batch_size']} "
        f"--sequence-length {settings['sequence_length']}",
        "text": description["text"]["source"],
        "steps": settings["steps"],
        "tokens_per_step": settings["batch_size"] * settings["sequence_length"],
        "device": settings["device"],
        **machine.code(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "arms": summary["arms"],
    }
    path = folder / f"training-{stamp:%Y-%m-%dT%H%M%SZ}.json"
    write(path, json.dumps(record, indent=2) + "\n")
    return path


def main() -> int:
    """Renders, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a table is out of date")
    parser.add_argument(
        "--add-training", type=Path, metavar="RUN", help="keep the figures of a training run"
    )
    arguments = parser.parse_args()
    if arguments.add_training:
        print(f"kept as {add_training(arguments.add_training, RESULTS)}")
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        new = render(text)
        if new != text:
            stale.append(name)
            if not arguments.check:
                write(path, new)
    for name in stale:
        print(f"{name}: {'out of date' if arguments.check else 'written'}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
