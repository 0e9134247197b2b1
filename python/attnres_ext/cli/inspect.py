"""``attnres inspect``: where a trained model's sites look, and magnitudes by depth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_ext.cli.arguments import HelpFormatter, list_of, number

if TYPE_CHECKING:
    from attnres_ext.training.data import Document
    from attnres_ext.training.inspection import Inspection

_EXAMPLES = """\
examples:
  attnres inspect runs/first --out runs/first/depth
  attnres inspect runs/first --text books/moby.txt --out depth
  attnres inspect runs/first --arm block-seed0,block-seed1 --out depth

Runs the model forward and backward over windows spread over the text. The folder then holds

  depth_attention.png, depth_attention.csv   mean weight of each source at each site
  sites.csv                                  entropy and top source of each site
  by_depth.png, sublayers.csv                magnitude of outputs, sums and gradients by sublayer

Magnitudes are root mean squares over tokens and channels. Gradients are those of the tokens'
summed losses, in nats, with respect to what a sublayer wrote.
"""

_FILES = (
    "depth_attention.png",
    "by_depth.png",
    "depth_attention.csv",
    "sites.csv",
    "sublayers.csv",
)
_SEQUENCE_LENGTH = 256


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``inspect`` to the parser of ``attnres``."""
    parser = subparsers.add_parser(
        "inspect",
        help="depth attention and magnitudes of a trained model, as tables and pictures",
        description="Looks into the depth of models that `attnres train` has trained.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help="a run (--out of training; its last checkpoint), a checkpoint, or one arm's folder",
    )  # fmt: skip
    parser.add_argument(
        "--arm", type=list_of(str), metavar="NAME[,NAME...]",
        help="which arms, such as block or full-seed1 (default: each residual mode's first seed)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for what is written"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an inspection that is in DIR already"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", type=Path, metavar="FILE_OR_DIR",
        help="what to read; a folder is read with all its text files "
        "(default: the sources of Python's standard library)",
    )  # fmt: skip
    text.add_argument(
        "--sequence-length", type=number(int, least=1), metavar="TOKENS",
        help=f"tokens of a window (default: {_SEQUENCE_LENGTH}, or what model and text have)",
    )  # fmt: skip
    text.add_argument(
        "--sequences", type=number(int, least=1), default=32, metavar="N", help="windows to read"
    )
    text.add_argument(
        "--batch-size", type=number(int, least=1), default=4, metavar="N",
        help="windows read at once",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Inspects every arm asked for, prints a table of each, and writes the files."""
    from attnres_ext.cli.devices import check_device
    from attnres_ext.cli.inspect_display import print_tables
    from attnres_ext.training.data import read_documents
    from attnres_ext.training.files import shown, writing
    from attnres_ext.training.inspection_tables import write_tables

    check_device(args.device)
    _check_vacant(args.out, args.overwrite)
    folders = _folders(args.checkpoint, args.arm)
    source, documents = read_documents(args.text)
    inspections = [_inspect(folder, source, documents, args) for folder in folders]
    title = f"{shown(args.checkpoint)}: {inspections[0].tokens:,} tokens of {source}"
    with writing(f"--out {shown(args.out)}"):
        args.out.mkdir(parents=True, exist_ok=True)
        write_tables(args.out, inspections)
        _plot(args.out, inspections, title)
    print_tables(inspections, title)
    print(f"pictures and tables are in {shown(args.out)}")
    return 0


def _check_vacant(out: Path, overwrite: bool) -> None:
    from attnres_ext.training.errors import UserError
    from attnres_ext.training.files import check_folder, shown

    check_folder("--out", out)
    found = [name for name in _FILES if (out / name).exists()]
    if found and not overwrite:
        raise UserError(f"--out {shown(out)} already holds {found[0]}: --overwrite replaces it")


def _folders(checkpoint: Path, arms: tuple[str, ...] | None) -> list[Path]:
    from attnres_ext.training.checkpoint import find_arm, find_arms

    if arms is not None:
        return [find_arm(checkpoint, arm) for arm in arms]
    # Of each mode the first seed.
    first: dict[str, Path] = {}
    for folder in find_arms(checkpoint):
        first.setdefault(folder.name.split("-")[0], folder)
    return list(first.values())


def _inspect(
    folder: Path, source: str, documents: list[Document], args: argparse.Namespace
) -> Inspection:
    from attnres_ext.training.checkpoint import load_model
    from attnres_ext.training.data import check_utf8, spread_windows, tokenize_documents
    from attnres_ext.training.errors import UserError
    from attnres_ext.training.inspection import inspect_model

    model, tokenizer = load_model(folder, args.device)
    if tokenizer.kind == "bpe":
        check_utf8(source, documents)
    tokens = tokenize_documents(documents, tokenizer)
    limit = model.config.model_max_length
    length = args.sequence_length or min(_SEQUENCE_LENGTH, limit, tokens.numel() - 1)
    if length > limit:
        raise UserError(
            f"--sequence-length {length} is more than the model takes: model_max_length is {limit}"
        )
    if tokens.numel() < length + 1:
        raise UserError(
            f"{source} has {tokens.numel()} tokens, but one window needs {length + 1}: shorten "
            "--sequence-length or give more text"
        )
    # Texts shorter than all windows together are read with overlaps, not over and over.
    count = min(args.sequences, tokens.numel() - length)
    batch_size = min(args.batch_size, count)
    windows = spread_windows(tokens, -(-count // batch_size), batch_size, length)
    batches = [(inputs.to(args.device), targets.to(args.device)) for inputs, targets in windows]
    return inspect_model(folder.name, model, batches)


def _plot(out: Path, inspections: list[Inspection], title: str) -> None:
    from attnres_ext.training.inspection_plots import plot_by_depth
    from attnres_ext.training.plots import DepthMap, plot_depth_attention

    plot_by_depth(out / "by_depth.png", inspections, title)
    maps = [
        DepthMap(
            inspection.arm,
            [site.name for site in inspection.sites],
            [site.sources for site in inspection.sites],
            [site.weights for site in inspection.sites],
        )
        for inspection in inspections
        if inspection.sites
    ]
    if maps:
        plot_depth_attention(
            out / "depth_attention.png", maps, title, f"{inspections[0].tokens:,} tokens"
        )
