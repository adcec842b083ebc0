"""Running a command: its log, its errors in one line, its exit code."""

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanochat_jax.cli.flags import C, NoFlags, parse
from nanochat_jax.errors import UsageError, naming, one_line

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as in shells
EXIT_NO_READER = 141  # the reader of a pipe has exited: a shell's code for SIGPIPE
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def with_flags(message: str, config_type: type) -> str:
    """`message` with the settings of `config_type` as flags.

    "halve `device_batch_size`, or set `remat=block`" becomes "halve --device-batch-size, or set
    --remat block". Other words in backquotes stay as they are.
    """
    settings = {field.name for field in dataclasses.fields(config_type)}

    def spell(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if name not in settings:
            return match[0]
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")

    return re.sub(r"`(?P<name>[a-z]\w*)(=(?P<value>[^`]*))?`", spell, message)


class _FlagFormatter(logging.Formatter):
    """Prints settings in log messages as flags; see `with_flags`."""

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
    for word, following in itertools.pairwise([*sys.orig_argv[1:], ""]):
        if Path(word).stem == "nanochat":
            return f"nanochat {command}"
        if word == "-m":
            if following == "nanochat_jax":
                return f"python -m nanochat_jax {command}"
            break
    return f"python -m {module}"


def catch_errors() -> None:
    """Report Ctrl-C and disk errors without a traceback, even while a program is importing.

    In callbacks of the garbage collector (JAX has one), Python reports exceptions but does not
    raise them. A Ctrl-C there is sent again.
    """
    report = sys.unraisablehook

    def unraisable(unraised: Any) -> None:
        if issubclass(unraised.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(unraised)

    def uncaught(
        error_type: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        if isinstance(error, UsageError | OSError):
            code = _report(error)
            _flush()
            os._exit(code)
        elif issubclass(error_type, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        else:
            sys.__excepthook__(error_type, error, trace)

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
            return "the current directory no longer exists: change to another one"
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
    """Write buffered output. Discard what cannot be written; Python would report it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guard(work: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its code.

    A `UsageError` or an operating system error becomes one line and exit code 2. A closed pipe
    exits with 141 without a message, Ctrl-C with 130.
    """
    catch_errors()
    code: Any = None
    try:
        if isinstance(stdout := sys.stdout, io.TextIOWrapper):
            stdout.reconfigure(errors="replace")  # for terminals without UTF-8
            stdout.write = naming("standard output")(stdout.write)  # type: ignore[method-assign]
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
    # without cleanup: freeing a device's memory while it computes would crash
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
) -> NoReturn:
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
) -> NoReturn:
    """Entry point of a module whose first argument may name a command.

    `commands` has the function, flags and description of each command by its name.
    """
    argv = sys.argv[1:]
    if argv[:1] == ["--"]:
        del argv[0]
    named = bool(argv) and argv[0] in commands

    def unknown() -> None:
        raise UsageError(f"no command {argv[0]!r}; the commands are {', '.join(commands)}")

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
