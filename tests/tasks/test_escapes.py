"""Ways out of the process that runs model-written code."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_jax.tasks import execution
from nanochat_jax.tasks.execution import execute_code

TIMEOUT = 1.5
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

# What {victim} (a file), {home} (its directory), {pid} (this process), {other} (another process of
# this user) and {port} (a server of ours on the loopback address) are is filled in.
ATTEMPTS = {
    # up the stack, and through what Python leaves within reach
    "frames": "import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\n"
    "open({victim!r}, 'w').write(str(f.f_locals))",
    "frame of a generator": "g = (x for x in [1])\nb = g.gi_frame.f_builtins\n"
    "b['open']({victim!r}, 'w')",
    "frame of an exception": "try: 1 / 0\nexcept Exception as e: "
    "e.__traceback__.tb_frame.f_back.f_globals['os'].remove({victim!r})",
    "subclasses": "for c in object.__subclasses__():\n    if c.__name__ == '_wrap_close':\n"
    "        assert c.__init__.__globals__['system']('rm -rf {home}') == 0",
    "globals of the runner": "import __main__, sys\nfor m in list(sys.modules.values()):\n"
    "    getattr(m, 'os', m)\nsys.modules['os'].unlink({victim!r})",
    "garbage collector": "import gc, os\n[o for o in gc.get_objects() if type(o) is dict]\n"
    "os.rename({victim!r}, 'mine')",
    "rebuilt builtins": "import importlib, builtins\nimportlib.reload(builtins)\n"
    "builtins.open({victim!r}, 'a').write('x')",
    "builtins of another interpreter": "import subprocess, sys\n"
    "subprocess.run([sys.executable, '-c', 'open({victim!r}, \"w\")'])",
    "atexit": "import atexit, os\natexit.register(os.remove, {victim!r})",
    "finalizer": "import os, weakref\nclass A: pass\na = A()\n"
    "weakref.finalize(a, os.remove, {victim!r})\ndel a",
    "audit hook": "import sys\nsys.addaudithook(lambda *a: None)\nopen({victim!r}, 'w')",
    # imports
    "import of the package": "import sys\nsys.path.insert(0, {root!r})\n"
    "import nanochat_jax.paths as p\nfrom pathlib import Path\np.remove_directory(Path({home!r}))",
    "pickle": "import pickle, os\nclass A:\n    def __reduce__(self): return os.remove, "
    "({victim!r},)\npickle.loads(pickle.dumps(A()))",
    "shutil": "import shutil\nshutil.rmtree({home!r})",
    "module left for others": "import os, sys\nfor p in [os.path.dirname(os.__file__), {home!r}]:\n"
    "    open(os.path.join(p, 'escaped.py'), 'w').write('1')",
    # ctypes and the kernel
    "ctypes unlink": LIBC
    + "libc.unlink({victim!r}.encode())\nassert not __import__('os').path.exists({victim!r})",
    "ctypes system": LIBC + "assert libc.system(b'rm -rf {home}') == 0",
    "ctypes fork": LIBC + "pid = libc.fork()\nassert pid >= 0\nwhile True: pass",
    "ctypes bad pointer": "import ctypes\nctypes.string_at(0)",
    "ctypes write over the interpreter": "import ctypes\nctypes.memset(id(int), 255, 4096)\n"
    "int('1') + 1",
    "raw clone": LIBC + "assert libc.syscall(56, 17, 0, 0, 0, 0) >= 0",
    "ptrace": LIBC + "assert libc.ptrace(16, {other}, 0, 0) == 0",
    "memory of another process": "open('/proc/{pid}/mem', 'r+b').seek(4096)",
    "environment of another process": "open('/proc/{pid}/environ', 'rb').read()",
    "process_vm_writev": LIBC + "assert libc.process_vm_writev({pid}, 0, 0, 0, 0, 0) == 0",
    "mount": LIBC + "assert libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0",
    "chroot": "import os\nos.mkdir('jail'); os.chroot('jail'); os.chroot('../../../../..')\n"
    "os.remove({victim!r})",
    "new namespaces": LIBC + "assert libc.unshare(0x10000000 | 0x00020000) == 0",
    "limits raised": "import resource\n"
    "for r in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):\n"
    "    resource.setrlimit(r, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
    "limits of the parent": "import resource\n"
    "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (3, 3))",
    "priority of the parent": "import os\nos.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "processors of the parent": "import os\nos.sched_setaffinity({pid}, [0])",
    "scheduler of the parent": "import os\n"
    "os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    # processes and threads
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that catches": "import os\nwhile True:\n    try: os.fork()\n"
    "    except OSError: pass",
    "shell fork bomb": "import os\nassert os.system(':(){{ :|:& }};:') == 0",
    "thread bomb": "import threading\n"
    "while True: threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        while True: os.utime({victim!r})",
    "multiprocessing": "import multiprocessing as m\nm.Process(target=print).start()",
    "spawn": "import os\nos.posix_spawn('/bin/rm', ['rm', '-rf', {home!r}], {{}})",
    "exec": "import os\nos.execv('/bin/rm', ['rm', '-rf', {home!r}])",
    # signals
    "signals by a pipe": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, {pid})\n"
    "fcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
    "os.write(w, b'x')",
    "kill the parent": "import os\nos.kill({pid}, 9)",
    "kill the group of the parent": "import os\nos.killpg(os.getpgid({pid}), 9)",
    "kill everyone": "import os\nos.kill(-1, 9)",
    "kill another process": "import os\nos.kill({other}, 9)",
    "queued signal": LIBC + "assert libc.sigqueue({other}, 9, 0) == 0",
    "pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({other}), 9)",
    "signals ignored": "import signal, time\nfor s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: time.sleep(1)",
    "alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
    "time.sleep(60)",
    # files
    "overwrite": "open({victim!r}, 'w').write('gone')",
    "append": "open({victim!r}, 'a').write('more')",
    "truncate": "import os\nos.truncate({victim!r}, 0)",
    "mode": "import os\nos.chmod({victim!r}, 0)",
    "mode of an open file": "import os\nos.fchmod(os.open({victim!r}, os.O_RDONLY), 0)",
    "mode of the home": LIBC + "assert libc.syscall(452, -100, {home!r}.encode(), 0, 0) == 0",
    "times": "import os\nos.utime({victim!r}, (1, 1))",
    "owner": "import os\nos.chown({victim!r}, 65534, 65534)",
    "attribute": "import os\nos.setxattr({victim!r}, 'user.mark', b'x')",
    "flags of a file": "import fcntl, os\n"
    "fcntl.ioctl(os.open({victim!r}, os.O_RDONLY), 0x40086602, b'\\x80' + bytes(7))",
    "new directory": "import os\nos.mkdir({home!r} + '/new')",
    "delete": "import os\nos.remove({victim!r})",
    "replace": "import os\nopen('x', 'w').close()\nos.replace('x', {victim!r})",
    "climb out": "import os\nos.chdir('..')\nopen('nanochat-escaped', 'w').write('x')",
    "device": "open('/dev/sda', 'wb').write(b'x')\n",
    "terminal": "open('/dev/tty', 'w').write('hello')",
    "kernel settings": "open('/proc/sys/kernel/panic', 'w').write('1')\n",
    "file descriptors of the parent": "import os\n"
    "for fd in os.listdir('/proc/{pid}/fd'): open('/proc/{pid}/fd/' + fd, 'w').write('x')",
    "inherited descriptors": "import os\nfor fd in range(3, 256):\n"
    "    try: os.write(fd, b'x' * 100)\n    except OSError: pass\nraise SystemExit",
    "symlink": "import os\nos.symlink({victim!r}, 'link')\nopen('link', 'w').write('gone')",
    "symlink left for the clean-up": "import os\nos.symlink({home!r}, 'link')\nos.mkdir('d')\n"
    "os.symlink({home!r}, 'd/link')\nos.chmod('d', 0)\n1 / 0",
    "directory swapped for a symlink": "import os\ncwd = os.getcwd()\n"
    "os.rename(cwd, cwd + '-old')\nos.symlink({home!r}, cwd)",
    "hard link": "import os\nos.link({victim!r}, 'mine')\nopen('mine', 'w').write('gone')",
    "fifo": "import os\nos.mkfifo('fifo')\nopen('fifo').read()",
    "disk filled": "for i in range(10_000):\n"
    "    with open(str(i), 'wb') as f: f.write(bytes(1 << 24))",
    "many files": "import os\ni = 0\nwhile True:\n    os.mkdir(str(i)); i += 1",
    "deep directories": "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
    "names that are options": "import os\n"
    "os.mkdir('-rf'); os.mkdir('--no-preserve-root'); os.chmod('-rf', 0)\n1 / 0",
    # network
    "socket": "import socket\n"
    "socket.create_connection(('127.0.0.1', {port}), timeout=1).send(b'out')",
    "datagram": "import socket\n"
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'out', ('127.0.0.1', {port}))",
    "unix socket": "import socket\na, b = socket.socketpair()\na.send(b'x')",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
    "asyncio server": "import asyncio\nasyncio.run(asyncio.start_server(print, '0.0.0.0', 0))",
    # memory, time and output
    "huge bytes": "x = bytearray(1 << 40)",
    "huge list": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "huge integer": "x = 1 << (1 << 40)",
    "endless integer": "9 ** 9 ** 9",
    "huge anonymous mapping": "import mmap\nmmap.mmap(-1, 1 << 36)",
    "memory file": "import os\nfd = os.memfd_create('x')\nwhile True: os.write(fd, bytes(1 << 20))",
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1e6)",
    "catastrophic expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "endless output": "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 65536)",
    "output without lines": "import os\n"
    "while True: os.write(1, bytes(1 << 16)); os.write(2, bytes(1 << 16))",
    "endless recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()",
    "deep source": "eval('(' * 100_000 + ')' * 100_000)",
    "standard input": "input()",
}


def processes_of(name: str) -> set[int]:
    """Processes with `name` in their command line."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True)
def child(tmp_path_factory, monkeypatch):
    """A copy of the child's program, so that only this test's processes have its path."""
    copy = tmp_path_factory.mktemp("child") / execution.CHILD.name
    shutil.copy(execution.CHILD, copy)
    monkeypatch.setattr(execution, "CHILD", copy)


def standing() -> tuple:
    """What of this process others might change."""
    return (
        resource.getrlimit(resource.RLIMIT_NOFILE),
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
        os.sched_getscheduler(0),
    )


@pytest.fixture(scope="module")
def other():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.fixture(scope="module", autouse=True)
def need_confinement():
    missing = {"files", "network", "syscalls"} - execute_code("pass").confined
    if missing:
        pytest.skip(
            f"this kernel does not offer {', '.join(sorted(missing))}; the other limits are tested "
            "in test_execution.py"
        )


@pytest.mark.parametrize("name", ATTEMPTS)
def test_no_way_out(name, tmp_path, other, server):
    home = tmp_path / "home"
    home.mkdir()
    victim = home / "victim"
    victim.write_text("keep")
    before = victim.stat()
    own, on_interrupt = standing(), signal.getsignal(signal.SIGINT)
    temporary = set(os.listdir(execution.tempfile.gettempdir()))
    root = str(Path(execution.__file__).parents[2])
    code = ATTEMPTS[name].format(
        victim=str(victim),
        home=str(home),
        pid=os.getpid(),
        other=other.pid,
        port=server.getsockname()[1],
        root=root,
    )
    started = time.monotonic()
    slow = name in ("many files", "deep directories")  # to clean up after
    result = execute_code(code, timeout=0.4 if slow else TIMEOUT)

    assert time.monotonic() - started < TIMEOUT + 30  # and what a clean-up takes
    assert result.error is None or "\n" not in result.error
    assert len(result.stdout.encode()) <= 3 * execution.MAX_OUTPUT_BYTES  # U+FFFD is three bytes
    assert len(result.stderr.encode()) <= 3 * execution.MAX_OUTPUT_BYTES
    # which end after the last line, or in a signal
    if name not in ("atexit", "finalizer", "alarm"):
        assert not result.success, result
    assert victim.read_text() == "keep" and os.listdir(home) == ["victim"]
    after = victim.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode,
        before.st_mtime_ns,
        1,
    )
    assert (after.st_uid, os.listxattr(victim), home.stat().st_mode & 0o700) == (
        before.st_uid,
        [],
        0o700,
    )
    assert standing() == own
    assert other.poll() is None
    with pytest.raises(BlockingIOError):
        server.accept()
    assert not [
        path
        for path in set(os.listdir(execution.tempfile.gettempdir())) - temporary
        if "nanochat" in path
    ]
    assert not processes_of(str(execution.CHILD)), "a process is left"
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_it_still_runs_after_all_that():
    assert execute_code("print(1 + 1)").stdout == "2\n"
