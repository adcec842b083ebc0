"""The child process of `execution.execute_code`: confines itself, then runs `program.py`.

Started by path in a new interpreter with arguments MEMORY_BYTES CPU_SECONDS STATUS_FD, in the
temporary directory of the program. Never imported, and imports nothing from the package. Writes one
line to STATUS_FD with the names of the measures in effect, and a second line when the program has
reached its end.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import types

FILE_BYTES = 16 << 20
OPEN_FILES = 64

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9

# Landlock's system call numbers are the same on every architecture (linux/landlock.h).
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_WRITE_FILE, LANDLOCK_TRUNCATE = 1 << 1, 1 << 14
# remove or create entries of any kind, write files
LANDLOCK_CHANGE_TREE = 0b1_1111_1111_0000 | LANDLOCK_WRITE_FILE

# Forbidden system calls with their numbers on x86_64 and aarch64 (linux/unistd.h): children,
# sockets, signals to others, other processes' memory, priorities and limits, sessions, namespaces,
# keys, files in memory; and what Landlock does not restrict: modes, owners, times and attributes of
# files, truncation by name.
FORBIDDEN = """
shmget 29 194, socket 41 198, socketpair 53 199, clone 56 220, fork 57 -, vfork 58 -,
execve 59 221, kill 62 129, ptrace 101 117, setpgid 109 154, setsid 112 157,
rt_sigqueueinfo 129 138, setpriority 141 140, sched_setparam 142 118,
sched_setscheduler 144 119, setrlimit 160 164, tkill 200 130, sched_setaffinity 203 122,
tgkill 234 131, add_key 248 217, request_key 249 218, keyctl 250 219, ioprio_set 251 30,
migrate_pages 256 238, unshare 272 97, move_pages 279 239, rt_tgsigqueueinfo 297 240,
prlimit64 302 261, setns 308 268, process_vm_readv 310 270, process_vm_writev 311 271,
sched_setattr 314 274, memfd_create 319 279, bpf 321 280, execveat 322 281,
pidfd_send_signal 424 424, io_uring_setup 425 425, pidfd_open 434 434, clone3 435 435,
pidfd_getfd 438 438, ioctl 16 29, truncate 76 45, chmod 90 -, fchmod 91 52, chown 92 -,
fchown 93 55, lchown 94 -, utime 132 -, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, utimes 235 -,
fchownat 260 54, futimesat 261 -, fchmodat 268 53, utimensat 280 88, fchmodat2 452 452,
setxattrat 463 463, removexattrat 466 466, file_setattr 469 469
"""
# Audit architecture (linux/audit.h) and the number of fcntl.
ARCHITECTURES = {"x86_64": (0xC000003E, 72), "aarch64": (0xC00000B7, 25)}
# F_SETOWN, F_SETSIG, F_SETOWN_EX: make a file send signals to another process
OWNER_COMMANDS = (8, 10, 15)


def forbidden_numbers(machine: str) -> list[int]:
    """Numbers of the forbidden system calls of an architecture, sorted."""
    column = 1 + list(ARCHITECTURES).index(machine)
    numbers = [call.split()[column] for call in FORBIDDEN.split(",")]
    return sorted(int(number) for number in numbers if number != "-")


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        # no children or threads; not enforced for root, hence the system call filter
        resource.RLIMIT_NPROC: 0,
    }
    if sys.platform != "darwin":  # macOS refuses to limit the address space
        limits[resource.RLIMIT_AS] = memory_bytes
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def unshare_network(libc: ctypes.CDLL) -> bool:
    """Enter new user and network namespaces, without an active network interface."""
    return libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def forbid_writing_outside(libc: ctypes.CDLL, directory: str) -> bool:
    """Apply Landlock: files can be changed only below `directory`.

    Other processes' memory and environment cannot be read. Before version 3 (Linux 6.2), files
    elsewhere can still be truncated by opening them; then the rules are applied, but this returns
    False.
    """
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    access = LANDLOCK_CHANGE_TREE | (LANDLOCK_TRUNCATE if version >= 3 else 0)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", access), 8, 0)
    if ruleset < 0:
        return False
    for path, allowed in (
        (directory, access),
        ("/dev/null", access & (LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE)),
    ):
        below = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, below), 0) != 0:
            return False
        os.close(below)
    done = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done and version >= 3


def filter_system_calls(libc: ctypes.CDLL) -> bool:
    """Apply a seccomp filter: the calls in `FORBIDDEN` fail with EPERM."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    architecture, fcntl = ARCHITECTURES[machine]
    denied, owners = forbidden_numbers(machine), len(OWNER_COMMANDS)
    # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K; an instruction is (code, instructions
    # to skip if true, if false, operand).
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
    # For fcntl, the second argument decides.
    tail = [(equal, 0, owners + 1, fcntl), (load, 0, 0, 24)]
    tail += [(equal, owners - i, 0, command) for i, command in enumerate(OWNER_COMMANDS)]
    tail += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    end = len(denied) + len(tail)
    # On x86_64, numbers from 0x40000000 are the x32 variants of the same calls: refuse them.
    program = [
        (load, 0, 0, 4),
        (equal, 0, end + 1, architecture),
        (load, 0, 0, 0),
        (at_least, end - 1, 0, 0x40000000),
    ]
    program += [(equal, end - 2 - i, 0, number) for i, number in enumerate(denied)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program + tail)
    code = ctypes.create_string_buffer(packed)
    header = struct.pack("HxxxxxxP", len(program + tail), ctypes.addressof(code))
    return libc.prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header), 0, 0) == 0


def confine() -> list[str]:
    """Apply every measure that this kernel supports; returns the names of those in effect."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    measures = {"network": unshare_network(libc)}
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    measures["files"] = forbid_writing_outside(libc, os.getcwd())
    measures["syscalls"] = filter_system_calls(libc)
    return [name for name, holds in measures.items() if holds]


def main() -> None:
    memory_bytes, cpu_seconds, status = (int(argument) for argument in sys.argv[1:])
    with open("program.py", "rb") as file:
        source = file.read()
    limit_resources(memory_bytes, cpu_seconds)
    os.write(status, " ".join(confine()).encode() + b"\n")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), module.__dict__)
    os.write(status, b"finished\n")


if __name__ == "__main__":
    main()
