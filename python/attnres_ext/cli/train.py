"""``attnres train``: a Kimi Linear language model per residual mode, side by side on one text."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_ext.cli.arguments import HelpFormatter, add_fields, number, one_of
from attnres_ext.training.settings import Settings
from attnres_ext.training.split import SCHEDULES

_EXAMPLES = """\
examples:
  # Standard residual against Block AttnRes, on the sources of Python's standard library.
  attnres train --out runs/first

  # All three modes, two seeds each, byte-pair encoding, on a folder of text.
  attnres train --text books/ --tokenizer bpe --residual standard,block,full --seeds 0,1 \\
      --steps 2000 --out runs/books

  # Four GPUs of one machine: every model and optimizer is sharded over them (FSDP2).
  torchrun --nproc-per-node 4 -m attnres_ext train --device cuda --precision bfloat16 \\
      --preset small --batch-size 64 --sequence-length 2048 --compile --out runs/small

  # The same in a pipeline: each GPU has some of the layers, and a batch is 16 microbatches.
  torchrun --nproc-per-node 4 -m attnres_ext train --device cuda --precision bfloat16 \\
      --preset small --batch-size 64 --sequence-length 2048 --out runs/pipeline \\
      --gradient-accumulation 16 --pipeline 4 --schedule Interleaved1F1B

  # After a kill: continues from the last checkpoint, with the settings the run began with.
  attnres train --out runs/books --resume

Arms of one seed start from the same weights and see the same batches, and take turns within every
step, so that their times can be compared on a busy machine. The run's folder holds metrics.jsonl
(an object per arm and step), loss.png, depth_attention.png, summary.json and checkpoints/.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``train`` to the parser of ``attnres``."""
    parser = subparsers.add_parser(
        "train",
        help="train a language model, one arm per residual mode, and compare them",
        description="Trains a Kimi Linear language model once per residual mode and compares.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for everything written"
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="continue the run in DIR, on a CPU bit for bit"
    )
    either.add_argument(
        "--overwrite", action="store_true", help="start again where DIR already holds a run"
    )
    add_fields(parser, Settings, {"run": group})
    _add_pipeline_arguments(parser)


def _add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    # How many processes do a run is no part of it, nor is how they share the work: a run may be
    # resumed in another way.
    group = parser.add_argument_group("pipeline (under torchrun; named again with --resume)")
    group.add_argument(
        "--pipeline", type=number(int, least=2), metavar="P",
        help="have P processes share the layers, in place of sharding each of them",
    )  # fmt: skip
    group.add_argument(
        "--virtual", type=number(int, least=1), metavar="V",
        help="stages on each process (default: as few as the schedule allows)",
    )  # fmt: skip
    group.add_argument(
        "--schedule", type=one_of(*SCHEDULES), metavar="NAME",
        help=f"one of {', '.join(SCHEDULES)} (default: 1F1B)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains, or resumes, and reports; see ``attnres train --help``."""
    from attnres_ext.cli.train_run import resume_run, start_run

    return resume_run(args) if args.resume else start_run(args)
