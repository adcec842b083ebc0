"""Model-written programs: what they report, and what they must not be able to do."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat_jax.tasks import execution
from nanochat_jax.tasks.execution import execute_code


@pytest.fixture(scope="module")
def confined() -> frozenset[str]:
    return execute_code("pass").confined


def need(confined: frozenset[str], measure: str) -> None:
    if measure not in confined:
        pytest.skip(f"this kernel does not offer the measure {measure!r}")


def leftovers() -> set[Path]:
    return set(Path(execution.tempfile.gettempdir()).glob("nanochat-execution-*"))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_program_that_ends_well_is_a_success():
    result = execute_code(
        "import math, sys\nprint(math.factorial(5), __name__)\nprint('é', file=sys.stderr)"
    )
    assert (
        result.success
        and result.error is None
        and not result.timeout
        and not result.memory_exceeded
    )
    assert result.stdout == "120 __main__\n"
    assert result.stderr == "é\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("print('\0')", "SyntaxError"),
        ("x = '\ud800'", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import os, signal\nos.abort()", "killed by SIG"),
    ],
)
def test_a_failing_program_reports_its_last_line(code, error):
    result = execute_code(code)
    assert not result.success and not result.timeout
    assert error in result.error


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"]
)
def test_leaving_before_the_assertions_is_no_success(leave):
    assert not execute_code(f"{leave}\nassert False").success


def test_every_program_has_fresh_globals_and_dataclasses_work():
    assert execute_code("leak = 1\nimport builtins\nbuiltins.leak = 1").success
    assert not execute_code("leak").success
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    code += "@dataclass\nclass A:\n    x: int\nprint(A(3))"
    assert execute_code(code).stdout == "A(x=3)\n"


def test_an_endless_loop_is_killed_at_the_limit():
    start = time.monotonic()
    result = execute_code("while True: pass", timeout=0.6)
    assert result.timeout and not result.success and "0.6 s" in result.error
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends_the_program_and_a_part_is_kept(stream):
    code = f"import sys\nprint('first', file=sys.{stream})\n"
    code += f"while True: print('x' * 4096, file=sys.{stream})"
    result = execute_code(code, timeout=30)
    kept = getattr(result, stream)
    assert not result.success and not result.timeout and result.error
    assert len(kept) == execution.MAX_OUTPUT_BYTES and kept.startswith("first") == (
        stream == "stdout"
    )


def test_memory_is_limited():
    result = execute_code("x = bytearray(1 << 30)")
    assert result.memory_exceeded and not result.success
    assert execute_code("x = bytearray(1 << 26)").success
    assert execute_code("x = bytearray(1 << 26)", memory_bytes=64 << 20).memory_exceeded


def test_files_land_in_a_directory_that_is_removed():
    before = leftovers()
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"
    locked = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\n"
    locked += "os.chmod('a/b', 0); os.chmod('a', 0)"
    for code in (
        "open('x.txt', 'w').write('hello')\nprint(open('x.txt').read())",
        deep,
        locked,
        "1 / 0",
    ):
        execute_code(code)
    assert leftovers() == before
    assert execute_code("import os; print(os.path.basename(os.getcwd()))").stdout.startswith(
        "nanochat-execution-"
    )


def test_environment_and_standard_input_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    result = execute_code(
        "import os\nprint(os.environ)\ntry:\n    input()\nexcept EOFError:\n    print('no input')"
    )
    assert "hunter2" not in result.stdout and "no input" in result.stdout
    assert (
        "site"
        not in execute_code(
            "import sys\nprint([p for p in sys.path if 'site-packages' in p])"
        ).stdout
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the child in /proc")
def test_a_child_in_the_process_group_dies_with_the_program(tmp_path, monkeypatch):
    """The group kill alone, as on a kernel without the other measures."""
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import os, sys\nos.write(int(sys.argv[3]), b'\\n')\nexec(open('program.py').read())"
    )
    monkeypatch.setattr(execution, "CHILD", bare)
    code = "import os, time\npid = os.fork()\nif pid:\n    print(pid, flush=True)\ntime.sleep({})"
    for seconds, timeout in (("60", 0.7), ("0.2 if pid else 60", 10)):
        start = time.monotonic()
        child = int(execute_code(code.format(seconds), timeout=timeout).stdout)
        assert time.monotonic() - start < 5
        deadline = time.monotonic() + 2
        while is_running(child) and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the child outlived the program"
            time.sleep(0.02)


def test_programs_run_at_once_from_threads_that_are_not_the_main_one():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: execute_code(f"print({i})").stdout, range(8)))
    assert results == [f"{i}\n" for i in range(8)]
    assert threading.active_count() < 20


def test_a_program_that_ignores_signals_and_closes_its_pipes_is_killed():
    code = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "os.closerange(0, 64)\ntime.sleep(60)"
    start = time.monotonic()
    assert execute_code(code, timeout=0.6).timeout
    assert time.monotonic() - start < 5


def test_a_file_cannot_grow_without_bound():
    result = execute_code(
        "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))"
    )
    assert not result.success


def test_other_processes_cannot_be_read_or_signalled(confined, monkeypatch):
    need(confined, "files")
    need(confined, "syscalls")
    assert not execute_code(f"print(open('/proc/{os.getpid()}/environ', 'rb').read())").success
    assert not execute_code(f"import os, signal\nos.kill({os.getpid()}, signal.SIGUSR1)").success
    assert not execute_code(
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (8, 8))"
    ).success


def test_no_children_sessions_or_threads_are_left(confined):
    need(confined, "syscalls")
    for call in (
        "fork()",
        "setsid()",
        "posix_spawn('/bin/true', ['true'], {})",
        "execv('/bin/true', ['true'])",
    ):
        result = execute_code(f"import os\nos.{call}")
        assert "PermissionError" in result.error, call
    assert (
        "can't start new thread"
        in execute_code("import threading\nthreading.Thread(target=print).start()").error
    )
    assert not execute_code("import subprocess\nsubprocess.run(['true'])").success


def test_the_network_is_closed(confined):
    if not confined & {"network", "syscalls"}:
        pytest.skip("this kernel does not offer a way to close the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\n"
        code += "print('connected')"
        assert "connected" not in execute_code(code).stdout


def test_nothing_outside_its_directory_can_be_changed(confined, tmp_path):
    need(confined, "files")
    victim = tmp_path / "victim"
    victim.write_text("keep")
    for code in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.link({str(victim)!r}, 'mine')",
    ):
        assert (
            "Permission" in (execute_code(code).error or "")
            or "Errno 18" in execute_code(code).error
        ), code
    assert victim.read_text() == "keep" and list(tmp_path.iterdir()) == [victim]


def test_limits_cannot_be_raised(confined):
    need(confined, "syscalls")
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    code += "x = bytearray(1 << 30)"
    assert not execute_code(code).success
