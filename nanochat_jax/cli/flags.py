"""Flags from frozen dataclasses.

The fields of one frozen, keyword-only dataclass are the flags of a command: a field gives the name,
the type and the default; `flag(...)` adds help, range, choices and a short form. `--max_chars` and
`--max-chars` are the same flag.
"""

import argparse
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat_jax.errors import UsageError

C = TypeVar("C")

LARGEST = 2**62  # bound of counts without another limit
LARGEST_SEED = 2**32 - 1  # JAX uses 32 bits of a seed


def user_path(text: str) -> Path:
    """`text` as a path with `~` expanded. Raises `UsageError` if the home directory is unknown."""
    if text.split("/")[0] == "~" and os.environ.get("HOME") == "":
        raise UsageError(f"{text}: HOME is empty: set HOME, or give a path without ~")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{text}: the home directory is unknown: set HOME, or give a path without ~"
        ) from error


def directory_name(text: str) -> str:
    """`text` if it is a valid directory name, such as a model tag; else ValueError."""
    if not re.fullmatch(r"\w[\w.+=@-]{0,99}", text):
        raise ValueError(
            f"{text!r} is not a name: use at most 100 letters, digits and . _ - + = @, "
            "the first a letter, a digit or _"
        )
    return text


def run_name(text: str) -> str:
    """`text` if it is a valid run name for Weights & Biases; else ValueError."""
    if not text.isprintable() or len(text) > 128:
        raise ValueError(f"{text!r} is not a name of at most 128 printable characters")
    return text


def flag(
    default: Any,
    help: str,
    *,
    short: str | None = None,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    also: float | None = None,
    check: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
      default: None if omitting the flag has its own meaning; never "".
      aliases: other names of the flag.
      at_least, at_most: the range of a number; every numeric flag has both.
      also: the only valid number outside of the range (-1); `help` explains it.
      check: raises ValueError or `UsageError` for invalid text.
    """
    metadata = {
        "help": help,
        "short": short,
        "choices": choices,
        "aliases": aliases,
        "range": (at_least, at_most, also),
        "check": check,
    }
    return dataclasses.field(default=default, metadata=metadata)


def count(default: int | None, help: str, *, at_least: int = 1, **options: Any) -> Any:
    """A flag for a number of things: 1 to 10^9 unless `options` change the range."""
    return flag(default, help, at_least=at_least, **{"at_most": 10**9} | options)


def inherited(config_type: type, name: str, default: Any = dataclasses.MISSING) -> Any:
    """The flag `name` of another dataclass, with another default if one is given."""
    field = next(field for field in dataclasses.fields(config_type) if field.name == name)
    default = field.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=default, metadata=field.metadata)


def arguments(help: str) -> Any:
    """A dataclass field, a list, for the positional arguments, at least one."""
    return dataclasses.field(metadata={"help": help, "arguments": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoFlags:
    """The flags of a command without flags."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would print two lines."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _parse_int(text: str) -> int:
    try:
        value = float(text)  # `2e9` is easier to read than 2000000000
        if value == int(value):
            return int(text) if "e" not in text.lower() and "." not in text else int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")


def _parse_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {text!r} (an unset variable?)")
    return text


def _converter(hint: Any) -> Callable[[str], Any]:
    """Function from text to a value of the annotated type."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return {bool: _parse_bool, int: _parse_int, str: _parse_text}.get(hint, hint)
    options = typing.get_args(hint)
    literals = [option for option in options if typing.get_origin(option) is typing.Literal]
    words = {word for literal in literals for word in typing.get_args(literal)}
    convert = _converter(options[0])
    return lambda text: text if text in words else convert(text)


def _checked(convert: Callable[[str], Any], check: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        value = convert(text)
        try:
            check(value)
        except (ValueError, UsageError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return checked


def make_parser(config_type: type, *, prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if field.metadata.get("arguments"):
            parser.add_argument(
                field.name,
                nargs="+",
                metavar=field.name.upper(),
                help=field.metadata["help"],
                type=_parse_text,
            )
        else:
            _add_flag(parser, field, hints[field.name])
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    metadata = field.metadata
    names = [metadata["short"]] if metadata.get("short") else []
    for name in (field.name, *metadata.get("aliases", ())):
        names += dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
    options: dict[str, Any] = {"dest": field.name, "default": field.default}
    if hint in (bool, bool | None):
        options |= {"nargs": "?", "const": True, "type": _parse_bool}
    else:
        convert, check = _converter(hint), metadata["check"]
        options |= {
            "type": _checked(convert, check) if check else convert,
            "choices": metadata["choices"],
        }
    parser.add_argument(*names, help=metadata["help"], **options)


def _leave_arguments(config_type: type, argv: Sequence[str]) -> list[str]:
    """`argv` with `--append` as `--append=true`.

    In a command with positional arguments, yes/no flags take a value only after `=`.
    """
    names = {
        f"--{spelling}"
        for name, hint in typing.get_type_hints(config_type).items()
        if hint in (bool, bool | None)
        for spelling in (name, name.replace("_", "-"))
    }
    end = argv.index("--") if "--" in argv else len(argv)
    return [f"{word}=true" if word in names else word for word in argv[:end]] + list(argv[end:])


def check_range(field: dataclasses.Field, value: Any) -> None:
    least, most, also = field.metadata.get("range", (None, None, None))
    if not isinstance(value, int | float) or value == also:
        return
    if least is not None and not value >= least:  # `not`: true for nan as well
        limit = f"at least {least}"
    elif most is not None and not value <= most:
        limit = f"at most {most}"
    else:
        return
    name, alternative = field.name.replace("_", "-"), "" if also is None else f", or {also}"
    raise UsageError(f"--{name} must be {limit}{alternative}, got {value}")


def parse(
    config_type: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str | None
) -> C:
    """Build `config_type` from a command line.

    Raises `UsageError` for an invalid flag or value. The help shows the first line of
    `description`, which is None under `python -OO`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = dataclasses.fields(config_type)  # type: ignore[arg-type]  # C is a dataclass
    if any(field.metadata.get("arguments") for field in fields):
        argv = _leave_arguments(config_type, argv)
    elif argv[:1] == ["--"]:  # `torchrun -m scripts.NAME -- --depth=4`
        del argv[0]
    parser = make_parser(config_type, prog=prog, description=(description or "").partition("\n")[0])
    namespace = parser.parse_args(argv)
    for field in fields:
        check_range(field, getattr(namespace, field.name))
    try:
        return config_type(**vars(namespace))
    except ValueError as error:  # raised by `__post_init__`
        raise UsageError(str(error)) from error
