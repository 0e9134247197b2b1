"""Entry point of ``attnres``: picks the subcommand, turns user errors into one sentence."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from attnres_ext.training.errors import UserError
from attnres_ext.training.files import shown
from attnres_ext.version import __version__

_SUBCOMMANDS = ("train", "generate", "inspect", "info", "bench", "plan-pipeline")

_DESCRIPTION = """\
Attention Residuals: train a Kimi Linear language model whose layers attend over depth, generate
text with it, and look at the compiled operators underneath.
"""

_EXAMPLES = """\
examples:
  attnres train --out runs/first                      train on Python's own sources, 2 arms
  attnres generate --checkpoint runs/first --prompt "def "
  attnres inspect runs/first --out runs/first/depth   where each layer looks, how large things are
  attnres info                                        what is installed, what this machine can run
  attnres bench --device cpu                          operators against eager and torch.compile
  attnres plan-pipeline --model 48b --pipeline 4      which block goes to which rank, and when

`attnres COMMAND --help` explains each command.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage line would bury it."""

    def error(self, message: str) -> NoReturn:
        """Prints ``message`` on stderr and leaves with exit code 2."""
        # The rest of the sentence is "is VALUE, expected WANTED".
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser(subcommands: Sequence[str] = _SUBCOMMANDS) -> argparse.ArgumentParser:
    """The parser of ``attnres``.

    Args:
        subcommands: Which to know; each one's file is imported.
    """
    parser = _Parser(
        prog="attnres",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnres {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in subcommands:
        module = _module(name)
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``attnres`` and returns its exit code.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        0 after success, 2 after a mistake of the user's, 130 when interrupted.
    """
    # What a terminal's encoding lacks is shown as a question mark, not raised.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else list(argv)
    # The file of a subcommand that is not asked for is not imported, so it cannot be in the way.
    named = argv[:1] if argv and argv[0] in _SUBCOMMANDS else _SUBCOMMANDS
    parser = make_parser(named)
    args, strange = parser.parse_known_args(argv)
    if strange:
        # argparse would refer to the help of `attnres`, which does not list a command's options.
        command = f"{parser.prog} {args.command}"
        words = shlex.join(strange)
        parser.exit(2, f"{command}: unrecognized arguments: {words} (see {command} --help)\n")
    args.command_line = shlex.join(["attnres", *argv])
    module = _module(args.command)
    try:
        code = module.run(args)
        # Where output goes to a file, a full disk is found here and not behind our back.
        sys.stdout.flush()
        return code
    except UserError as error:
        # Under torchrun all processes find the same mistake; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"attnres {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"attnres {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`attnres info | head`): nothing of ours went wrong.
        _drop_output()
        return 0
    except OSError as error:
        # A file that nobody had a better sentence for, or standard output.
        what = shown(error.filename) if error.filename else "the output"
        print(f"attnres {args.command}: {what}: {error.strerror or error}", file=sys.stderr)
        if not error.filename:
            _drop_output()
        return 2


def _module(subcommand: str) -> ModuleType:
    return importlib.import_module(f"attnres_ext.cli.{subcommand.replace('-', '_')}")


def _drop_output() -> None:
    # Python would complain once more when it flushes what is left at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
