"""The page: whole, true to the records, plain about what is missing, and written at once."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnres_ext.benchmarks.report import kept, notices, page
from attnres_ext.benchmarks.report.html import tag, text
from attnres_ext.benchmarks.report.page import CONTENTS
from attnres_ext.benchmarks.report.sections import build, overhead, rivals, roof
from attnres_ext.cli.main import main
from tests.benchmarks import made_up

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
VOID = {"meta", "br", "hr", "link", "img", "input"}
#: Attributes by which a page can fetch something.
FETCHING = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Checks nesting while it reads, and remembers texts, identifiers, links and exact numbers."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.links: list[str] = []
        self.referred: list[str] = []
        self.numbers: list[float] = []
        self.rows: list[list[str]] = []
        self.fetches: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.fetches += [f"{name} {key}" for key in values if key in FETCHING]
        self.fetches += [name] * (name in ("link", "iframe", "object", "embed"))
        if "id" in values:
            self.identifiers.append(values["id"])
        if name == "a":
            self.links.append(values["href"])
        self.referred += (values.get("aria-labelledby") or "").split()
        if name == "data":
            self.numbers.append(float(values["value"]))
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            assert "tr" in self.open
            self.rows[-1].append("")
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
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


def test_nothing_is_fetched_and_all_links_lead_somewhere(source: str, parsed: Page) -> None:
    assert parsed.fetches == []
    assert not re.search(r"https?:|//[\w.]+/|@import|url\(", source)
    assert len(set(parsed.identifiers)) == len(parsed.identifiers)
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.identifiers)
    assert set(parsed.referred) <= set(parsed.identifiers)
    assert set(CONTENTS) <= set(parsed.identifiers)


def test_every_record_is_there_with_its_numbers(folder: Path, parsed: Page) -> None:
    rows = [row for run in kept.load(folder).runs for row in run.rows]
    shown = [cells for cells in parsed.rows if cells and cells[0] in {row.case for row in rows}]
    assert len(shown) == len(rows)
    for row in rows:
        mine = [
            cells for cells in shown
            if cells[0] == row.case and cells[1].startswith(row.contestant)
        ]  # fmt: skip
        if row.seconds is None:
            assert any(row.reason in cells[1] for cells in mine)
        else:
            assert row.seconds in parsed.numbers
            assert any(cells[5] == str(len(row.samples)) for cells in mine)


def test_figures_are_those_of_the_newest_run(parsed: Page) -> None:
    # 5 ms x 1.2, against 4 ms of a copy, 50 ms of plain PyTorch and 4 ms of torch.compile.
    (roof,) = [cells for cells in parsed.rows if "67 %" in cells]
    assert roof[0].startswith(made_up.MIX.shape)
    assert "6.00 ms" in roof
    (bars,) = [cells for cells in parsed.rows if "8.3 × plain PyTorch" in "".join(cells)]
    assert "0.7 × torch.compile, faster than ours" in bars[1]
    assert 50e-3 / (5e-3 * 1.2) in parsed.numbers
    assert "83,333" in parsed.text, "calls per second"


def test_who_was_not_timed_is_named_with_the_reason(parsed: Page) -> None:
    assert "flash-linear-attention not here: fla is not installed & <never> was" in parsed.text
    assert "Liger refused: wrong results: gradient of the query is off" in parsed.text
    assert "failed: RuntimeError: no device" in parsed.text
    # In no model: said once, below the table.
    assert "flash-linear-attention not here: no GPU" in parsed.text
    assert not any(row[0] == "block" and "no GPU" in "".join(row) for row in parsed.rows)
    assert ["4 layers, D256"] in parsed.rows, "a heading above the stack's rows"


def test_a_site_is_held_against_the_strictest_yardstick_there_is(parsed: Page) -> None:
    assert any(row[2:] == ["8.00 ms", "4.00 ms", "one kernel"] for row in parsed.rows)
    assert 8e-3 / 4e-3 in parsed.numbers
    rows = (made_up.timed(made_up.ADD, "ours", 8e-3), made_up.timed(made_up.ADD, "standard", 5e-3))
    older = kept.Run("a.jsonl", made_up.facts("2026-01-01"), rows, ())
    page = Page(str(overhead.section(kept.Kept(Path(), (older,)))))
    assert any(row[2:] == ["8.00 ms", "5.00 ms", "two operators"] for row in page.rows)


def test_who_is_nowhere_is_named_once() -> None:
    rows = (
        *(made_up.timed(case, "ours", 1e-3) for case in (made_up.MIX, made_up.ADD)),
        *(made_up.timed(case, "eager", 5e-3) for case in (made_up.MIX, made_up.ADD)),
        *(made_up.refused(c, "fla", "absent", "no Triton") for c in (made_up.MIX, made_up.ADD)),
        made_up.refused(made_up.MIX, "liger", "absent", "too many sources"),
        made_up.timed(made_up.ADD, "liger", 2e-3),
    )
    run = kept.Run("a.jsonl", made_up.facts("2026-01-01"), rows, ())
    page = Page(str(rivals.section(kept.Kept(Path(), (run,)))))
    assert page.text.count("no Triton") == 1
    cells = ["".join(row) for row in page.rows]
    assert not any("no Triton" in cell for cell in cells)
    assert sum("Liger not here: too many sources" in cell for cell in cells) == 1
    assert sum("2.0 × Liger" in cell for cell in cells) == 1


def test_overhead_over_depth_is_drawn_and_said(parsed: Page) -> None:
    assert "Training step, by layers" in parsed.text
    assert "block, attnres-ext: +2.4 % at 4, +2.8 % at 8, +3.6 % at 16" in parsed.text
    # A decode step at a single depth is no curve, but it is in the table.
    assert "Decode step, by" not in parsed.text
    assert any(cells[:2] == ["block", "attnres-ext"] and "250 ms" in cells for cells in parsed.rows)


def test_the_copy_by_itself_is_drawn_in_order_of_size(parsed: Page) -> None:
    assert "80.0 GB/s at 1 MiB, 30.0 GB/s at 8 MiB, 20.5 GB/s at 64 MiB" in parsed.text


def test_matrix_products_can_be_the_lower_roof() -> None:
    def heading(operations: int, rates: dict[str, float]) -> str:
        rows = (
            made_up.timed(made_up.MIX, "copy", 4e-3),
            made_up.timed(made_up.MIX, "ours", 9e-3, operations=operations),
        )
        run = kept.Run("a.jsonl", made_up.facts("2026-01-01", matrix_tflops=rates), rows, ())
        source = str(roof.section(kept.Kept(Path(), (run,))))
        assert ('class="limit"' in source) == ("products" in Page(source).rows[-1][0])
        return Page(source).rows[-1][0]

    # 8 ms at 1 TFLOP/s in the operator's own dtype, or in float32 where that was not measured.
    assert heading(8 * 10**9, {"float32": 1.0}).endswith("products alone 8.00 ms")
    assert heading(8 * 10**9, {"float32": 9.0, "bfloat16": 1.0}).endswith("products alone 8.00 ms")
    assert "products" not in heading(3 * 10**9, {"float32": 1.0})
    assert "products" not in heading(8 * 10**9, {})


def test_builds_show_steps_and_sizes(parsed: Page) -> None:
    assert "3 min 20 s with 2 at once" in parsed.text
    assert "3 more together" in parsed.text
    assert any(cells[0] == "_ops.sosm_80, machine code" for cells in parsed.rows)
    # What is no device code: 6 MB less 0.7 and 0.4.
    assert 4_900_000 in parsed.numbers


def test_checks_on_a_gpu_are_shown_part_by_part(parsed: Page) -> None:
    assert "not everything passed" in parsed.text
    assert ["racecheck", "failed", "–", "a race & more", "9.00 s"] in parsed.rows
    assert ["tests", "passed", "400 passed, 3 skipped", "–", "61.0 s"] in parsed.rows


def test_builds_that_grew_are_marked() -> None:
    def cells(*made: dict[str, object]) -> list[str]:
        records = tuple({**one, "name": "build.json"} for one in made)
        page = Page(str(build.section(kept.Kept(Path(), (), (), records))))
        (newest,) = [row for row in page.rows if row[0] == made[-1]["date"][:10]]
        return newest[6:8]

    first = made_up.build("2026-01-01", 50.0)
    second = made_up.build("2026-02-01", 54.5, size=6_500_000)
    assert cells(first, second) == ["1 min 49 s", "6.50 MB"]
    # In small steps: against the best, not against the last.
    third = made_up.build("2026-03-01", 59.0, size=7_000_000)
    assert cells(first, second, third) == ["1 min 58 s +18 %", "7.00 MB +17 %"]
    # Of other sets or on another machine nothing can be said.
    elsewhere = {**third, "machine": {"processor": "B"}}
    assert cells(first, elsewhere) == ["1 min 58 s", "7.00 MB +17 %"]
    assert cells(first, {**third, "cuda_archs": []}) == ["1 min 58 s", "7.00 MB"]


def test_every_figure_names_its_command(source: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", source, re.DOTALL)
    assert len(figures) > 8
    for drawn in figures:
        assert re.search(r'<code class="command">(attnres|python) ', drawn)


def test_regressions_are_marked(parsed: Page) -> None:
    (slower,) = [cells for cells in parsed.rows if cells[-1:] == ["slower"]]
    assert made_up.MIX.shape in slower[0]
    assert "+50 %" in slower
    assert "1 of 3 slower" in parsed.text


def test_the_committed_results_make_a_page() -> None:
    everything = kept.load(RESULTS)
    parsed = Page(page.render(everything, None, "attnres bench report benchmarks/results"))
    rows = [row for run in everything.runs for row in run.rows]
    assert {row.seconds for row in rows if row.seconds} <= set(parsed.numbers)


def test_markup_in_records_is_text() -> None:
    assert tag("b", "<i>&", title='"') == '<b title="&quot;">&lt;i&gt;&amp;</b>'
    assert text(["a", None, [tag("br")]]) == "a<br>"


# What to mind


def said(*runs: dict[str, object], present: dict[str, object] | None = made_up.HASHES) -> str:
    rows = (made_up.timed(made_up.MIX, "ours", 1e-3),)
    made = tuple(kept.Run(f"{i}.jsonl", dict(run), rows, ()) for i, run in enumerate(runs))
    return "\n".join(notices.notices(kept.Kept(Path(), made), present))


def test_nothing_to_mind_where_everything_is_of_the_present_sources() -> None:
    assert said(made_up.facts("2026-01-01"), made_up.facts("2026-01-01", device="cuda")) == ""


def test_missing_and_older_results_are_said_in_plain_words() -> None:
    cpu = made_up.facts("2026-01-01")
    assert said(cpu).startswith("There is no CUDA result: as far as these files say, no kernel has")
    old = made_up.facts("2026-01-02", device="cuda", csrc=made_up.OLD)
    sentence = said(cpu, old)
    assert sentence.startswith(
        "There is no CUDA result for the present csrc/. The newest is of 2026"
    )
    assert "commit bbbbbbbbbb, and measured older code" in sentence
    assert "outside of a checkout" in said(cpu, old, present=None)
    assert "changes that no commit holds: 0.jsonl" in said({**cpu, "modified": True})


def test_changes_of_the_other_backend_make_no_result_old() -> None:
    hashes = {"cpu": made_up.HASHES["backend_sha256"]["cpu"], "cuda": "e" * 64}
    cpu, cuda = (
        made_up.facts("2026-01-01", device=device, csrc=made_up.OLD, backend_sha256=hashes)
        for device in ("cpu", "cuda")
    )
    assert said(cpu, cuda).startswith("There is no CUDA result for the present csrc/.")
    assert "CPU" not in said(cpu, cuda)


def test_cases_that_only_older_code_ran_are_counted() -> None:
    old = made_up.facts("2026-01-01", csrc=made_up.OLD)
    new = made_up.facts("2026-01-02")
    cases = (made_up.MIX, made_up.ADD)
    rows = [
        tuple(made_up.timed(case, "ours", 1e-3) for case in some) for some in (cases, cases[:1])
    ]
    runs = (
        kept.Run("old.jsonl", old, rows[0], tuple(made_up.models()[:4])),
        kept.Run("new.jsonl", new, rows[1], ()),
    )
    _, sentence = notices.notices(kept.Kept(Path(), runs), made_up.HASHES)
    assert sentence == (
        "2 of 3 CPU cases were last measured with older code than the present csrc/: old.jsonl."
    )


def test_runs_that_ended_early_are_named() -> None:
    assert "0.jsonl ended after 1 of 3 cases." in said(made_up.facts("2026-01-01", cases=3))
    assert "ended" not in said(made_up.facts("2026-01-01", cases=1))


def test_a_run_that_others_replaced_disturbs_nobody() -> None:
    rows = (made_up.timed(made_up.MIX, "ours", 1e-3, preemptions=6),)
    old = kept.Run("busy.jsonl", made_up.facts("2026-01-01"), rows, ())
    quiet = (made_up.timed(made_up.MIX, "ours", 1e-3),)
    new = kept.Run("quiet.jsonl", made_up.facts("2026-01-02"), quiet, ())
    sentences = notices.notices(kept.Kept(Path(), (old, new)), made_up.HASHES)
    assert not any("shared their cores" in sentence for sentence in sentences)


def test_disturbed_runs_are_named() -> None:
    busy = made_up.timed(made_up.MIX, "ours", 1e-3, preemptions=6)
    made = kept.Run("busy.jsonl", made_up.facts("2026-01-01"), (busy,), ())
    sentences = "\n".join(notices.notices(kept.Kept(Path(), (made,)), made_up.HASHES))
    assert "In busy.jsonl, 1 of 1 measurements shared their cores" in sentences


# The command


def report(*arguments: object) -> int:
    return main(["bench", "report", *map(str, arguments)])


def test_the_command_writes_beside_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.folder(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert report(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} - before == {"report.html"}
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    # Its own page does not disturb the next one.
    assert report(tmp_path, "--html", tmp_path / "new" / "page.html") == 0
    assert Page((tmp_path / "new" / "page.html").read_text()).text


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.keep(tmp_path, made_up.facts("2026-01-01"), made_up.operators())
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
        (None, None, "holds no results; `attnres bench --out"),
        ("a.jsonl", "not json\n", "a.jsonl, line 1: not a line of benchmark results"),
        ("a.jsonl", '{"kind": "run", "format": 1}\n{"kind": "result"}\n', "a.jsonl, line 2: "),
        ("a.jsonl", '{"kind": "run", "format": 1}\n', "a.jsonl, line 1: does not say its date"),
        ("build-1.json", '{\n  "date": ]', "build-1.json, line 2: not JSON"),
        (
            "gpu-check-1.json",
            "{}",
            "gpu-check-1.json: does not say its date",
        ),
        ("training-1.json", "[]", "training-1.json: not a record of results"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl, line 1: not a line"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    name: str | None,
    content: str | bytes | None,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
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
    (tmp_path / "file").write_text("")
    assert report(tmp_path / "file") == 2
    assert "file is not a folder" in capsys.readouterr().err


def test_a_damaged_line_among_good_ones_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made_up.keep(tmp_path, made_up.facts("2026-01-01"), made_up.operators())
    lines = path.read_text().splitlines()
    record = json.loads(lines[3])
    del record["operator"]
    path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]))
    assert report(tmp_path) == 2
    assert f"{path}, line 4: " in capsys.readouterr().err
