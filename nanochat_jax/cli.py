"""Command lines generated from frozen dataclasses.

A script's flags are the fields of one frozen, keyword-only dataclass: the field gives the name, the
type and the default; `flag(...)` adds help, range, choices and upstream's short form. `--max_chars`
and `--max-chars` are the same flag.

User errors raise `UsageError`. `run` prints them, and errors of disks and pipes, as one line and
exits with code 2.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import itertools
import logging
import os
import re
import select
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat_jax.errors import UsageError, naming, one_line

C = TypeVar("C")

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as in shells
EXIT_NO_READER = 141  # the reader of a pipe is gone: a shell's code for SIGPIPE
LARGEST = 2**62  # bound of counts without another limit
LARGEST_SEED = 2**32 - 1  # JAX uses 32 bits of a seed
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


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


def spelled(name: str, value: Any) -> str:
    """The flag `name` with a value, as on a command line."""
    flag_name = f"--{name.replace('_', '-')}"
    return f"no {flag_name}" if value is None else f"{flag_name} {value}"


def same_flag(config_type: type, name: str) -> Any:
    """A copy of another dataclass's field: its default, help and range."""
    field = next(field for field in dataclasses.fields(config_type) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


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


def _converter(kind: Any) -> Callable[[str], Any]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        # `int | None` takes the type that is not None; `int | Literal["auto"]` takes both.
        plain = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        words = [
            word
            for arg in plain
            if typing.get_origin(arg) is typing.Literal
            for word in typing.get_args(arg)
        ]
        convert = _converter(plain[0])
        return (lambda text: text if text in words else convert(text)) if words else convert
    return {bool: _parse_bool, int: _parse_int, str: _parse_text}.get(kind, kind)


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
            continue
        names: list[str] = []
        for name in (field.name, *field.metadata.get("aliases", ())):
            names += dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        if field.metadata.get("short"):
            names.insert(0, field.metadata["short"])
        options: dict[str, Any] = {
            "dest": field.name,
            "default": field.default,
            "help": field.metadata["help"],
        }
        if hints[field.name] in (bool, bool | None):
            options |= {"nargs": "?", "const": True, "type": _parse_bool}
        else:
            convert, check = _converter(hints[field.name]), field.metadata["check"]
            options |= {
                "type": _checked(convert, check) if check else convert,
                "choices": field.metadata["choices"],
            }
        parser.add_argument(*names, **options)
    return parser


def _leave_arguments(config_type: type, argv: Sequence[str]) -> list[str]:
    """`argv` with `--append` as `--append=true`.

    Of a command with positional arguments, yes/no flags take a value only after `=`.
    """
    hints = typing.get_type_hints(config_type)
    names = {
        f"--{spelled}"
        for name, kind in hints.items()
        if kind in (bool, bool | None)
        for spelled in (name, name.replace("_", "-"))
    }
    end = argv.index("--") if "--" in argv else len(argv)
    return [f"{word}=true" if word in names else word for word in argv[:end]] + list(argv[end:])


def _check_range(field: dataclasses.Field, value: Any) -> None:
    least, most, also = field.metadata.get("range", (None, None, None))
    if not isinstance(value, int | float) or value == also:
        return
    wrong = (
        f"at least {least}"
        if least is not None and not value >= least
        # `not`: true for nan as well
        else f"at most {most}"
        if most is not None and not value <= most
        else ""
    )
    if wrong:
        name, alternative = field.name.replace("_", "-"), "" if also is None else f", or {also}"
        raise UsageError(f"--{name} must be {wrong}{alternative}, got {value}")


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
        _check_range(field, getattr(namespace, field.name))
    try:
        return config_type(**vars(namespace))
    except ValueError as error:  # raised by `__post_init__`
        raise UsageError(str(error)) from error


def with_flags(message: str, config_type: type) -> str:
    """`message` with the settings of `config_type` as flags.

    "halve `device_batch_size`, or set `remat=block`" becomes "halve --device-batch-size, or set
    --remat block". Other words in backquotes stay as they are.
    """
    settings = {field.name for field in dataclasses.fields(config_type)}

    def spell(found: re.Match) -> str:
        name, value = found["name"], found["value"]
        if name not in settings:
            return found[0]
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")

    return re.sub(r"`(?P<name>[a-z]\w*)(=(?P<value>[^`]*))?`", spell, message)


class _FlagFormatter(logging.Formatter):
    """Log messages with settings as flags, see `with_flags`."""

    def __init__(self, config_type: type) -> None:
        super().__init__("%(message)s")
        self._config_type = config_type

    def format(self, record: logging.LogRecord) -> str:
        return with_flags(super().format(record), self._config_type)


def setup_logging(config_type: type = NoFlags) -> None:
    level = os.environ.get("NANOCHAT_LOG", "INFO").upper()
    if level not in LOG_LEVELS:
        raise UsageError(
            f"NANOCHAT_LOG={os.environ['NANOCHAT_LOG']}: expected one of {', '.join(LOG_LEVELS)}"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FlagFormatter(config_type))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("jax", "orbax", "urllib3", "httpx", "asyncio", "fsspec", "gcsfs"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Orbax logs the stack of every error that it raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def invocation(module: str) -> str:
    """The command with which the user started `module`, for usage lines.

    `nanochat COMMAND` (nanochat_jax/__main__.py) or `python -m ...`.
    """
    command = module.partition(".")[2]
    for word, after in itertools.pairwise([*sys.orig_argv[1:], ""]):
        if Path(word).stem == "nanochat":
            return f"nanochat {command}"
        if word == "-m":
            return (
                f"python -m nanochat_jax {command}"
                if after == "nanochat_jax"
                else f"python -m {module}"
            )
    return f"python -m {module}"


def catch_errors() -> None:
    """Report Ctrl-C and disk errors without a traceback, also while a program imports.

    In callbacks of the garbage collector (JAX has one), Python does not raise exceptions, only
    reports them. The signal is then sent again, so that Ctrl-C is not lost.
    """
    report = sys.unraisablehook

    def unraisable(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(what)

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        if isinstance(error, UsageError | OSError):
            code = _report(error)
            _flush()
            os._exit(code)
        elif issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


def _disk_error(error: OSError) -> str:
    """File and cause of an operating system error."""
    names = " -> ".join(
        os.fsdecode(name) if isinstance(name, bytes) else str(name)
        for name in (error.filename, error.filename2)
        if name is not None
    )
    if names:
        return f"{names}: {error.strerror}"
    if error.errno == errno.ENOENT:
        try:
            os.getcwd()
        except OSError:
            return "the current directory does not exist any more: change to another one"
    return error.strerror or one_line(error)


def _readers_gone() -> bool:
    """Whether standard output or standard error is a pipe without a reader."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _report(error: UsageError | OSError) -> int:
    """Print an error on one line, except for a closed pipe; returns the exit code."""
    if isinstance(error, BrokenPipeError) and error.filename is None and _readers_gone():
        return EXIT_NO_READER
    logging.getLogger(__name__).debug("where it happened", exc_info=error)
    text = str(error) if isinstance(error, UsageError) else _disk_error(error)
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr)
    return EXIT_USAGE


def _flush() -> None:
    """Write buffered output. Discard what cannot be written, or Python reports it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guard(work: Callable[[], int | None]) -> typing.NoReturn:
    """Run a command and exit with its code.

    A `UsageError` or an operating system error becomes one line and exit code 2. A closed pipe
    exits with 141 without a message, Ctrl-C with 130.
    """
    catch_errors()
    code: Any = None
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for terminals without UTF-8
            sys.stdout.write = naming("standard output")(sys.stdout.write)  # type: ignore[method-assign]
        try:
            code = work()
        except SystemExit as ended:
            code = ended.code
        if sys.stdout is not None:
            with naming("standard output"):
                sys.stdout.flush()
    except (UsageError, OSError) as error:
        code = _report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    _flush()
    # immediately: a device that still computes crashes when the interpreter frees its memory
    if code == EXIT_INTERRUPTED:
        os._exit(code)
    sys.exit(code or 0)


def run(
    main: Callable[[C], int | None],
    config_type: type[C],
    *,
    prog: str,
    description: str | None,
    argv: Sequence[str] | None = None,
) -> typing.NoReturn:
    """Entry point of every script: parse the flags and run `main` with them in `guard`."""

    def work() -> int | None:
        setup_logging(config_type)
        try:
            return main(parse(config_type, argv, prog=invocation(prog), description=description))
        except UsageError as error:
            error.args = (with_flags(str(error), config_type),)
            raise

    guard(work)


def run_commands(
    commands: Mapping[str, tuple[Callable[..., int | None], type, str]], *, default: str, prog: str
) -> typing.NoReturn:
    """Entry point of a module whose first argument may name a command.

    `commands` gives the function, flags and description of each.
    """
    argv = sys.argv[1:]
    if argv[:1] == ["--"]:
        del argv[0]
    named = bool(argv) and argv[0] in commands

    def unknown() -> None:
        raise UsageError(f"no command {argv[0]!r}; there are {', '.join(commands)}")

    if argv and not named and not argv[0].startswith("-"):
        guard(unknown)
    command = argv.pop(0) if named else default
    main, config_type, description = commands[command]
    run(
        main,
        config_type,
        prog=f"{prog} {command}" if named else prog,
        description=description,
        argv=argv,
    )
