"""Command lines generated from frozen dataclasses.

A stage's flags are the fields of one frozen, keyword-only dataclass: the field gives the name, the type and the
default, `flag(...)` adds help, choices and upstream's short form. `--max_chars` and `--max-chars` are the same flag.

Whatever a user can get wrong raises `UsageError`; `run` prints it as one line and exits with code 2.
"""

import argparse
import dataclasses
import errno
import itertools
import logging
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells say it
# What is wrong with a disk or a path, not with the program.
DISK_ERRORS = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
               errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class UsageError(Exception):
    """A mistake of the user's: what was wrong, the value, and what to do, in one line."""


class NotFound(UsageError, FileNotFoundError):
    """A file, checkpoint or tokenizer that should exist does not."""


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a `UsageError` to pass on."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def flag(default: Any, help: str, *, short: str | None = None, choices: Sequence[str] | None = None,
         aliases: Sequence[str] = (), at_least: float | None = None) -> Any:
    """A dataclass field that is also a command-line flag; `aliases` are other names of it. `parse` checks the limits."""
    metadata = {"help": help, "short": short, "choices": choices, "aliases": aliases, "at_least": at_least}
    return dataclasses.field(default=default, metadata=metadata)


def arguments(help: str) -> Any:
    """A dataclass field, a list, that takes the arguments of the command line that are no flags: one at least."""
    return dataclasses.field(metadata={"help": help, "arguments": True})


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print in two lines."""

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
        value = float(text)  # `2e9` reads better than 2000000000
        if value == int(value):
            return int(text) if "e" not in text.lower() and "." not in text else int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")


def _converter(kind: Any) -> Callable[[str], Any]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        # `int | None`: the flag, when given, has the type that is not None; `int | Literal["auto"]`: either of them.
        plain = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        words = [word for arg in plain if typing.get_origin(arg) is typing.Literal for word in typing.get_args(arg)]
        convert = _converter(plain[0])
        return (lambda text: text if text in words else convert(text)) if words else convert
    return {bool: _parse_bool, int: _parse_int}.get(kind, kind)


def make_parser(config_type: type, *, prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if field.metadata.get("arguments"):
            parser.add_argument(field.name, nargs="+", metavar=field.name.upper(), help=field.metadata["help"])
            continue
        names: list[str] = []
        for name in (field.name, *field.metadata.get("aliases", ())):
            names += dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        if field.metadata.get("short"):
            names.insert(0, field.metadata["short"])
        options: dict[str, Any] = {"dest": field.name, "default": field.default, "help": field.metadata["help"]}
        if hints[field.name] in (bool, bool | None):
            options |= {"nargs": "?", "const": True, "type": _parse_bool}
        else:
            options |= {"type": _converter(hints[field.name]), "choices": field.metadata["choices"]}
        parser.add_argument(*names, **options)
    return parser


def parse(config_type: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str) -> C:
    """Build `config_type` from a command line; raises `UsageError` on a flag or value that does not fit."""
    namespace = make_parser(config_type, prog=prog, description=description).parse_args(argv)
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]  # of a dataclass, which C does not say
        least, value = field.metadata.get("at_least"), getattr(namespace, field.name)
        if least is not None and isinstance(value, int | float) and not value >= least:
            raise UsageError(f"--{field.name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        return config_type(**vars(namespace))
    except ValueError as error:  # raised by `__post_init__`
        raise UsageError(str(error)) from error


def setup_logging() -> None:
    level = os.environ.get("NANOCHAT_LOG", "INFO").upper()
    if level not in LOG_LEVELS:
        raise UsageError(f"NANOCHAT_LOG={os.environ['NANOCHAT_LOG']}: expected one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("jax", "orbax", "urllib3", "httpx", "asyncio", "fsspec", "gcsfs"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the stack of every error that it raises


def invocation(module: str) -> str:
    """How the user started `module`, for usage lines: by `nanochat COMMAND` (nanochat_jax/__main__.py), or itself."""
    command = module.partition(".")[2]
    for word, after in itertools.pairwise([*sys.orig_argv[1:], ""]):
        if Path(word).stem == "nanochat":
            return f"nanochat {command}"
        if word == "-m":
            return f"python -m nanochat_jax {command}" if after == "nanochat_jax" else f"python -m {module}"
    return f"python -m {module}"


def catch_interrupts() -> None:
    """Let Ctrl-C end a program without a traceback while it imports, too, and not be lost in a callback of the garbage
    collector (JAX has one), where Python only reports what is raised: it is sent again."""
    report = sys.unraisablehook

    def unraisable(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(what)

    def uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


def run(main: Callable[[C], int | None], config_type: type[C], *, prog: str, description: str) -> typing.NoReturn:
    """Entry point of every script: parse, run, and turn a `UsageError`, or what is wrong with the disk, into one line and
    exit code 2; Ctrl-C into 130."""
    catch_interrupts()
    try:
        setup_logging()
        code = main(parse(config_type, prog=invocation(prog), description=description))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        print(f"error: {names or 'the disk'}: {error.strerror}", file=sys.stderr)
        code = EXIT_USAGE
    if code == EXIT_INTERRUPTED:  # at once: a device may still compute, and crashes when the interpreter's end takes its memory
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code or 0)
