"""``attnres info``: what is installed, what this machine can run, and the plan for a shape."""

from __future__ import annotations

import argparse
import json

from attnres_ext.cli.arguments import HelpFormatter, add_model_options, number, one_of

_EXAMPLES = """\
examples:
  attnres info
  attnres info --json
  attnres info --shape 9,6,8192,2304 --dtype bfloat16      Kimi Linear 48B: the last block's sites
  attnres info --shape 8,24,8192,7168 --dtype bfloat16     Kimi K3
  attnres info --model 48b --length 131072                 what a decoder keeps

The plan says whether the S sites of a block read its N finished blocks one by one (single pass) or
all at once (two phases), and how many bytes either way has to move. Below it stands how the CUDA
kernels of a site cut their work; ATTNRES_CUDA_CONFIG asks for something else.

What a decoder keeps between tokens does not depend on the residual: the block cache holds one
token's blocks at a time. Its size follows the number of blocks, not that of layers.
"""

_ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``info`` to the parser of ``attnres``."""
    parser = subparsers.add_parser(
        "info",
        help="versions, binaries, instruction sets, devices, and the plan for a shape",
        description="Shows what is installed and what it can run on this machine.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--shape", type=_shape, metavar="N,S,M,D",
        help="finished blocks (embedding included), sites that read them, tokens, hidden size",
    )  # fmt: skip
    model = parser.add_argument_group("state of a decoder")
    add_model_options(model)
    model.add_argument(
        "--length", type=number(int, least=1), default=4096, metavar="TOKENS",
        help="tokens to have room for",
    )  # fmt: skip
    model.add_argument(
        "--batch-size", type=number(int, least=1), default=1, metavar="N", help="sequences"
    )
    parser.add_argument(
        "--dtype", type=one_of(*_ITEMSIZE), default="bfloat16", metavar="DTYPE",
        help=f"of plan and state: one of {', '.join(_ITEMSIZE)}",
    )  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} has {len(parts)} numbers, expected four: N,S,M,D"
        )
    return tuple(number(int, least=1)(part) for part in parts)


def run(args: argparse.Namespace) -> int:
    """Prints the facts, as tables or as JSON."""
    from attnres_ext.cli.facts import collect, collect_plan, collect_state

    facts = collect()
    if args.model:
        facts["state"] = collect_state(
            args.model, args.residual, args.dtype, args.batch_size, args.length
        )
    if args.shape:
        facts["plan"] = collect_plan(args.shape, args.dtype, _ITEMSIZE[args.dtype])
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _print(facts: dict) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=120)
    plan, state = facts.pop("plan", None), facts.pop("state", None)
    for heading, values in facts.items():
        console.print(f"[bold]{heading}[/bold]")
        width = max(map(len, values))
        for name, value in values.items():
            # Printed without wrapping, so that paths can be copied.
            console.print(f"  {name:<{width}}  {_say(value)}", markup=False, soft_wrap=True)
    if plan:
        console.print(f"[bold]plan[/bold] for {plan['shape']}")
        console.print(_table(plan["plans"]))
        console.print("[bold]CUDA kernels[/bold] of a site with an output norm")
        console.print(_table(plan["kernels"]))
    if state:
        console.print(f"[bold]state[/bold] of {state['model']}")
        console.print(_table(state["parts"]))


def _table(rows: list[dict]):
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], int) else "left")
    for row in rows:
        table.add_row(*(_say(value) for value in row.values()))
    return table


def _say(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
