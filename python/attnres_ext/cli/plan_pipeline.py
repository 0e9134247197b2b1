"""``attnres plan-pipeline``: which block goes to which rank of a pipeline, and what that costs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_ext.cli.arguments import HelpFormatter, add_model_options, number, one_of
from attnres_ext.parallel.routing import CACHES, GRADIENTS
from attnres_ext.parallel.split import PLACEMENTS

if TYPE_CHECKING:
    from attnres_ext.parallel import PipelinePlan

_EXAMPLES = """\
examples:
  attnres plan-pipeline --model 48b --pipeline 4 --virtual 2
  attnres plan-pipeline --model 48b --pipeline 4 --virtual 2 --placement v --out plan.png
  attnres plan-pipeline --layers 93 --sublayers-per-block 24 --hidden-size 7168 --pipeline 8
  attnres plan-pipeline --model 48b --pipeline 4 --split 6,7,7,7 --world-size 32

Every stage attends over all blocks before it. A rank with several stages keeps blocks, and a hop
brings what it lacks, beside the open sum. Blocks are numbered from 1; block 0 is the embedding.

--gradients chained sends the gradient of every block back over every hop, added in the order of one
process: the same bits. gathered adds on each rank first, and sends as little back as came.

--cache received keeps what a rank was sent or closed, as in the paper; own also keeps what it
finished and the next rank closes.
"""

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``plan-pipeline`` to the parser of ``attnres``."""
    parser = subparsers.add_parser(
        "plan-pipeline",
        help="which block goes to which rank of a pipeline, as tables and as a picture",
        description="Plans the cross-stage cache of a pipeline. Starts no process.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with all routes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png",
        help="draw who holds which block when, for one microbatch",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    add_model_options(model)
    whole = number(int, least=1)
    model.add_argument(
        "--layers", type=whole, metavar="N",
        help="decoder layers, of two sublayers each, in place of --model",
    )  # fmt: skip
    model.add_argument(
        "--sublayers-per-block", type=whole, metavar="S", help="of a block, with --layers"
    )
    model.add_argument("--hidden-size", type=whole, metavar="D", help="with --layers")
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument(
        "--pipeline", type=whole, required=True, metavar="P", help="ranks of the pipeline"
    )
    pipeline.add_argument("--virtual", type=whole, default=1, metavar="V", help="stages of a rank")
    pipeline.add_argument(
        "--placement", type=one_of(*PLACEMENTS), default="loop", metavar="NAME",
        help="loop (1F1B, Interleaved1F1B) or v (ZBV, DualPipeV)",
    )  # fmt: skip
    split = pipeline.add_mutually_exclusive_group()
    split.add_argument(
        "--split", type=_sizes, metavar="N,N,...",
        help="decoder layers of each stage (default: even)",
    )  # fmt: skip
    split.add_argument(
        "--split-sublayers", type=_sizes, metavar="N,N,...",
        help="sublayers of each stage: attention and feed-forward count one each",
    )  # fmt: skip
    pipeline.add_argument(
        "--world-size", type=whole, metavar="N", help="processes there are, to be checked"
    )
    routes = parser.add_argument_group("routes")
    routes.add_argument(
        "--cache", type=one_of(*CACHES), default="own", metavar="WHAT",
        help=f"what a rank keeps: {', '.join(CACHES)}",
    )  # fmt: skip
    routes.add_argument(
        "--gradients", type=one_of(*GRADIENTS), default="chained", metavar="HOW",
        help=" or ".join(GRADIENTS),
    )  # fmt: skip
    routes.add_argument(
        "--frozen-embedding", action="store_true", help="the embedding gets no gradient"
    )
    size = parser.add_argument_group("size")
    size.add_argument(
        "--microbatches", type=whole, default=1, metavar="N", help="microbatches of a step"
    )
    size.add_argument(
        "--tokens", type=whole, default=4096, metavar="N", help="tokens of a microbatch"
    )
    size.add_argument(
        "--dtype", type=one_of(*_ITEMSIZE), default="bfloat16", metavar="DTYPE",
        help=f"of blocks: one of {', '.join(_ITEMSIZE)}",
    )  # fmt: skip


def _sizes(text: str) -> tuple[int, ...]:
    # Zero is for the first stage, which may have the embedding alone.
    return tuple(number(int, least=0)(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Plans, prints the tables or the JSON, and draws the picture."""
    from attnres_ext.cli.pipeline_display import print_plan
    from attnres_ext.parallel import check_world_size, count_traffic, tensor_bytes
    from attnres_ext.training.errors import UserError

    _check_out(args.out)
    num_sublayers, block, hidden = _model(args)
    try:
        if args.world_size is not None:
            check_world_size(args.world_size, args.pipeline)
        plan = _plan(args, num_sublayers, block)
    except ValueError as error:
        raise UserError(str(error).partition(": ")[2] or str(error)) from error
    tensor = tensor_bytes(args.tokens, hidden, _ITEMSIZE[args.dtype])
    described = f"{num_sublayers} sublayers, " + (
        "standard residual" if block is None else f"blocks of {block}"
    )
    described += f", D={hidden} {args.dtype}, microbatches of {args.tokens:,} tokens"
    if args.json:
        facts = {
            "model": described,
            "hash": plan.hash,
            "bytes of a tensor": tensor,
            "traffic": dataclasses.asdict(count_traffic(plan)),
            "plan": dataclasses.asdict(plan),
        }
        print(json.dumps(facts, indent=2))
    else:
        print_plan(plan, described, tensor)
    if args.out is not None:
        from attnres_ext.cli.pipeline_plot import plot_plan

        plot_plan(args.out, plan, described)
        if not args.json:
            print(f"the picture is {args.out}")
    return 0


def _check_out(out: Path | None) -> None:
    from attnres_ext.training.errors import UserError
    from attnres_ext.training.files import check_folder, shown

    if out is None:
        return
    if out.suffix != ".png":
        raise UserError(f"--out {shown(out)} is no name of a picture, expected one in .png")
    if out.is_dir():
        raise UserError(f"--out {shown(out)} is a folder, expected a file")
    if not out.parent.is_dir():
        raise UserError(f"--out {shown(out)}: there is no folder {shown(out.parent)}")
    check_folder("--out", out.parent)


def _model(args: argparse.Namespace) -> tuple[int, int | None, int]:
    """Sublayers, sublayers of a block (None for the standard residual), hidden size."""
    from attnres_ext.cli.model_option import read_config
    from attnres_ext.residual_variants import VARIANTS
    from attnres_ext.training.errors import UserError

    if (args.model is None) == (args.layers is None):
        raise UserError("give either --model, or --layers with what goes with it")
    if args.model is not None:
        config = read_config(args.model, args.residual)
        residual, block = config.residual, config.sublayers_per_block
        if args.sublayers_per_block is not None or args.hidden_size is not None:
            raise UserError("--sublayers-per-block and --hidden-size go with --layers")
        num_sublayers, hidden = config.num_sublayers, config.hidden_size
    else:
        residual, block = args.residual or "block", args.sublayers_per_block
        if args.hidden_size is None:
            raise UserError("--layers needs --hidden-size")
        if VARIANTS[residual].sized and block is None:
            raise UserError("--layers needs --sublayers-per-block, or another --residual")
        num_sublayers, hidden = 2 * args.layers, args.hidden_size
    variant = VARIANTS[residual].of(num_sublayers, block)
    return num_sublayers, variant.sublayers_per_block if variant.num_blocks else None, hidden


def _plan(args: argparse.Namespace, num_sublayers: int, block: int | None) -> PipelinePlan:
    from attnres_ext.parallel import first_sites_of, place_stages, plan_pipeline, split_evenly

    num_stages = args.pipeline * args.virtual
    if args.split_sublayers is not None:
        option, unit, sizes, total = "--split-sublayers", 1, args.split_sublayers, num_sublayers
    elif args.split is not None:
        option, unit, sizes, total = "--split", 2, args.split, num_sublayers // 2
    else:
        option, unit, sizes = "", 2, split_evenly(num_sublayers // 2, num_stages)
        total = sum(sizes)
    what = "layers" if unit == 2 else "sublayers"
    if len(sizes) != num_stages:
        raise ValueError(
            f"split: {option} has {len(sizes)} stages, expected {num_stages}: "
            f"{args.virtual} on each of {args.pipeline} ranks"
        )
    if sum(sizes) != total:
        raise ValueError(
            f"split: {option} adds up to {sum(sizes)} {what}, expected the model's {total}"
        )
    return plan_pipeline(
        num_sublayers,
        block,
        first_sites_of([unit * size for size in sizes]),
        place_stages(args.pipeline, args.virtual, args.placement),
        num_microbatches=args.microbatches,
        cache=args.cache,
        gradients=args.gradients,
        embedding_gradient=not args.frozen_embedding,
    )
