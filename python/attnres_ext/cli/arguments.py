"""Types of arguments that the subcommands share, and options from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from attnres_ext.fields import Wanted, plain, wanted_by
from attnres_ext.residual_variants import MODES
from attnres_ext.training.files import shown


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the epilog as it was typed."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" tells nobody anything.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    groups: Mapping[str, argparse._ArgumentGroup],
) -> None:
    """Adds an option for each field of a dataclass, in its group; see :func:`given_fields`.

    A field's metadata has ``help``, ``group``, and where they differ from what argparse would take,
    ``metavar`` and ``options``; of fields with the same ``either`` one is given.

    Args:
        parser: Where to add them.
        cls: A dataclass of fields made with :func:`attnres_ext.fields.field`.
        groups: Groups of ``parser`` that are there already, by title.
    """
    groups, either = dict(groups), {}
    for field in dataclasses.fields(cls):
        about, wanted = field.metadata, wanted_by(cls)[field.name]
        title = about["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        if name := about.get("either"):
            group = either.get(name) or either.setdefault(
                name, group.add_mutually_exclusive_group()
            )
        help = about["help"]
        if wanted.kind is bool:
            form: dict[str, Any] = {"action": "store_true"}
        else:
            parse = _argument(wanted)
            form = {"type": list_of(parse) if wanted.collection else parse}
            form["metavar"] = about.get("metavar")
            if field.default is not None:
                help += f" (default: {typed(field.default)})"
        # What is not named is not there: the dataclass has the defaults.
        group.add_argument(
            *options_of(field), dest=field.name, default=argparse.SUPPRESS, help=help, **form
        )


def given_fields(args: argparse.Namespace, cls: type) -> dict[dataclasses.Field, Any]:
    """The fields that the user named, with their values."""
    return {
        field: getattr(args, field.name)
        for field in dataclasses.fields(cls)
        if hasattr(args, field.name)
    }


def options_of(field: dataclasses.Field) -> tuple[str, ...]:
    """What a field is called on the command line."""
    return field.metadata.get("options") or ("--" + field.name.replace("_", "-"),)


def typed(value: Any) -> str:
    """A field's value as the user would type it."""
    value = plain(value)
    return shown(",".join(map(str, value)) if isinstance(value, list) else str(value))


def _argument(wanted: Wanted) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return wanted.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def number(kind: type, **bounds: float) -> Callable[[str], Any]:
    """A parser for numbers within the bounds of :class:`attnres_ext.fields.Wanted`."""
    return _argument(Wanted(kind, **bounds))


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for one of a few words."""
    return _argument(Wanted(str, one_of=choices))


def list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple]:
    """A parser for comma-separated values without repetition."""

    def parse_list(text: str) -> tuple:
        values = tuple(parse(part.strip()) for part in text.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"is {text!r}, expected each once")
        return values

    return parse_list


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Adds ``--model`` and ``--residual``, which ``model_option.read_config`` reads."""
    group.add_argument(
        "--model", metavar="NAME_OR_FILE", help="a preset of Kimi Linear, or a config.json"
    )
    group.add_argument(
        "--residual", type=one_of(*MODES), metavar="MODE",
        help="standard, block or full (default: the model's own)",
    )  # fmt: skip
