"""``attnres train``: a Kimi Linear language model per residual mode, side by side on one text."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnres_ext.cli.arguments import Given, GivenFlag, HelpFormatter, list_of, number, one_of
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
    _add_run_arguments(parser)
    _add_text_arguments(parser)
    _add_model_arguments(parser)
    _add_optimization_arguments(parser)
    _add_machine_arguments(parser)
    _add_pipeline_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--checkpoint-every", type=number(int, least=1), default=50, action=Given, metavar="STEPS",
        help="steps between checkpoints; the last step always has one",
    )  # fmt: skip
    group.add_argument(
        "--keep-checkpoints", type=number(int, least=1), default=1, action=Given, metavar="N",
        help="how many checkpoints stay, the newest ones",
    )  # fmt: skip
    group.add_argument(
        "--validate-every", type=number(int, least=1), default=50, action=Given, metavar="STEPS",
        help="steps between validations",
    )  # fmt: skip
    group.add_argument(
        "--validation-batches", type=number(int, least=1), default=8, action=Given, metavar="N",
        help="batches of a validation, spread over the held-out text",
    )  # fmt: skip


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", default="cpu", action=Given,
        help="cpu, cuda, cuda:1, ...; under torchrun each process takes its own",
    )  # fmt: skip
    group.add_argument(
        "--precision", type=one_of("float32", "bfloat16"), default="float32", action=Given,
        metavar="DTYPE", help="float32, or bfloat16 by autocast (weights stay float32)",
    )  # fmt: skip
    group.add_argument(
        "--gradient-accumulation", type=number(int, least=1), default=1, action=Given, metavar="N",
        help="compute a batch in N parts, one after the other: less memory, same values; the "
        "microbatches of a pipeline",
    )  # fmt: skip
    group.add_argument(
        "--activation-checkpointing",
        action=GivenFlag,
        help="compute sublayers again in the backward: less memory, same values",
    )
    group.add_argument("--compile", action=GivenFlag, help="compile sublayers with torch.compile")


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


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", type=Path, action=Given, metavar="FILE_OR_DIR",
        help="what to learn: a file, a folder with all its text files, or a pipe, whose text the "
        "run keeps (default: the sources of Python's standard library)",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", type=one_of("byte", "bpe"), default="byte", action=Given, metavar="KIND",
        help="byte (any file) or bpe (UTF-8 only; learnt from the training part)",
    )  # fmt: skip
    group.add_argument(
        "--vocab-size", type=number(int, least=300, most=2**20), default=4096, action=Given,
        metavar="N", help="ids of the bpe tokenizer",
    )  # fmt: skip
    group.add_argument(
        "--validation-fraction", type=number(float, above=0, most=0.5), default=0.05, action=Given,
        metavar="SHARE", help="share of the text held out",
    )  # fmt: skip
    group.add_argument(
        "--sequence-length", type=number(int, least=2), default=256, action=Given,
        metavar="TOKENS", help="tokens of a training sequence",
    )  # fmt: skip


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--residual", type=list_of(one_of("standard", "block", "full")),
        default="standard,block", action=Given, metavar="MODES",
        help="arms to train, of standard, block and full, with commas between",
    )  # fmt: skip
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--preset", type=one_of("tiny", "demo", "small"), default="demo", action=Given,
        metavar="NAME", help="size of the model: tiny, demo or small",
    )  # fmt: skip
    either.add_argument(
        "--config", type=Path, action=Given, metavar="FILE",
        help="configuration of the model in JSON, in place of a preset",
    )  # fmt: skip
    group.add_argument(
        "--sublayers-per-block", type=number(int, least=1), action=Given, metavar="N",
        help="attention and MLP sublayers in one block (default: the model's own)",
    )  # fmt: skip


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--steps", type=number(int, least=1), default=300, action=Given, metavar="N",
        help="optimizer steps",
    )  # fmt: skip
    group.add_argument(
        "--seed", "--seeds", dest="seeds", type=list_of(number(int, least=0, most=2**31)),
        default="0", action=Given, metavar="N[,N...]",
        help="each arm is trained once per seed; a seed decides weights and batches",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=number(int, least=1), default=4, action=Given, metavar="N",
        help="sequences per step",
    )  # fmt: skip
    group.add_argument(
        "--learning-rate", type=number(float, above=0), default=4e-3, action=Given, metavar="RATE",
        help="peak of the cosine schedule",
    )  # fmt: skip
    group.add_argument(
        "--final-learning-rate", type=number(float, least=0, most=1), default=0.1, action=Given,
        metavar="SHARE", help="where the cosine ends, as a share of the peak",
    )  # fmt: skip
    group.add_argument(
        "--warmup-steps", type=number(int, least=0), default=20, action=Given, metavar="N",
        help="steps of linear warm-up",
    )  # fmt: skip
    group.add_argument(
        "--weight-decay", type=number(float, least=0), default=0.1, action=Given, metavar="RATE",
        help="AdamW's decay of matrices; vectors have none",
    )  # fmt: skip
    group.add_argument(
        "--gradient-clip", type=number(float, above=0), default=1.0, action=Given, metavar="NORM",
        help="largest gradient norm",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains, or resumes, and reports; see ``attnres train --help``."""
    from attnres_ext.cli.train_run import resume_run, start_run

    return resume_run(args) if args.resume else start_run(args)
