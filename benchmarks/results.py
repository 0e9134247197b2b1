"""Results as JSON lines.

The first line says where and how, every other line is one contestant in one case: of an operator
(``"kind": "result"``) or of a whole model (``"kind": "model"``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: Raised when a reader of older files would misread newer ones.
FORMAT = 1
#: How often the system itself interrupts a program on a quiet machine, generously; each time costs
#: a millisecond or so.
_PREEMPTIONS_A_SECOND = 10


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of timing somebody, or why nobody did. Times are seconds per call.

    Attributes:
        status: "timed"; or not timed because "absent" (cannot run here), "unsupported" (does not
            do this), "failed" (raised an error) or "wrong" (the correctness gate refused it).
        reason: why it was not timed.
        seconds: median.
        best_seconds: fastest sample.
        spread: distance between the quartiles, as a share of the median.
        samples: all of them.
        preemptions: how often the system took a core away while this was timed.
        timer: "clock" for the host's clock, "graph" for replays of a CUDA graph between two events,
            "events" for plain CUDA launches between two events.
        error: largest error as a share of what the correctness gate allows.
    """

    status: str
    reason: str = ""
    seconds: float | None = None
    best_seconds: float | None = None
    spread: float | None = None
    samples: tuple[float, ...] = ()
    preemptions: int | None = None
    timer: str = "clock"
    error: float | None = None

    @property
    def shared_cores(self) -> bool:
        """Whether other processes ran on its cores: more than once a sample, and so often that it
        must show in long ones.
        """
        expected = max(len(self.samples), _PREEMPTIONS_A_SECOND * sum(self.samples))
        return (self.preemptions or 0) > expected


@dataclass(frozen=True)
class Result(Measurement):
    """One contestant in one case.

    Attributes:
        case: the case's name.
        operator: the operator's name.
        shape: its shape, for people.
        work: what one call does, for people.
        origin: where the shape comes from.
        contestant: who, or "copy" for the yardstick.
        bytes: what the call must move.
        operations: multiplications and additions on matrices, where the operator has any.
    """

    case: str
    operator: str
    shape: str
    work: str
    origin: str
    contestant: str
    bytes: int | None = None
    operations: int | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None

    @property
    def calls_per_second(self) -> float | None:
        """What the host gets through; of interest where tensors are tiny."""
        return 1 / self.seconds if self.seconds else None


@dataclass(frozen=True)
class ModelResult(Measurement):
    """One residual, by one implementation, in one stack of layers.

    The n-th samples of a case's arms were taken in the same turn.

    Attributes:
        case: the case's name: the work and the stack. All arms of a case take turns.
        work: "train" (forward, backward, optimizer step), "prefill", "decode" (one token) or
            "reads" (of a decoding step, without its sublayers).
        residual: "standard", "block" or "full".
        contestant: whose residual: "ours", "eager", "fla"; "standard" for the standard residual.
        shape: the stack, for people.
        layers: token mixer and MLP each, so two sublayers.
        hidden: D.
        sublayers_per_block: what "block" sums up; the number of blocks follows.
        blocks: sources at the end of the stack with "block", the embedding among them.
        batch: sequences.
        tokens: of each sequence in one call; for "decode" 1.
        context: tokens of each sequence that came before the call.
        dtype: of activations.
        scaling: axes ("layers", "blocks", "tokens", "hidden") that this case is a point of.
        origin: where the shape comes from.
        tokens_per_second: ``batch * tokens / seconds``.
        peak_bytes: most memory that one call held beyond what was there before it.
        overhead: median over the turns of the time over the standard residual's, less one.
        overhead_quartiles: lower and upper quartile of the same.
    """

    case: str
    work: str
    residual: str
    contestant: str
    shape: str
    layers: int
    hidden: int
    sublayers_per_block: int
    blocks: int
    batch: int
    tokens: int
    context: int
    dtype: str
    scaling: tuple[str, ...]
    origin: str
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    overhead: float | None = None
    overhead_quartiles: tuple[float, float] | None = None

    @property
    def sites(self) -> int:
        """How many reads one call makes."""
        return 2 * self.layers + 1


def shared_cores(rows: Iterable[Measurement]) -> tuple[int, int]:
    """How many measurements shared their cores with other processes, and how many there are."""
    timed = [row for row in rows if row.status == "timed"]
    return sum(row.shared_cores for row in timed), len(timed)


_KINDS: dict[str, type[Result] | type[ModelResult]] = {"result": Result, "model": ModelResult}


def write(path: Path, run: dict[str, Any], results: Iterable[Result | ModelResult]) -> None:
    """Writes a run to ``path``, all of it or nothing.

    Args:
        path: the file; its folder is made.
        run: what is common to all results.
        results: the lines.
    """
    # Readers of results need nothing that is compiled.
    from attnres_ext.training.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "run", "format": FORMAT, **run}]
    names = {kind: name for name, kind in _KINDS.items()}
    records += [{"kind": names[type(result)], **_record(result)} for result in results]
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def _record(result: Measurement) -> dict[str, Any]:
    """Who and what first, as people read it, then what was measured."""
    values = asdict(result)
    measured = {field.name: values.pop(field.name) for field in fields(Measurement)}
    return {**values, **measured}


def files(folder: Path) -> list[Path]:
    """Every file of ``folder`` that :func:`read` reads: runs, and GPU checks with figures."""
    checks = [path for path in folder.glob("gpu-check-*.json") if '"figures"' in path.read_text()]
    return sorted([*folder.glob("*.jsonl"), *checks])


def read(path: Path) -> tuple[dict[str, Any], list[Result | ModelResult]]:
    """The run and its results, as :func:`write` or ``make gpu-check`` wrote them.

    Raises:
        ValueError: the file is none of ours, or its format is newer than this reader.
    """
    run: dict[str, Any] | None = None
    rows: list[Result | ModelResult] = []
    for place, record in _records(path):
        try:
            kind = record.pop("kind")
            made = None if kind == "run" else _KINDS[kind]
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{path}, {place}: not a line of benchmark results") from None
        if made is None:
            run = record
            if run.pop("format", None) != FORMAT:
                raise ValueError(f"{path}, {place}: written in another format than {FORMAT}")
        else:
            # JSON knows no tuples.
            fields = {n: tuple(v) if isinstance(v, list) else v for n, v in record.items()}
            try:
                rows.append(made(**fields))
            except TypeError as error:
                problem = str(error).removeprefix(f"{made.__name__}.__init__() ")
                raise ValueError(f"{path}, {place}: {problem}") from None
    if run is None:
        raise ValueError(f"{path}: has no line that says where it was measured")
    return run, rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a run, or the figures in a GPU check, and where each stands."""
    # Bytes that are no text end in a line that is none of ours.
    text = path.read_text("utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            parts = json.loads(text)["parts"].values()
            figures = [part["figures"] for part in parts if "figures" in part]
            # All on one machine: the first run speaks for all, and the first row of a contestant in
            # a case for the copies beside others.
            rows = {}
            for row in (row for one in figures for row in one["results"]):
                rows.setdefault((row["case"], row["contestant"], row.get("residual")), row)
            records = [figures[0]["run"], *rows.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{path}: not a GPU check with figures") from None
        for number, record in enumerate(records, start=1):
            yield f"figure {number}", record
        return
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield f"line {number}", json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a line of benchmark results") from None
