"""Run a Python program that nobody has read: what a language model wrote, and the tests that judge it.

bubblewrap (``bwrap``) starts the program in namespaces of its own: no network, no other process in sight, a file system
that holds the interpreter and an empty temporary folder in memory. A filter of system calls keeps it from starting
processes, from sockets and from memory that no limit counts; resource limits bound the rest. There is no second,
weaker way: where the fences do not hold, nothing is run. What remains possible is said in ``docs/humaneval.md``.

Source: bubblewrap (github.com/containers/bubblewrap); the verdicts follow OpenAI's human-eval, which says of itself
that it is no sandbox (Chen et al. 2021, arXiv:2107.03374).
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from svdpeft.tasks import syscalls

MIB = 2**20
NOBODY = 65534
USERS = count()  # root gives each program a user of its own: threads are counted by user
CLOCK = 3  # a program may take this many times its processor time by the clock: sleeping, or on a busy machine
FILES = 16 * MIB  # the temporary folder, and any file in it
REPORT = 4096  # bytes that are read of what a sandbox says
LIMITS = {"FSIZE": FILES, "NPROC": 32, "NOFILE": 64, "STACK": 8 * MIB, "MSGQUEUE": 0, "CORE": 0}  # NPROC: threads

# Runs first in the sandbox, behind `SIZE`, `USER` and `LIMITS`. The token that means "passed" stays unread in the pipe
# until the program has come to its end, so it is nowhere in the process while the program runs.
BOOTSTRAP = """
import os, resource
if USER is not None:
    os.setgroups([]), os.setresgid(USER, USER, USER), os.setresuid(USER, USER, USER)
for name, soft, hard in LIMITS:
    which = getattr(resource, "RLIMIT_" + name)
    top = resource.getrlimit(which)[1] % 2**64  # "no limit" is -1
    resource.setrlimit(which, (min(soft, top), min(hard, top)))
source, report, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
for standard in range(3):
    os.dup2(null, standard)
program = b""
while len(program) < SIZE:
    program += os.read(source, SIZE - len(program)) or os._exit(1)
read, write, leave = os.read, os.write, os._exit
write(report, b"started:")
try:
    exec(compile(program, "<program>", "exec"), {})
except MemoryError:
    verdict = b"out of memory"
except BaseException as error:
    try:
        verdict = f"failed: {type(error).__name__}: {error}"[:300].strip(": ").encode(errors="replace")
    except BaseException:
        verdict = b"failed: an exception without a text"
else:
    verdict = read(source, 64)
write(report, verdict)
leave(0)
"""

# What must be refused before the sandbox is trusted.
PROBE = """
import os, socket
def write():
    open("/written", "w")
for attempt in (os.fork, socket.socket, lambda: os.memfd_create("memory"), write):
    try:
        attempt()
    except OSError:
        continue
    raise RuntimeError(f"{attempt.__name__} was not refused")
"""


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up; says nothing about the program."""


class SandboxLate(SandboxError):
    """The sandbox did not start in time; another time it may."""


@dataclass(frozen=True)
class Outcome:
    """The end of one program.

    Args:
        passed: whether it ran to its end without an exception.
        reason: "passed", "failed: AssertionError", "timed out", "out of memory", "killed by SIGSEGV", ...
    """

    passed: bool
    reason: str


@cache
def available() -> str | None:
    """Why programs cannot be run here, or None. Found by trying: a probe must be refused whatever it attempts."""
    if sys.platform != "linux" or platform.machine() not in syscalls.MACHINES:
        where = " or ".join(syscalls.MACHINES)
        return f"the sandbox needs Linux on {where}; this is {platform.system()} on {platform.machine()}"
    if shutil.which("bwrap") is None:
        return (
            "the sandbox needs bubblewrap, and there is no program bwrap on the PATH: "
            "apt install bubblewrap, dnf install bubblewrap or pacman -S bubblewrap"
        )
    try:
        probe = _run(PROBE, 10.0, 512 * MIB)
    except SandboxError as error:
        return str(error)
    return None if probe.passed else f"the sandbox does not hold on this machine: {probe.reason}"


def run(program: str, *, timeout: float = 10.0, memory: int = 512 * MIB) -> Outcome:
    """Run one program in a sandbox of its own; nothing of it is left afterwards.

    Args:
        program: Python source; only the standard library can be imported, and ``__name__`` is not ``"__main__"``.
        timeout: processor time in seconds, rounded up to whole ones; by the clock it may take three times as long.
        memory: address space in bytes. The program cannot start processes, so this bounds all of it.

    Returns:
        Whether the program came to its end without an exception, and why not. Leaving early is not passing.

    Raises:
        SandboxError: there is no sandbox here, with the reason and what to install.
        ValueError: a limit in which Python itself would not start.

    Example:
        >>> run("assert sum(range(4)) == 6")  # doctest: +SKIP
        Outcome(passed=True, reason='passed')
        >>> run("import os; os._exit(0)").reason  # doctest: +SKIP
        'left before its end, with status 0'
    """
    for name, value, least in (("timeout", timeout, 0.1), ("memory", memory, 64 * MIB)):
        if value < least:
            raise ValueError(f"{name} {value} is below {least}: Python itself would not start")
    if reason := available():
        raise SandboxError(reason)
    return _run(program, timeout, memory)


def run_all(programs: Iterable[str], *, timeout: float = 10.0, memory: int = 512 * MIB) -> list[Outcome]:
    """Run many programs, as many at a time as there are processors; the outcomes in their order.

    Where a sandbox does not start in time, it is tried once more: one stall must not cost the score of a training.
    """
    if reason := available():
        raise SandboxError(reason)

    def one(program: str) -> Outcome:
        with suppress(SandboxLate):
            return run(program, timeout=timeout, memory=memory)
        return run(program, timeout=timeout, memory=memory)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        return list(workers.map(one, programs))


def _run(program: str, timeout: float, memory: int) -> Outcome:
    text, token = program.encode(errors="replace"), secrets.token_hex(16).encode()
    start = time.monotonic()
    with _started(_bootstrap(len(text), math.ceil(timeout), memory)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError), process.stdin as pipe:  # broken: bwrap has failed, and says why below
            _tell(pipe.fileno(), text + token, start + CLOCK * timeout)
        said, ended = _listen(process.stdout.fileno(), start + CLOCK * timeout)
        status = process.wait() if ended else None
    begin, started, verdict = said.partition(b"started:")
    if status is None and not started:
        raise SandboxLate("the sandbox did not start in time: the machine is too busy, or the timeout too short")
    if begin or not started:
        raise SandboxError(_failure(said.decode(errors="replace").strip(), status))
    if verdict == token:
        return Outcome(True, "passed")
    return Outcome(False, _reason(verdict, status, time.monotonic() - start >= timeout))


def _reason(verdict: bytes, status: int | None, late: bool) -> str:
    """Why a program has not passed; ``status`` is that of a shell, None if it had to be ended from outside."""
    if status == 0 and verdict:
        words = " ".join(verdict.decode(errors="replace").split())
        return "".join(each if each.isprintable() else "?" for each in words)  # it may be shown on a terminal
    if status == 128 + signal.SIGXCPU or (late and status in (None, 128 + signal.SIGKILL)):
        return "timed out"
    if status is None:
        return "failed: it wrote where only its verdict belongs"
    if status - 128 in set(signal.Signals):
        return f"killed by {signal.Signals(status - 128).name}"
    return f"left before its end, with status {status}"


def _failure(said: str, status: int | None) -> str:
    why = said.splitlines()[-1] if said else f"status {status}"
    return (
        f"the sandbox could not be started: {why}. bubblewrap needs user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1 on Debian, kernel.apparmor_restrict_unprivileged_userns=0 on "
        "Ubuntu) or root; a container needs --cap-add SYS_ADMIN and --security-opt seccomp=unconfined"
    )


@contextmanager
def _started(bootstrap: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process of the sandbox. When it dies, whatever runs inside dies with it (its namespace of processes ends)."""
    filter_ = os.memfd_create("filter")
    try:
        os.write(filter_, syscalls.filter_for(platform.machine()))
        os.lseek(filter_, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [*_command(filter_), *_interpreter(), "-c", bootstrap],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(filter_,),
            # hashes of texts are fixed: the order of a set must not decide a verdict
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        )
    finally:
        os.close(filter_)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _tell(pipe: int, text: bytes, deadline: float) -> None:
    """Write into the pipe, which may take 64 KiB before anybody reads; no longer than to the deadline."""
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    while text and (left := deadline - time.monotonic()) > 0 and poll.poll(1000 * left):
        text = text[os.write(pipe, text) :]


def _listen(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """What is written into the pipe, up to ``REPORT`` bytes; whether its end was reached before the deadline."""
    said = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(said) < REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            return said, False
        part = os.read(pipe, REPORT - len(said))
        if not part:
            return said, True
        said += part
    return said, False


def _command(filter_: int) -> list[str]:
    """bwrap with its options, up to the program that it starts."""
    command = [str(shutil.which("bwrap")), "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    command += [f"--unshare-{space}" for space in ("ipc", "pid", "net", "uts", "cgroup-try")]
    if os.geteuid() == 0:  # real namespaces, and the bootstrap drops root: limits do not bind root, even a fenced one
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--perms", "1777", "--size", str(FILES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for name in ("/bin", "/lib", "/lib64", "/sbin"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
    python = Path(_interpreter()[0])
    shown = ["/usr", "/bin", "/lib", "/lib64", "/sbin", "/etc/ld.so.cache"]
    if not python.is_relative_to("/usr"):
        shown += [str(path) for path in (python, *python.parents[1].glob("lib*"))]
    for path in shown:
        if os.path.exists(path) and not os.path.islink(path):
            command += [*_folders(path), "--ro-bind", path, path]
    for device in ("/dev/null", "/dev/urandom"):
        command += [*_folders(device), "--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--seccomp", str(filter_), "--"]


def _folders(path: str) -> list[str]:
    """Options that make the folders above a path; bwrap by itself makes them for root alone."""
    return [word for folder in [*Path(path).parents][-2::-1] for word in ("--dir", str(folder))]


def _interpreter() -> list[str]:
    """This Python without its virtual environment: the standard library alone, and no bytecode is written."""
    return [os.path.realpath(sys.executable), "-S", "-B"]


def _bootstrap(size: int, seconds: int, memory: int) -> str:
    limits = [("CPU", seconds, seconds + 1), ("AS", memory, memory)]  # past the soft limit SIGXCPU, at the hard SIGKILL
    limits += [(name, value, value) for name, value in LIMITS.items()]
    user = 60_000 + next(USERS) % 4_000 if os.geteuid() == 0 else None
    return f"SIZE, USER, LIMITS = {size}, {user}, {limits}\n{BOOTSTRAP}"
