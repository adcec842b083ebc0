"""Runs Python that a model wrote, in a separate limited process.

This contains accidents (endless loops, memory, endless output, stray files, forks), and is NOT a
security boundary:

- the program reads whatever files this user can read;
- its own judge runs in the same interpreter, so code that means to can report a success it did not
earn;
- until its time is up it may fill the disk, with as many files of 16 MiB as it can write;
- a fault of the kernel is a way out; and how much is closed depends on the kernel (see
`ExecutionResult.confined`):
  without "files" it writes and deletes wherever this user can, without "network" and "syscalls"
  the network is open and a child process that leaves the process group outlives the time limit.

Run code from a model you do not trust in a virtual machine without secrets.
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
    """What became of a program.

    Attributes:
        success: it ran to its last line without an exception. Leaving early (`sys.exit(0)`) is no
            success: whatever assertions stood below were not reached.
        stdout: what it printed, at most the first `MAX_OUTPUT_BYTES`; writing more than 16 MiB is
          an error to it.
        stderr: at most the last `MAX_OUTPUT_BYTES`.
        error: None on success, else one line: the exception, the signal or the time limit.
        timeout: it was killed at the time limit.
        memory_exceeded: it ended in a MemoryError.
        confined: measures beyond resource limits that took hold: "network" (a namespace without
            network), "files" (contents change only below its temporary directory), "syscalls" (no
            children, sockets or signals to others, no change of modes, owners, times or attributes
            of files).
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None
    timeout: bool
    memory_exceeded: bool
    confined: frozenset[str]


def execute_code(code: str, timeout: float = 5.0, memory_bytes: int = 256 << 20) -> ExecutionResult:
    """Run `code` as `__main__` of a fresh interpreter: standard library only, no environment, no
    input, no arguments.

    Safe to call from several threads, and in a process that holds an accelerator (nothing is
    forked without exec).

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
    # What it prints goes to files: the limit on the size of a file holds for them too, and nobody
    # need read along. How it is confined, and that it finished, comes through a pipe: what is in
    # one cannot be taken back.
    status, status_end = os.pipe()
    with TemporaryFile() as out, TemporaryFile() as err, open(status, "rb", buffering=0) as told:
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
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
            process.wait()
        stdout = os.pread(out.fileno(), MAX_OUTPUT_BYTES, 0)
        stderr = os.pread(
            err.fileno(),
            MAX_OUTPUT_BYTES,
            max(0, os.fstat(err.fileno()).st_size - MAX_OUTPUT_BYTES),
        )
        os.set_blocking(status, False)  # a process that got away could hold the other end
        record = told.read(MAX_OUTPUT_BYTES) or b""

    measures, _, end = record.decode("utf-8", "replace").partition("\n")
    lines = stderr.strip().splitlines()
    memory_exceeded = bool(lines) and lines[-1].startswith(b"MemoryError")
    success = not timed_out and process.returncode == 0 and end == "finished\n"
    if success:
        error = None
    elif timed_out:
        error = f"TimeoutError: no end within {timeout:g} s"
    elif process.returncode < 0:
        number = -process.returncode
        known = number in set(signal.Signals)
        error = f"killed by {signal.Signals(number).name if known else f'signal {number}'}"
    elif process.returncode == 0:
        error = "SystemExit: left before its last line"
    else:
        error = lines[-1].decode("utf-8", "replace") if lines else f"exit code {process.returncode}"
    return ExecutionResult(
        success=success,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        error=error,
        timeout=timed_out,
        memory_exceeded=memory_exceeded,
        confined=frozenset(measures.split()),
    )


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody left; macOS says so with EPERM
        pass


def _remove(directory: str) -> None:
    """`rm` is several times faster than shutil on the many files that a program may leave, and
    goes to any depth.
    """
    if subprocess.run(["rm", "-rf", directory], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["chmod", "-R", "u+rwx", directory], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", directory], check=True)
