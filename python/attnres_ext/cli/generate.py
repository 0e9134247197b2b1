"""``attnres generate``: text from a trained model, streamed as it is decoded."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from attnres_ext.cli.arguments import HelpFormatter, number

_EXAMPLES = """\
examples:
  attnres generate --checkpoint runs/first --prompt "def "
  attnres generate --checkpoint runs/first --arm standard --temperature 0
  echo -n "import " | attnres generate --checkpoint runs/first --prompt - > sample.py

The prompt is read in one forward pass (prefill), then each token in a pass of its own (decoding)
with every layer's state, and depth attention reading blocks from a cache in place. Generation ends
after --max-new-tokens or at the end of a document.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds ``generate`` to the parser of ``attnres``."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continues a prompt with a model that `attnres train` has trained.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR",
        help="a run (--out of training; its last checkpoint), a checkpoint, or one arm's folder",
    )  # fmt: skip
    model.add_argument(
        "--arm", metavar="NAME",
        help="which arm of a run, such as full or block-seed1 (default: block, else full, else "
        "standard)",
    )  # fmt: skip
    model.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="what to continue; - reads standard input; nothing begins a document",
    )  # fmt: skip
    text.add_argument(
        "--max-new-tokens", type=number(int, least=0), default=300, metavar="N",
        help="most tokens to generate",
    )  # fmt: skip
    text.add_argument(
        "--temperature", type=number(float, least=0), default=0.8, metavar="T",
        help="0 takes the likeliest token each time, 1 samples from the model's distribution",
    )  # fmt: skip
    text.add_argument(
        "--seed", type=number(int, least=0, most=2**63 - 1), default=0, metavar="N",
        help="the same seed gives the same text",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Streams the prompt and its continuation to stdout, and a line of figures to stderr."""
    import torch

    from attnres_ext.cli.devices import check_device
    from attnres_ext.training.checkpoint import find_arm, load_model
    from attnres_ext.training.errors import UserError
    from attnres_ext.training.files import shown
    from attnres_ext.training.tokenizer import StreamDecoder

    check_device(args.device)
    folder = find_arm(args.checkpoint, args.arm)
    model, tokenizer = load_model(folder, args.device)
    prompt = sys.stdin.buffer.read() if args.prompt == "-" else _prompt_bytes(args.prompt)
    if tokenizer.kind == "bpe":
        try:
            prompt.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompt is not UTF-8, which this model's tokens are: {error}"
            ) from error
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end]
    limit = model.config.model_max_length
    if len(tokens) + args.max_new_tokens > limit:
        raise UserError(
            f"--prompt has {len(tokens)} tokens; with --max-new-tokens {args.max_new_tokens} that "
            f"is more than the {limit} the model was made for"
        )

    decoder = StreamDecoder(tokenizer)
    _write(prompt.decode(errors="replace"))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    stream = model.generate(
        torch.tensor([tokens], device=args.device),
        args.max_new_tokens,
        temperature=args.temperature,
        generator=generator,
    )
    times = [time.perf_counter()]
    for token in stream:
        times.append(time.perf_counter())
        if int(token) == tokenizer.end:
            break
        _write(decoder.feed(int(token)))
    _write(decoder.finish() + "\n")
    print(_figures(shown(folder), len(tokens), times), file=sys.stderr)
    return 0


def _prompt_bytes(text: str) -> bytes:
    # Bytes of the command line that are no UTF-8 arrive as surrogates.
    return text.encode(errors="surrogateescape")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _figures(folder: str, prompt_tokens: int, times: list[float]) -> str:
    line = f"{folder}: {prompt_tokens} prompt tokens, {len(times) - 1} generated"
    if len(times) > 2:
        # The first token comes out of the prefill.
        seconds = times[-1] - times[1]
        line += f", {1e3 * seconds / (len(times) - 2):.1f} ms per decoded token"
    return line
