"""Command lines: `flags` makes them from dataclasses, `running` runs a command.

User errors raise `UsageError`. `run` prints them, and errors of disks and pipes, as one line and
exits with code 2.
"""

from nanochat_jax.cli.flags import (
    LARGEST,
    LARGEST_SEED,
    NoFlags,
    arguments,
    count,
    directory_name,
    flag,
    inherited,
    parse,
    run_name,
    user_path,
)
from nanochat_jax.cli.running import (
    EXIT_INTERRUPTED,
    catch_errors,
    guard,
    invocation,
    run,
    run_commands,
    with_flags,
)
