"""Types and actions for argparse that the subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


class Given(argparse.Action):
    """Stores a value and remembers that the user named it, in ``namespace.given``."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Stores ``values``."""
        setattr(namespace, self.dest, values)
        given = getattr(namespace, "given", {})
        namespace.given = {**given, self.dest: option_string}


class GivenFlag(Given):
    """A switch, off unless named; remembers that the user named it."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        """Switches on."""
        super().__call__(parser, namespace, True, option_string)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the epilog as it was typed."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" tells nobody anything.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def number(
    kind: type, least: float | None = None, above: float | None = None, most: float | None = None
) -> Callable[[str], Any]:
    """A parser for numbers within bounds, which says what it wanted when it refuses."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", least), ("above", above), ("at most", most))
        if bound is not None
    ]
    name = "a whole number" if kind is int else "a number"
    wanted = f"{name} {' and '.join(bounds)}".strip()

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        # Written so that a NaN is refused.
        inside = (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple]:
    """A parser for comma-separated values without repetition."""

    def parse_list(text: str) -> tuple:
        values = tuple(parse(part.strip()) for part in text.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text} names something twice")
        return values

    return parse_list


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for one of a few words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Adds ``--model`` and ``--residual``, which ``model_option.read_config`` reads."""
    group.add_argument(
        "--model", metavar="NAME_OR_FILE", help="a preset of Kimi Linear, or a config.json"
    )
    group.add_argument(
        "--residual", type=one_of("standard", "block", "full"), metavar="MODE",
        help="standard, block or full (default: the model's own)",
    )  # fmt: skip
