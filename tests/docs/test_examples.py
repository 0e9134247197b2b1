"""What the documentation says: examples run, links lead somewhere, commands and schemas exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from attnres_ext import _native  # noqa: F401  (registers the operators)
from attnres_ext.cli.main import make_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
#: Code in running text that looks like a file of ours.
MENTIONED = re.compile(r"`((?:csrc|cmake|python|tests|benchmarks|docs|examples|tools)/[\w./-]+)`")
COMMAND = re.compile(r"(?:^|`)((?:attnres|make) [^`\n]*)", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[tuple[int, str]]:
    """Code blocks of a document, with the number of lines above each."""
    text = read(name)
    return [
        (text[: match.start(2)].count("\n"), match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


def prose(name: str) -> str:
    return FENCE.sub("", read(name))


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if blocks(name, "python")])
def test_python_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for lines_above, code in blocks(name, "python"):
        if "from transformers import" in code:
            pytest.importorskip("transformers")
        # Blank lines in front, so that a traceback names the document's own line.
        exec(compile("\n" * lines_above + code, str(ROOT / name), "exec"), namespace)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_exist(name: str) -> None:
    text = prose(name)
    folder = (ROOT / name).parent
    for target in LINK.findall(text):
        if not target.startswith(("https://", "http://", "#")):
            path = folder / target.split("#")[0]
            assert path.exists(), f"{name} links to {target}, which is not there"
    for mentioned in MENTIONED.findall(text):
        if "my_read" not in mentioned:  # the recipe's made-up operator
            assert (ROOT / mentioned).exists(), f"{name} names {mentioned}, which is not there"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_reachable_from_the_readme(name: str) -> None:
    seen, waiting = set(), ["README.md"]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for target in LINK.findall(prose(current)):
            path = (ROOT / current).parent / target.split("#")[0]
            if path.suffix == ".md" and path.exists():
                relative = path.resolve().relative_to(ROOT).as_posix()
                waiting += [relative] if relative not in seen else []
    assert name in seen, f"no document links to {name}"


def shown_commands(name: str) -> list[str]:
    shells = "\n".join(code for _, code in blocks(name, "sh"))
    found = COMMAND.findall(shells) + COMMAND.findall(prose(name))
    return [command.split("#")[0].strip() for command in found]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_understood(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for command in shown_commands(name):
        program, *arguments = shlex.split(command)
        if program == "make":
            wanted = {argument for argument in arguments if "=" not in argument}
            assert wanted <= targets, f"{name} shows `{command}`; the Makefile has {targets}"
        elif arguments and arguments[0].islower():
            # Only subcommands are checked: most of the commands in running text are shortened.
            known = make_parser((arguments[0],))
            complete = len(arguments) > 1 and command in "\n".join(
                code for _, code in blocks(name, "sh")
            )
            if complete:
                known.parse_args(arguments)


def test_documented_schemas_are_the_registered_ones() -> None:
    documented = {}
    for _, block in blocks("docs/operators.md", "text"):
        for lines in re.split(r"\n(?=\S)", block.strip()):
            schema = torch._C.parse_schema("attnres::" + " ".join(lines.split()))
            documented[schema.name] = str(schema)
    registered = {
        schema.name: str(schema)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("attnres::")
    }
    assert documented == registered


def test_every_operator_is_documented() -> None:
    import attnres_ext

    text = read("docs/operators.md") + read("README.md")
    for name in attnres_ext.__all__:
        if not name.startswith("__"):
            assert f"`{name}`" in text, f"{name} is in no document"
