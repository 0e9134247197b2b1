"""The page: whole, true to the records, plain about what is missing, and written at once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnres_ext.benchmarks.report import kept, notices, page
from attnres_ext.benchmarks.report.sections import builds, operators
from attnres_ext.cli.main import main
from tests.benchmarks import made_up

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
#: Attributes by which a page can fetch something.
FETCHING = {"src", "srcset", "data", "poster", "action", "background"}
NEW = made_up.facts("2026-01-01")


class Page(HTMLParser):
    """Checks nesting while it reads, and remembers what a reader would look for."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.referred: set[str] = set()
        self.fetches: list[str] = []
        self.pictures: list[str] = []
        self.numbers: set[float] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        self.fetches += [key for key in values if key in FETCHING]
        self.fetches += [name] * (name in ("link", "iframe", "object", "embed", "image"))
        self.identifiers += [values["id"]] if "id" in values else []
        for key in ("href", "xlink:href"):
            if key in values:
                assert values[key].startswith("#"), "a link out of the page"
                self.referred.add(values[key][1:])
        self.referred |= {*values.get("aria-labelledby", "").split()}
        self.referred |= {*re.findall(r"url\(#(.*?)\)", values.get("clip-path", ""))}
        if name == "data":
            self.numbers.add(float(values["value"]))
        if name == "svg":
            self.pictures.append(values["aria-label"])
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name != "meta":
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & {*self.open}:
            return
        self.text += data
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.folder(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def source(folder: Path) -> str:
    return page.render(kept.load(folder), made_up.HASHES, "attnres bench report DIR")


@pytest.fixture(scope="module")
def parsed(source: str) -> Page:
    return Page(source)


def a_run(*rows: object, **facts: object) -> kept.Run:
    return kept.Run("a.jsonl", {**NEW, **facts}, rows)


def test_the_page_is_whole_in_itself(source: str, parsed: Page) -> None:
    assert parsed.fetches == []
    assert not re.search(r"https?:|@import", source)
    assert len(set(parsed.identifiers)) == len(parsed.identifiers)
    assert parsed.referred <= set(parsed.identifiers)
    # In the page's own colours, which change with the reader's; none is left of how they are drawn.
    assert "var(--ours)" in source
    assert "#00000" not in source


def test_the_committed_results_make_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "page.html"
    assert main(["bench", "report", str(RESULTS), "--html", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    everything, parsed = kept.load(RESULTS), Page(target.read_text())
    rows = [row for run in everything.runs for row in run.rows]
    assert {row.seconds for row in rows if row.seconds} <= parsed.numbers
    shown = {tuple(cells) for cells in parsed.rows}
    for one in everything.trainings[-1]["arms"]:
        assert any(cells[:2] == (one["arm"], f"{one['parameters']:,}") for cells in shown)
    for record in everything.checks:
        for name, part in record["parts"].items():
            assert any(cells[-3:-1] == (name, part["status"]) for cells in shown)
            assert (part.get("reason") or "") in parsed.text


def test_every_record_is_there_with_its_numbers(folder: Path, parsed: Page) -> None:
    for row in (row for run in kept.load(folder).runs for row in run.rows):
        mine = [
            cells
            for cells in parsed.rows
            if cells[0] == row.case and cells[1].startswith(row.contestant)
        ]
        if row.seconds is None:
            assert any(f"{row.status}: {row.reason}" in cells[1] for cells in mine)
        else:
            assert row.seconds in parsed.numbers
            assert any(cells[5] == str(len(row.samples)) for cells in mine)


def test_figures_are_those_of_the_newest_run(parsed: Page) -> None:
    # 5 ms x 1.2, against 4 ms of a copy, 50 ms of plain PyTorch and 4 ms of torch.compile.
    (mix,) = [cells for cells in parsed.rows if "67 %" in cells]
    assert mix == ["depth_attention", made_up.MIX.shape, "forward", "6.00 ms", "0.2", "67 %",
                   "8.3 ×", "0.67 ×", "–", "–"]  # fmt: skip
    assert "83,333" in parsed.text, "calls per second"
    assert any(cells[2:5] == ["block", "attnres-ext", "250 ms"] for cells in parsed.rows)
    assert "3 min 20 s with 2 at once" in parsed.text


def test_who_was_not_timed_is_named_with_the_reason(parsed: Page) -> None:
    assert "flash-linear-attention not here: fla is not installed & <never> was" in parsed.text
    assert "forward refused: wrong results: gradient of the query is off" in parsed.text
    assert "failed: RuntimeError: no device" in parsed.text
    assert "flash-linear-attention absent: no GPU" in parsed.text
    assert "standard model has no such operation" not in parsed.text.split("Every record")[0]


def test_pictures_say_what_they_show(parsed: Page) -> None:
    said = "\n".join(parsed.pictures)
    assert "depth_attention: shares of a copy's bandwidth, 1 cases" in said
    assert "block, attnres-ext: +2.4 % at 4, +2.8 % at 8, +3.6 % at 16" in said
    assert "80 at 1, 30 at 8, 20.5 at 64" in said
    # A decode step at a single depth is no curve.
    assert "Decode step" not in said


def test_dots_lie_under_their_roofs() -> None:
    roofs = {"copy_gbps_by_mib": {"1": 80.0, "64": 20.0}, "matrix_tflops": {"float32": 99.0}}
    run = a_run(*made_up.operators(), **roofs)
    cards = list(operators(kept.Kept(Path(), (run,)), run.place))
    (card,) = [card for card in cards if card.title == "Under both roofs"]
    # Ours, plain PyTorch and torch.compile, each a dot, and both roofs by name.
    assert "depth_attention: 3 measurements" in card.pictures[0]
    for name in ("20 GB/s", "80 GB/s", "products in float32"):
        assert name in card.pictures[0]


def test_matrix_products_can_be_the_lower_roof() -> None:
    def notes(operations: int, rates: dict[str, float]) -> str:
        copy, ours = (made_up.timed(made_up.MIX, name, 4e-3) for name in ("copy", "ours"))
        run = a_run(copy, replace(ours, operations=operations), matrix_tflops=rates)
        return "\n".join(next(operators(kept.Kept(Path(), (run,)), run.place)).notes)

    # 8 ms at 1 TFLOP/s in the operator's own dtype, or in float32 where that was not measured.
    limit = "alone take 8.00 ms, more than the copy, so 50 % of copy is its limit"
    assert limit in notes(8 * 10**9, {"float32": 1.0})
    assert limit in notes(8 * 10**9, {"float32": 9.0, "bfloat16": 1.0})
    assert notes(3 * 10**9, {"float32": 1.0}) == notes(8 * 10**9, {}) == ""


def test_every_figure_names_its_command(source: str) -> None:
    for drawn in re.findall(r"<figure>(?:(?!</figure>).)*<h3>.*?</figure>", source, re.DOTALL):
        assert re.search(r'<code class="command">(attnres|python) ', drawn)


def test_builds_that_grew_are_marked() -> None:
    def cells(*made: dict[str, object]) -> list[str]:
        records = tuple({**one, "name": "build.json"} for one in made)
        *_, card = builds(kept.Kept(Path(), (), (), records))
        return card.table.rows[0][6:8]

    first = made_up.build("2026-01-01", 50.0)
    second = made_up.build("2026-02-01", 54.5, size=6_500_000)
    assert cells(first, second) == ["1 min 49 s", "6.50 MB"]
    # In small steps: against the best, not against the last.
    third = made_up.build("2026-03-01", 59.0, size=7_000_000)
    assert cells(first, second, third) == ["1 min 58 s **+18 %**", "7.00 MB **+17 %**"]
    # Of other sets or on another machine nothing can be said.
    elsewhere = {**third, "machine": {"processor": "B"}}
    assert cells(first, elsewhere) == ["1 min 58 s", "7.00 MB **+17 %**"]
    assert cells(first, {**third, "cuda_archs": []}) == ["1 min 58 s", "7.00 MB"]


# What to mind


def said(*runs: kept.Run, present: dict[str, object] | None = made_up.HASHES) -> str:
    named = tuple(replace(run, name=f"{i}.jsonl") for i, run in enumerate(runs))
    return "\n".join(notices.notices(kept.Kept(Path(), named), present))


def test_missing_older_and_disturbed_results_are_said_in_plain_words() -> None:
    row = made_up.timed(made_up.MIX, "ours", 1e-3)
    cpu = a_run(row)
    old = a_run(row, **made_up.facts("2026-01-02", device="cuda", csrc=made_up.OLD))
    assert said(cpu, a_run(row, **made_up.facts("2026-01-01", device="cuda"))) == ""
    assert said(cpu).startswith("There is no CUDA result: as far as these files say, no kernel has")
    sentence = said(cpu, old)
    assert sentence.startswith(
        "There is no CUDA result for the present csrc/. The newest is of 2026"
    )
    assert "commit bbbbbbbbbb, and measured older code" in sentence
    # Changes of the other backend make no result old.
    mixed = {**made_up.HASHES["backend_sha256"], "cpu": "e" * 64}
    assert "CUDA" not in said(cpu, replace(old, facts={**old.facts, "backend_sha256": mixed}))
    assert "outside of a checkout" in said(cpu, old, present=None)
    assert "changes that no commit holds: 0.jsonl" in said(a_run(row, modified=True))
    assert "0.jsonl ended after 1 of 3 cases." in said(a_run(row, cases=3))
    busy = a_run(replace(row, preemptions=6))
    assert "In 0.jsonl, 1 of 1 measurements shared their cores" in said(busy)
    # What others replaced disturbs nobody.
    newer = a_run(row, date="2026-01-02T00:00:00+00:00")
    assert "shared their cores" not in said(busy, newer)


def test_cases_that_only_older_code_ran_are_counted() -> None:
    mix, add = (made_up.timed(case, "ours", 1e-3) for case in (made_up.MIX, made_up.ADD))
    old = a_run(mix, add, *made_up.models()[:4], **made_up.facts("2025-12-31", csrc=made_up.OLD))
    assert (
        "2 of 3 CPU cases were last measured with older code than the present csrc/: 0.jsonl."
        in (said(old, a_run(mix)))
    )


# The command


def report(*arguments: object) -> int:
    return main(["bench", "report", *map(str, arguments)])


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.keep(tmp_path, NEW, made_up.operators())
    target = tmp_path / "report.html"
    target.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    assert report(tmp_path) == 2
    assert target.read_text() == "old"
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (None, b"", "holds no results; `attnres bench --out"),
        ("a.jsonl", b"not json\n", "a.jsonl, line 1: not a line of benchmark results"),
        ("a.jsonl", b'{"kind": "run", "format": 1}\n{"kind": "result"}\n', "a.jsonl, line 2: "),
        ("a.jsonl", b'{"kind": "run", "format": 1}\n', "a.jsonl, line 1: does not say its date"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl, line 1: not a line"),
        ("build-1.json", b'{\n  "date": ]', "build-1.json, line 2: not JSON"),
        ("gpu-check-1.json", b"{}", "gpu-check-1.json: does not say its date"),
        ("training-1.json", b"[]", "training-1.json: not a record of results"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    name: str | None,
    content: bytes,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    assert report(tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("attnres bench: ")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path / "nowhere") == 2
    assert "nowhere does not exist; `attnres bench --out" in capsys.readouterr().err


def test_a_damaged_line_among_good_ones_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made_up.keep(tmp_path, NEW, made_up.operators())
    lines = path.read_text().splitlines()
    record = json.loads(lines[3])
    del record["operator"]
    path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]))
    assert report(tmp_path) == 2
    assert f"{path}, line 4: " in capsys.readouterr().err
