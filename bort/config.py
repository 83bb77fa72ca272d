"""Settings: one frozen dataclass per concern; argparse, config.json and the checks come from it.

A field is made by `option(default, "help")`; its name is the flag (`--batch_size`), its annotation
the type. A dataclass checks itself in `check`, with a message that names the flag and the cure.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import typing
from typing import Any, NoReturn, Sequence, TypeVar

from bort.errors import UserError

Settings = TypeVar("Settings")


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare one field of a settings dataclass: default, help text, and its limits (inclusive)."""
    limits = {"help": text, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=limits)


def required(text: str) -> Any:
    """Declare a field without a default: the flag has to be given."""
    return dataclasses.field(metadata={"help": text})


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose complaint is one line that says where the help is."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser_for(description: str, *classes: type) -> OneLineParser:
    """Return a parser with one flag for each field of the given settings dataclasses."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for cls in classes:
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        group = parser.add_argument_group(cls.__name__, summary)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_flag(group, field, hints[field.name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    needed = field.default is dataclasses.MISSING
    shown = "" if needed or field.default in (None, False, "") else f" (default {field.default})"
    text = (field.metadata["help"] + shown).replace("%", "%%")
    flag = f"--{field.name}"
    if hint is bool:
        group.add_argument(flag, action="store_true", default=field.default, help=text)
        return
    plain = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
    group.add_argument(
        flag,
        type=plain,
        required=needed,
        default=None if needed else field.default,
        choices=field.metadata.get("choices"),
        metavar=None if field.metadata.get("choices") else plain.__name__.upper(),
        help=text,
    )


def parse(description: str, argv: Sequence[str] | None, *classes: type) -> tuple[Any, ...]:
    """Parse `argv` (None: the process's own) into one checked instance of each settings class."""
    parsed = vars(parser_for(description, *classes).parse_args(argv))
    return tuple(build(cls, parsed) for cls in classes)


def build(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """Make and check one settings instance from a dictionary that may hold other keys too."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    settings = cls(**{name: values[name] for name in names if name in values})
    check_limits(settings)
    checker = getattr(settings, "check", None)
    if callable(checker):  # a settings class may have a flag of this name instead
        checker()
    return settings


def check_limits(settings: Any) -> None:
    """Raise `UserError` for the first field outside the limits that its `option` declares."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        if value is None or isinstance(value, str):
            continue
        # Asked the other way round, so that "nan" is outside.
        if low is not None and not value >= low:
            raise UserError(f"--{field.name} {value}: must be at least {low}")
        if high is not None and not value <= high:
            raise UserError(f"--{field.name} {value}: must be at most {high}")


def as_dict(*settings: Any) -> dict[str, dict[str, Any]]:
    """Return the settings as {class name: {field: value}}, the content of config.json."""
    return {type(one).__name__: dataclasses.asdict(one) for one in settings}


def command_of(program: str, *settings: Any) -> str:
    """Return the command line that gives these settings: flags at their default are left out."""
    words = ["python", program]
    for one in settings:
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if value != field.default:
                words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return shlex.join(words)
