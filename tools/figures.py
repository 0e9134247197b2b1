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
    what was measured, on a CPU with freed memory kept (``benchmarks/memory.py``);
``plain DEVICE SUITE``
    as ``operators``, in a process that does nothing of the kind;
``traffic``, ``intensity``, ``table1``
    what follows from the traffic plan (``tools/derived.py``);
``evidence NAME``
    residual modes at their best learning rates, as ``benchmarks/evidence.py`` keeps them;
``verification``, ``checks``
    every CUDA kernel, and where it was last checked; everything that was run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# As they lie here, without the package around them: none of these needs torch.
from benchmarks import evidence_summary, registry, results, tables, wording  # noqa: E402
from tools import derived  # noqa: E402
from tools.gpu_check.build import sources  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    "README.md",
    "docs/evidence.md",
    "docs/figures.md",
    "docs/performance.md",
    "docs/verification.md",
)

TABLE = re.compile(r"(<!-- figures: ([^>]*?) -->\n).*?(<!-- /figures -->)", re.DOTALL)
#: Whom a table of operators shows beside us and the copy.
RIVALS = {"cpu": ("eager", "compile"), "cuda": ("fla", "eager")}


def runs(folder: Path, kind: type | None = results.Result) -> list[tuple[dict[str, Any], Any]]:
    """Every benchmark run kept in ``folder``, oldest first, and its rows of a kind."""
    found = [results.read(path) for path in results.files(folder)]
    found = [(run, [row for row in rows if isinstance(row, kind)]) for run, rows in found]
    return sorted(found, key=lambda run: run[0]["date"])


def newest(folder: Path, pattern: str) -> dict[str, Any] | None:
    """The newest record of a kind that is one JSON file each."""
    kept = [json.loads(path.read_text()) for path in folder.glob(pattern)]
    return max(kept, key=lambda one: one["date"], default=None)


def best_run(
    folder: Path, device: str, suite: str, plain: bool = False
) -> tuple[dict[str, Any], list[Any], dict[str, tables.Rows]] | None:
    """The run to show, all of its rows, and those of ``suite`` by case.

    The run with most of these cases, so that a filtered one does not hide the others; of several
    the newest.

    Args:
        folder: with results.
        device: "cpu" or "cuda".
        suite: of the benchmark.
        plain: whether in a process that gives freed memory back; that is the same on a GPU.
    """
    names = [case.name for case in registry.select(suite, device=device)]

    def rank(run: tuple[dict[str, Any], list[Any]]) -> tuple[int, str]:
        found = {row.case for row in run[1] if row.contestant == "ours"} & {*names}
        return len(found), run[0]["date"]

    candidates = [
        run
        for run in runs(folder)
        if run[0]["device"] == device
        and rank(run)[0]
        and (device != "cpu" or plain == (run[0].get("pages_kept") is False))
    ]
    if not candidates:
        return None
    run, rows = max(candidates, key=rank)
    cases = tables.by_case(rows)
    return run, rows, {name: cases[name] for name in names if name in cases}


def markdown(header: list[str], rows: list[list[str]], numbers: int = 0) -> list[str]:
    """A table whose last ``numbers`` columns are aligned to the right."""
    texts = len(header) - numbers
    rule = "|" + "---|" * texts + "---:|" * numbers
    return ["| " + " | ".join(cells) + " |" if cells else rule for cells in [header, [], *rows]]


def operators(device: str, suite: str, folder: Path, plain: bool = False) -> list[str]:
    """Our operators' times, against a copy of the same bytes and against the others."""
    chosen = best_run(folder, device, suite, plain)
    if chosen is None:
        return missing(device, suite, plain)
    run, everything, cases = chosen
    table, said = tables.operators(cases.values(), RIVALS[device])
    return [*markdown(*table), "", " ".join([origin(run, everything), *said])]


def plain(device: str, suite: str, folder: Path) -> list[str]:
    """:func:`operators` in a process that gives freed memory back."""
    return operators(device, suite, folder, plain=True)


def origin(record: dict[str, Any], rows: Iterable[Any] = ()) -> str:
    """Below a table: the command behind it, when, of what, and whether the machine was shared."""
    threads = f", {record['threads']} threads" if "threads" in record else ""
    where = f"{wording.processor(record)}{threads}, torch {record['versions']['torch']}"
    command = wording.command(record)
    shared, timed = results.shared_cores(rows)
    words = [f"`{command}`, {record['date'][:10]}, {wording.version(record)}; {where}"]
    words[0] += f", {memory}." if (memory := wording.memory(record)) else "."
    if shared:
        words.append(f"In this run {wording.shared_cores(shared, timed)}.")
    return " ".join([*words, *filter(None, [record.get("note")])])


def missing(device: str, suite: str, plain: bool = False) -> list[str]:
    """In the place of a table that nothing was measured for."""
    options = " --allocator system" if plain else ""
    command = f"attnres bench --device {device} --suite {suite}{options} --out benchmarks/results"
    return [f"Nothing is measured yet; `{command}` does it."]


def limits(device: str, suite: str, folder: Path) -> list[str]:
    """Derived bytes against measured time, and what limits each operator."""
    chosen = best_run(folder, device, suite)
    if chosen is None:
        return missing(device, suite)
    run, rows, cases = chosen
    return [*markdown(*tables.limits(cases)), "", origin(run, rows)]


def host(device: str, folder: Path) -> list[str]:
    """What a call costs."""
    chosen = best_run(folder, device, "all")
    if chosen is None:
        return missing(device, "all")
    run, rows, cases = chosen
    return [*markdown(*tables.host(cases.values())), "", origin(run, rows)]


def models(device: str, folder: Path) -> list[str]:
    """Whole models: of every case the newest run."""
    found: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {}
    for run, rows in runs(folder, results.ModelResult):
        if run["device"] == device:
            for case in dict.fromkeys(row.case for row in rows):
                found[case] = run, rows, [row for row in rows if row.case == case]
    if not found:
        return [*missing(device, "model"), *missing(device, "decode")]
    table = tables.models(row for _, _, rows in found.values() for row in rows)
    origins = dict.fromkeys(origin(run, rows) for run, rows, _ in found.values())
    return [*markdown(*table), "", *origins]


def build(folder: Path) -> list[str]:
    """What a build costs, and what comes out of it."""
    record = newest(folder, "build-*.json")
    if record is None:
        return ["Nothing is measured yet; `python tools/time_build.py` does it."]
    return [*markdown(*tables.build(record)), "", origin(record)]


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
    record = newest(folder, "training-*.json")
    if record is None:
        return ["Nothing is kept yet; `make demo` trains, `tools/figures.py` keeps."]
    table, about = tables.training(record)
    return [
        *markdown(*table),
        "",
        f"`{record['command']}`: {about}, {record['date'][:10]}, {wording.version(record)}; "
        f"{record['machine']['processor']}, torch {record['versions']['torch']}, "
        f"{wording.memory({'device': 'cpu', 'pages_kept': False, **record})}. "
        "Time over standard is the "
        "median over steps of the ratio within a step, with its 95 % interval.",
    ]


def evidence(name: str, folder: Path) -> list[str]:
    """Residual modes at each one's own best learning rate, over paired seeds."""
    path, spread = folder / f"evidence-{name}.json", evidence_summary.spread
    record = json.loads(path.read_text()) if path.is_file() else None
    variants = evidence_summary.summarize(record) if record else []
    if not variants:
        return ["Nothing is kept yet; the command above measures it."]
    design, rates = record["design"], list(variants[0].by_rate)
    header = ["residual", "best rate", "validation loss", f"minus {variants[0].residual}"]
    header += [f"at {rate:g}" for rate in rates]
    rows = [
        [
            one.residual,
            f"{one.best:g}{'*' if one.at_edge else ''}",
            spread(one.by_rate[one.best]),
            spread(one.differences) if one.differences else "–",
            *map(spread, one.by_rate.values()),
        ]
        for one in variants
    ]
    seeds = evidence_summary.complete_seeds(record)
    tokens = design["batch_size"] * design["sequence_length"]
    lines = [
        *markdown(header, rows, numbers=3 + len(rates)),
        "",
        f"`{record['command']}`, {record['date'][:10]}, {wording.version(record)}; "
        f"{record['text']}, {design['steps']} steps of {tokens:,} tokens, {len(seeds)} seeds; "
        "mean ± standard deviation over seeds, nats per token.",
    ]
    if any(one.at_edge for one in variants):
        lines[-1] += " *: at the edge of the sweep, a better rate may lie beyond."
    image = f"images/evidence-{name}.png"
    if (ROOT / "docs" / image).is_file():
        lines += ["", f"![Losses over learning rates, and differences within seeds]({image})"]
    return lines


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
DIRECTIONS = ("forward", "backward")


def tests_of(record: dict[str, Any], operator: str, direction: str) -> str | None:
    """How the tests that run the operator's kernels in a direction went on the GPU.

    Returns:
        "passed", "failed", "passed in part" where time was over before all were run; None if none
        was run.
    """
    operators = (operator, *SHARING.get(operator, ()))
    each_way = f"tests/ops/test_every_kernel.py::test_{operator}"
    prefixes = (*(f"tests/ops/test_{name}.py::" for name in operators), each_way)
    others = tuple(f"-{other}]" for other in DIRECTIONS if other != direction)
    found: dict[str, str] = {}
    not_reached = False
    for part in ("kernels", "tests"):
        entry = record["parts"].get(part, {})
        tests = entry.get("tests", {})
        not_reached |= len(tests) < entry.get("collected", 0)
        found |= {
            name: outcome
            for name, outcome in tests.items()
            if name.startswith(prefixes) and not name.endswith(others)
        }
    failed = [name for name, outcome in found.items() if outcome == "failed"]
    if failed:
        ways = [name for name in found if name.startswith(each_way)]
        bad = [name for name in ways if name in failed]
        if not ways:
            return "failed"
        said = f"failed in {len(bad)} of {len(ways)} ways of launching it" if bad else ""
        other = f"{len(failed) - len(bad)} other tests failed" if len(failed) > len(bad) else ""
        return ", ".join(filter(None, [said or "passed in every way of launching it", other]))
    if "passed" not in found.values():
        return None
    return "passed in part" if not_reached or "unfinished" in found.values() else "passed"


def ships(record: dict[str, Any]) -> bool:
    """Whether the library that was checked held every set of kernels, as one that ships does."""
    sets = {f"sm{number}" for number in record.get("library_sets", ())}
    return "library_sets" not in record or sets >= {path.name for path in _sets()}


def _sets() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("sm*/"))


def last_check(records: list[dict[str, Any]], kernels: str, operator: str, direction: str) -> str:
    """When the kernels of a set ("sm90") last ran on a GPU, and whether that still stands."""
    ran = [
        (record, outcome)
        for record in records
        if kernel_set(record) == kernels
        and (outcome := tests_of(record, operator, direction)) is not None
    ]
    if not ran:
        return "never"
    name = f"{kernels}/{operator}"
    said = []
    for whole in (True, False):
        for record, outcome in [one for one in ran if ships(one[0]) == whole][-1:]:
            found = [tool for tool in CHECKERS if record["parts"].get(tool, {}).get("errors")]
            outcome += f", but {' and '.join(found)} found errors" if found else ""
            when = f"{record['date'][:10]}, {wording.version(record)}, {record['machine']['gpu']}"
            if record["kernels"].get(name) != sources().kernel_hashes(ROOT).get(name):
                then = f"unverified: changed since {when}; then {outcome}"
            else:
                then = f"{outcome}, {when}"
            said.append(then if whole else f"in a library of {kernels} alone, {then}")
    return "; ".join(said)


def verification(folder: Path) -> list[str]:
    """Every CUDA kernel, and how it was last checked."""
    records = gpu_checks(folder)
    rows = []
    for source in (path for folder in _sets() for path in sorted(folder.glob("*.cu"))):
        operator = source.stem
        body = (ROOT / "tests" / "simt" / f"test_{operator}.py").is_file()
        launchers = re.findall(rf"launch_{operator}_(\w+)<", source.read_text())
        rows += [
            [
                f"`{operator}` {direction}",
                source.parent.name,
                "every test run*" if body else "no",
                "every test run*",
                last_check(records, source.parent.name, operator, direction),
            ]
            for direction in launchers
        ]
    header = ["kernel", "set", "body run on a CPU", "machine code read", "run on a GPU"]
    return markdown(header, rows, numbers=0)


def checks(folder: Path) -> list[str]:
    """Every part of every check on a GPU, the newest first."""
    records = gpu_checks(folder)
    if not records:
        return ["Nothing has run on a GPU yet; `make gpu-check` does it."]
    return markdown(*tables.checks(reversed(records)))


TABLES = {
    table.__name__: table
    for table in (
        operators, plain, training, evidence, verification, checks, limits, host, models, build,
        traffic, intensity, table1,
    )
}  # fmt: skip


def render(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every table in it written anew from the results in ``folder``."""

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return match[1] + "\n".join(["", *TABLES[name](*arguments, folder), "", match[3]])

    return TABLE.sub(replace, text)


def add_training(run_folder: Path, folder: Path) -> Path:
    """Keeps the summary of a training run, with the machine that made it."""
    from attnres_ext.benchmarks import machine, memory
    from attnres_ext.training.files import write_json

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
        "pages_kept": memory.pages_kept(keep=False),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "arms": summary["arms"],
    }
    path = folder / f"training-{stamp:%Y-%m-%dT%H%M%SZ}.json"
    write_json(path, record)
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
    if not arguments.check:
        from attnres_ext.training.files import write_text
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        new = render(text)
        if new != text:
            stale.append(name)
            if not arguments.check:
                write_text(path, new)
    for name in stale:
        print(f"{name}: {'out of date' if arguments.check else 'written'}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
