"""Settings: one frozen dataclass per concern; argparse, config.json and the checks come from it.

A field is made by `option(default, "help")`; its name is the flag (`--batch_size`), its annotation
the type. The first line of the class's docstring is the title of its flags in --help. A dataclass
checks itself in `check`, with a message that names the flag and the cure.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
import typing
from typing import Any, Collection, Mapping, NoReturn, Sequence, TypeVar

from bort.errors import UserError, quoted, shortened
from bort.files import read_json
from bort.types import JSONMapping, JSONObject

Settings = TypeVar("Settings")
CONFIG_FLAG = "--config"
# What NumPy and MXNet compute with: int64 and float32. A seed may be larger: it is hashed.
_LARGEST = {int: 2**63 - 1, float: 3.4e38}
_SMALLEST = 1.2e-38  # MXNet's parser refuses a float32 below, except 0
MAX_PROCESSES = 1024  # or threads, at a time


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    rerun: bool = True,
) -> Any:
    """Declare one field of a settings dataclass.

    Args:
        default: its value without the flag.
        text: its help.
        choices: the values it may have.
        minimum: the least value, inclusive.
        maximum: the greatest value, inclusive.
        rerun: False when `--config` does not take it over from an earlier run.
    """
    limits = {"help": text, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata={**limits, "rerun": rerun})


def required(text: str) -> Any:
    """Declare a field without a default: the flag has to be given."""
    return dataclasses.field(metadata={"help": text})


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, which says where the help is.

    Its help keeps the lines of the description, commands among them. Arguments have to be UTF-8:
    what they name is recorded in files and shown in messages.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
        self._words: Sequence[str] = ()  # that were parsed last

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; raises `UserError` for a flag that is empty."""
        parsed = super().parse_args(args, namespace)
        _refuse_empty(vars(parsed), self._actions)
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, after a check that they are UTF-8."""
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:
                self.error(f"{quoted(word)}: is not UTF-8; rename the file or folder")
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with status 2.

        An unknown flag is named before a missing one, which may be the same, misspelt.
        """
        if message.startswith("the following arguments are required"):
            unknown = self.without_types().parse_known_args(self._words)[1]
            flags = " ".join(word for word in unknown if word.startswith("--"))
            message = f"unrecognized arguments: {flags}" if flags else message
        if message.startswith("unrecognized arguments"):
            message += self._suggestion(message.split())
        self.exit(2, f"error: {shortened(message)} (see {self.prog} --help)\n")

    def without_types(self) -> OneLineParser:
        """Return a parser that takes the same flags, with any value or none.

        It has all of them, so that an abbreviation means here what it means there.
        """
        lenient = OneLineParser(prog=self.prog, add_help=False)
        for action in self._actions:
            if action.option_strings:
                lenient.add_argument(*action.option_strings, dest=action.dest, nargs="?")
        return lenient

    def _suggestion(self, words: Sequence[str]) -> str:
        """Return the end of an error: the flags that unknown ones resemble, if any."""
        known = [flag for action in self._actions for flag in action.option_strings]
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        close = [flag for name in names for flag in difflib.get_close_matches(name, known, 1)]
        return f"; did you mean {', '.join(close)}?" if close else ""


def parser_for(description: str, *classes: type, without: Collection[str] = ()) -> OneLineParser:
    """Return a parser with one flag for each field of the given settings dataclasses.

    without: names of fields that get no flag.
    """
    parser = OneLineParser(description=description)
    for cls in classes:
        title = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in without:
                _add_flag(group, field, hints[field.name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    needed = field.default is dataclasses.MISSING
    if needed:
        note = " (required)"
    else:
        # 0 == False: a default of 0 is shown.
        unset = field.default is False or field.default in (None, "")
        note = "" if unset else f" (default {field.default})"
    text = (field.metadata["help"] + note).replace("%", "%%")
    flag = f"--{field.name}"
    if hint is bool:
        group.add_argument(flag, action="store_true", default=field.default, help=text)
        return
    value_type = next((t for t in typing.get_args(hint) if t is not type(None)), hint)
    group.add_argument(
        flag,
        type=value_type,
        required=needed,
        default=None if needed else field.default,
        choices=field.metadata.get("choices"),
        metavar=None if field.metadata.get("choices") else value_type.__name__.upper(),
        help=text,
    )


def parse(
    description: str,
    argv: Sequence[str] | None,
    *classes: type,
    config: bool = False,
    renamed: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> tuple[Any, ...]:
    """Parse `argv` (None: the process's own) into one checked instance of each settings class.

    With `config` the program has --config, the config.json of an earlier run: flags that are not
    given are taken from there. `renamed`: for flags of the original programs, such as "--model" or
    "--init gaussian", what to give instead; the program exits with it. `without`: names of fields
    that the program decides itself: they get no flag and keep their default.
    """
    parser = parser_for(description, *classes, without=without)
    _refuse_renamed(parser, sys.argv[1:] if argv is None else argv, renamed or {})
    if config:
        parser.add_argument(
            CONFIG_FLAG,
            metavar="FILE",
            help="rerun a run: take the flags from its config.json; flags given here override "
            "them; to leave out one that the file has, set it to null or false in a copy",
        )
        _use_config(parser, argv, classes)
    parsed = vars(parser.parse_args(argv))
    return tuple(build(cls, parsed) for cls in classes)


def _refuse_empty(parsed: JSONMapping, actions: Sequence[argparse.Action]) -> None:
    """Raise `UserError` for an empty flag, as of an unset shell variable, which meant no flag."""
    config = parsed.get("config")
    cure = f"set it to null in a copy of {config}" if config else "leave the flag out"
    for action in actions:
        if action.option_strings and parsed.get(action.dest) == "" and action.default != "":
            raise UserError(f"--{action.dest}: is empty; give a value, or {cure}")


def _refuse_renamed(parser: OneLineParser, argv: Sequence[str], renamed: Mapping[str, str]) -> None:
    for word, following in zip(argv, [*argv[1:], ""]):
        flag, _, value = word.partition("=")
        for name in (flag, f"{flag} {value or following}"):
            if name in renamed:
                parser.error(f"{name}: {renamed[name]}")


def _use_config(parser: OneLineParser, argv: Sequence[str] | None, classes: Sequence[type]) -> None:
    """Make the values of the file that --config names the defaults of a parser."""
    path = parser.without_types().parse_known_args(argv)[0].config
    if path is None:
        return
    values = read_config(path, classes)
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values


def read_config(path: str, classes: Sequence[type]) -> JSONObject:
    """Return the flags that a config.json holds for settings classes, without those of one run.

    Raises `UserError` when it is of another program or a value is of another type.
    """
    content, by_name = read_json(path, verify=False), {cls.__name__: cls for cls in classes}
    if not isinstance(content, dict) or not content.keys() & by_name.keys():
        raise UserError(f"{CONFIG_FLAG} {path}: is not the config.json of a run of this program")
    values: JSONObject = {}
    for name, settings in content.items():
        if name not in by_name or not isinstance(settings, dict):
            raise UserError(
                f"{CONFIG_FLAG} {path}: {quoted(name)} is not a part of this program's settings"
            )
        values.update(_typed(path, by_name[name], settings))
    return values


def _typed(path: str, cls: Any, settings: JSONMapping) -> JSONObject:
    import msgspec

    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for flag, value in settings.items():
        if flag not in fields:
            raise UserError(f"{CONFIG_FLAG} {path}: {quoted(flag)} is not a flag of this program")
        # To earlier versions an empty text was no flag.
        if value == "" or not fields[flag].metadata.get("rerun", True):
            continue
        try:
            values[flag] = msgspec.convert(value, hints[flag])
        except msgspec.ValidationError as error:
            raise UserError(f"{CONFIG_FLAG} {path}: {flag}: {error}") from None
    return values


def build(cls: type[Settings], values: JSONMapping) -> Settings:
    """Make and check one settings instance from a dictionary that may hold other keys too."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    settings = cls(**{name: values[name] for name in names if name in values})
    check_limits(settings)
    checker = getattr(settings, "check", None)
    if callable(checker):  # a settings class may have a flag of this name instead
        checker()
    return settings


def check_limits(settings: Any) -> None:
    """Raise `UserError` for the first field outside the limits that its `option` declares.

    No number may be infinite, nan, or beyond what MXNet computes with.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices = field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UserError(f"--{field.name} {quoted(value)}: must be one of {', '.join(choices)}")
        if value is None or isinstance(value, str):
            continue
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        # Not `value < low`: "nan" is outside, too.
        if low is not None and not value >= low:
            raise UserError(f"--{field.name} {value}: must be at least {low}")
        if high is not None and not value <= high:
            raise UserError(f"--{field.name} {value}: must be at most {high}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name} {value}: must be a finite number")
        largest = _LARGEST.get(type(value))
        if largest and abs(value) > largest and "seed" not in field.name:
            raise UserError(f"--{field.name} {value}: must be at most {largest:g}")
        if isinstance(value, float) and 0 < abs(value) < _SMALLEST:
            raise UserError(f"--{field.name} {value}: must be 0 or at least {_SMALLEST:g}")


def counts_of(flag: str, text: str, maximum: int | None = None) -> list[int]:
    """Return the numbers of a flag that takes several, as in 5,50.

    Raises `UserError` unless they are whole, at least 1 and at most `maximum`.
    """
    numbers = [int(word) if word.isdecimal() and len(word) < 10 else 0 for word in text.split(",")]
    if min(numbers) < 1 or max(numbers) > (maximum or max(numbers)):
        limit = f"from 1 to {maximum}" if maximum else "of at least 1"
        raise UserError(
            f"{flag} {quoted(text)}: must be whole numbers {limit}, separated by commas"
        )
    return numbers


def as_dict(*settings: Any) -> dict[str, JSONObject]:
    """Return the settings as {class name: {field: value}}, the content of config.json."""
    return {type(each).__name__: dataclasses.asdict(each) for each in settings}


def command_of(program: str, *settings: Any, processes: int = 1) -> str:
    """Return the command line that gives these settings: flags at their default are left out.

    Several processes are started by horovodrun.
    """
    launcher = ["horovodrun", "-np", str(processes)] if processes > 1 else []
    words = [*launcher, "python", program]
    for each in settings:
        for field in dataclasses.fields(each):
            value = getattr(each, field.name)
            if value == field.default:
                continue
            if value is True:
                words += [f"--{field.name}"]
            elif str(value).startswith("-"):  # argparse would take it for a flag
                words += [f"--{field.name}={value}"]
            else:
                words += [f"--{field.name}", str(value)]
    return shlex.join(words)
