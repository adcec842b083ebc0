"""Execution of model-written Python in a separate process with limits.

This contains accidents (endless loops, memory, endless output, stray files, forks). It is NOT a
security boundary:

- The program can read every file that this user can read.
- The program's tests run in the same interpreter, so malicious code can report a false success.
- Until the time limit, it can fill the disk with files of 16 MiB.
- Kernel bugs allow escapes, and the confinement depends on the kernel (see
  `ExecutionResult.confined`). Without "files", it can write and delete wherever this user can.
  Without "network" and "syscalls", the network is open, and a child process that leaves the process
  group outlives the time limit.

Run code from untrusted models in a virtual machine without secrets.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

MAX_OUTPUT_BYTES = 64 << 10
CHILD = Path(__file__).with_name("execution_child.py")


@dataclass(frozen=True, kw_only=True)
class ExecutionResult:
    """The result of running a program."""

    # it reached its last line without an exception. An early exit (`sys.exit(0)`) is not a success,
    # because later assertions did not run.
    success: bool
    # at most the first `MAX_OUTPUT_BYTES`. Writing more than 16 MiB is an error in the program.
    stdout: str
    stderr: str  # at most the last `MAX_OUTPUT_BYTES`
    error: str | None  # None on success, else one line: the exception, the signal or the time limit
    timeout: bool  # it was killed at the time limit
    memory_exceeded: bool
    # measures in effect beyond resource limits. "network": a namespace without network. "files":
    # writes only below its temporary directory. "syscalls": no children, sockets, signals to
    # others, or changes of modes, owners, times or attributes of files.
    confined: frozenset[str]


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 256 << 20) -> ExecutionResult:
    """Run `code` as `__main__` of a new interpreter with the standard library only.

    It has an empty environment, no input and no arguments. Thread-safe, and safe in a process that
    holds an accelerator, because every fork is followed by exec.

    Args:
      code: Python source.
      timeout: seconds of wall-clock time until the process group is killed.
      memory_bytes: limit of the address space.
    """
    directory = tempfile.mkdtemp(prefix="nanochat-execution-")
    try:
        Path(directory, "program.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        return _run(directory, timeout, memory_bytes)
    finally:
        _remove(directory)


def _run(directory: str, timeout: float, memory_bytes: int) -> ExecutionResult:
    # Output goes to files: the file size limit applies, and no reader thread is needed. The
    # confinement and the end of the program are reported through a pipe, whose content cannot be
    # altered.
    status, status_end = os.pipe()
    with TemporaryFile() as out, TemporaryFile() as err, open(status, "rb", buffering=0) as report:
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]
        command += [str(memory_bytes), str(math.ceil(timeout) + 1), str(status_end)]
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(status_end,),
                start_new_session=True,
            )
        finally:
            os.close(status_end)
        timed_out = _kill_after(process, timeout)
        stdout = os.pread(out.fileno(), MAX_OUTPUT_BYTES, 0)
        skipped = max(0, os.fstat(err.fileno()).st_size - MAX_OUTPUT_BYTES)
        stderr = os.pread(err.fileno(), MAX_OUTPUT_BYTES, skipped)
        os.set_blocking(status, False)  # an escaped process could hold the other end
        record = report.read(MAX_OUTPUT_BYTES) or b""

    measures, _, end = record.decode("utf-8", "replace").partition("\n")
    lines = stderr.strip().splitlines()
    last_line = lines[-1].decode("utf-8", "replace") if lines else ""
    error = f"TimeoutError: no end within {timeout:g} s" if timed_out else None
    if not timed_out and (process.returncode or end != "finished\n"):
        error = _describe_exit(process.returncode, last_line)
    return ExecutionResult(
        success=error is None,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        error=error,
        timeout=timed_out,
        memory_exceeded=last_line.startswith("MemoryError"),
        confined=frozenset(measures.split()),
    )


def _kill_after(process: subprocess.Popen, timeout: float) -> bool:
    """Wait for the process and kill its group; returns whether it ran into the time limit."""
    try:
        process.wait(timeout)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        _kill_group(process)
        process.wait()


def _describe_exit(code: int, last_line: str) -> str:
    """Why a program failed, from its exit code and the last line of its standard error."""
    if code > 0:
        return last_line or f"exit code {code}"
    if code == 0:
        return "SystemExit: left before its last line"
    known = -code in set(signal.Signals)
    return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # no process left; macOS raises EPERM
        pass


def _remove(directory: str) -> None:
    """Delete a directory tree of any depth."""
    if subprocess.run(["rm", "-rf", directory], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["chmod", "-R", "u+rwx", directory], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", directory], check=True)
