"""Runs Python that a model wrote, in a separate limited process.

This contains accidents (endless loops, memory, endless output, stray files, forks), and is NOT a security boundary:

- the program reads whatever files this user can read;
- its own judge runs in the same interpreter, so code that means to can report a success it did not earn;
- until its time is up it may fill the disk, with as many files of 16 MiB as it can write;
- a fault of the kernel is a way out; and how much is closed depends on the kernel (see `ExecutionResult.confined`):
  without "files" it writes and deletes wherever this user can, without "network" and "syscalls" the network is open and
  a child process that leaves the process group outlives the time limit.

Run code from a model you do not trust in a virtual machine without secrets.
"""

import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_OUTPUT_BYTES = 64 << 10
CHILD = Path(__file__).with_name("execution_child.py")


@dataclass(frozen=True, kw_only=True)
class ExecutionResult:
    """What became of a program.

    Attributes:
        success: it ran to its last line without an exception. Leaving early (`sys.exit(0)`) is no success: whatever
            assertions stood below were not reached.
        stdout: what it printed, at most the first `MAX_OUTPUT_BYTES`.
        stderr: at most the last `MAX_OUTPUT_BYTES`.
        error: None on success, else one line: the exception, the signal or the time limit.
        timeout: it was killed at the time limit.
        memory_exceeded: it ended in a MemoryError.
        confined: measures beyond resource limits that took hold: "network" (a namespace without network), "files"
            (writes only below its temporary directory), "syscalls" (no children, sockets or signals to others).
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timeout: bool
    memory_exceeded: bool
    confined: frozenset[str]


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 256 << 20) -> ExecutionResult:
    """Run `code` as `__main__` of a fresh interpreter: standard library only, no environment, no input, no arguments.

    Safe to call from several threads, and in a process that holds an accelerator (nothing is forked without exec).

    Args:
        code: Python source.
        timeout: wall-clock seconds, after which the whole process group is killed.
        memory_bytes: limit of the address space.
    """
    directory = tempfile.mkdtemp(prefix="nanochat-execution-")
    try:
        Path(directory, "program.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        return _run(directory, timeout, memory_bytes)
    finally:
        _remove(directory)


def _run(directory: str, timeout: float, memory_bytes: int) -> ExecutionResult:
    status_read, status_write = os.pipe()
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]
    command += [str(memory_bytes), str(math.ceil(timeout) + 1), str(status_write)]
    with open(status_read, "rb", buffering=0) as status_pipe:
        try:
            process = subprocess.Popen(
                command, cwd=directory, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, pass_fds=(status_write,), start_new_session=True, bufsize=0,
            )
        finally:
            os.close(status_write)
        with process:
            try:
                timed_out, (stdout, stderr, status) = _collect(process, status_pipe, time.monotonic() + timeout)
            finally:
                _kill_group(process)

    measures, _, end = status.decode("utf-8", "replace").partition("\n")
    lines = stderr.strip().splitlines()
    memory_exceeded = bool(lines) and lines[-1].startswith(b"MemoryError")
    success = not timed_out and process.returncode == 0 and end == "finished\n"
    if success:
        error = None
    elif timed_out:
        error = f"TimeoutError: no end within {timeout:g} s"
    elif process.returncode < 0:
        number = -process.returncode
        error = f"killed by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
    elif process.returncode == 0:
        error = "SystemExit: left before its last line"
    else:
        error = lines[-1].decode("utf-8", "replace") if lines else f"exit code {process.returncode}"
    return ExecutionResult(
        success=success, stdout=stdout.decode("utf-8", "replace"), stderr=stderr.decode("utf-8", "replace"),
        error=error, timeout=timed_out, memory_exceeded=memory_exceeded, confined=frozenset(measures.split()),
    )


def _collect(process: subprocess.Popen[bytes], status_pipe: IO[bytes], deadline: float) -> tuple[bool, list[bytes]]:
    """Reads all pipes until the process ends or `deadline`, keeping a part: (timed out, [stdout, stderr, status])."""
    assert process.stdout and process.stderr
    pipes = [process.stdout, process.stderr, status_pipe]
    kept = [bytearray(), bytearray(), bytearray()]
    timed_out = False
    with selectors.DefaultSelector() as selector:
        for index, pipe in enumerate(pipes):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, index)
        while True:
            ended = process.poll() is not None
            late = time.monotonic() >= deadline
            timed_out = late and not ended
            if ended or timed_out:
                _kill_group(process)
            # A child that outlived the program may hold a pipe open: once it ended, take what is there without waiting.
            wait = 0.0 if ended or timed_out else min(0.05, max(0.0, deadline - time.monotonic()))
            events = selector.select(wait)
            for key, _ in events:
                chunk = pipes[key.data].read(1 << 16)
                if chunk == b"":
                    selector.unregister(key.fileobj)
                elif chunk is not None:
                    _keep(kept[key.data], chunk, newest=key.data == 1)
            if timed_out or (ended and (late or not events)):
                return timed_out, [bytes(part) for part in kept]


def _keep(buffer: bytearray, chunk: bytes, *, newest: bool) -> None:
    buffer += chunk
    if newest:
        del buffer[:-MAX_OUTPUT_BYTES]
    else:
        del buffer[MAX_OUTPUT_BYTES:]


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody left; macOS says so with EPERM
        pass


def _remove(directory: str) -> None:
    """`rm` is several times faster than shutil on the many files that a program may leave, and goes to any depth."""
    if subprocess.run(["rm", "-rf", directory], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["chmod", "-R", "u+rwx", directory], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", directory], check=True)
