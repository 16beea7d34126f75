"""The sandbox: hostile programs are bounded, see nothing, leave nothing, and do not pass by leaving early."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from svdpeft.tasks import sandbox, syscalls
from svdpeft.tasks.sandbox import MIB, Outcome, SandboxError


@pytest.fixture(autouse=True)
def fenced() -> None:
    if reason := sandbox.available():
        pytest.skip(reason)


def size() -> int:
    """A memory limit that no other sandbox of this machine has, so that the processes behind it can be found."""
    return 512 * MIB + secrets.randbelow(MIB)


def processes(memory: int) -> list[int]:
    """The processes of the sandbox with this limit, inside and outside: it stands in their command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and str(memory).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has just ended
    return found


def gone(memory: int) -> bool:
    """Whether all of them end within two seconds."""
    for _ in range(100):
        if not processes(memory):
            return True
        time.sleep(0.02)
    return False


def run(program: str, timeout: float = 5.0) -> Outcome:
    """Run a program, and see that nothing of it is left."""
    memory = size()
    outcome = sandbox.run(program, timeout=timeout, memory=memory)
    assert gone(memory)
    return outcome


# -- verdicts

EVERYWHERE = """
import os
for fd in range(64):
    try: os.write(fd, b"{}")
    except OSError: pass
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sum(range(4)) == 6", "passed"),
        ("import math, re, typing, collections, itertools, hashlib, heapq, decimal, dataclasses", "passed"),
        ("assert False", "failed: AssertionError"),
        ("assert 1 == 2, 'one is\\nnot two'", "failed: AssertionError: one is not two"),
        ("raise ValueError('\x1b[2Jgone')", "failed: ValueError: ?[2Jgone"),
        ("unknown", "failed: NameError: name 'unknown' is not defined"),
        ("def f(:", "failed: SyntaxError: invalid syntax (<program>, line 1)"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("import numpy", "failed: ModuleNotFoundError: No module named 'numpy'"),
        ("x = bytearray(10**9)", "out of memory"),
        ("def f(): return f()\nf()", "failed: RecursionError: maximum recursion depth exceeded"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
def test_a_verdict_says_what_happened(program, reason):
    assert run(program) == Outcome(reason == "passed", reason)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import os; os._exit(255)",
        "import os; os._exit(165)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os.execv('/usr/bin/true', ['true'])",
        "import os; os.closerange(0, 64)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(1, signal.SIGKILL); os.kill(-1, signal.SIGTERM); assert False",
        "print('started:passed'); assert False",
        EVERYWHERE.format("started:passed") + "assert False",
        EVERYWHERE.format("0" * 32) + "os._exit(0)",
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        "import builtins; builtins.exec = builtins.print = None; raise AssertionError",
        "import atexit, os; atexit.register(os._exit, 0); assert False",
    ],
)
def test_leaving_early_or_saying_so_is_not_passing(program):
    outcome = run(program)
    assert not outcome.passed
    assert outcome.reason not in ("", "passed")


def test_a_text_is_hashed_the_same_in_every_run():
    """The order of a set must not decide a verdict."""
    texts = [run(f"raise ValueError(hash('text{i}'))").reason for i in (0, 0)]
    assert texts[0] == texts[1]


def test_many_programs_keep_their_order():
    programs = [f"assert {i} % 3" for i in range(9)]
    assert [outcome.passed for outcome in sandbox.run_all(programs)] == [i % 3 > 0 for i in range(9)]
    assert sandbox.run_all([]) == []


def test_a_long_program_and_one_that_is_no_text_arrive():
    assert run(f"assert len({'x' * 300_000!r}) == 300_000").passed
    assert run("assert '\ud800' == '?'").passed


# -- what is bounded

FORK_BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
STUBBORN = """
import os, signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
"""


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        STUBBORN + "while True: pass",
        "while True: print('x' * 10_000)",
        "while True:\n    try: [0] * 10**9\n    except MemoryError: pass",
    ],
    ids=["sleep", "loop", "no signals", "endless output", "memory hog"],
)
def test_what_never_ends_is_ended(program):
    start = time.monotonic()
    assert run(program, timeout=1) == Outcome(False, "timed out")
    assert time.monotonic() - start < 10


def test_a_fork_bomb_starts_no_process():
    memory = size()
    counts = []
    with ThreadPoolExecutor(1) as aside:
        bomb = aside.submit(sandbox.run, FORK_BOMB, timeout=1, memory=memory)
        while not bomb.done():
            counts.append(len(processes(memory)))
            time.sleep(0.02)
    assert bomb.result() == Outcome(False, "timed out")
    assert max(counts) == 3  # bwrap, the first process inside, the program
    assert gone(memory)


def test_threads_work_and_are_bounded():
    program = (
        "import threading, time\ncount = 0\n"
        "try:\n"
        "    while count < 500: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); count += 1\n"
        "except RuntimeError: pass\n"
        "assert 25 < count < 32, count"
    )
    assert sandbox.run(program, memory=4096 * MIB) == Outcome(True, "passed")


def test_threads_of_one_program_are_not_counted_for_another():
    program = (
        "import threading, time\n"
        "for i in range(25): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "time.sleep(1)"
    )
    with ThreadPoolExecutor(3) as together:
        outcomes = together.map(lambda each: sandbox.run(each, memory=4096 * MIB), [program] * 3)
        assert [outcome.reason for outcome in outcomes] == ["passed"] * 3


def test_memory_that_no_address_space_counts_is_refused_or_bounded():
    assert run(
        "import os, ctypes\n"
        "try: os.memfd_create('m'); raise AssertionError\n"
        "except PermissionError: pass\n"
        "assert ctypes.CDLL(None).shmget(0, 2**20, 0o1600) == -1\n"
        "written = 0\n"
        "try:\n"
        "    while written < 100: open(str(written), 'wb').write(bytes(2**20)); written += 1\n"
        "except OSError as error: assert 'No space' in str(error)\n"
        "assert 8 < written <= 16, written\n"
    ).passed


def test_limits_are_set_and_cannot_be_raised():
    wanted = {"AS": 300 * MIB, "CPU": 8, "FSIZE": 16 * MIB, "NPROC": 32, "NOFILE": 64, "STACK": 8 * MIB, "CORE": 0}
    program = f"import resource\nfor name, value in {wanted}.items():\n" + (
        "    which = getattr(resource, 'RLIMIT_' + name)\n"
        "    soft, hard = resource.getrlimit(which)\n"
        "    assert 0 <= soft <= value and 0 <= hard <= value, name\n"
        "    try: resource.setrlimit(which, (hard, hard + 1)); raise AssertionError(name)\n"
        "    except ValueError: pass\n"
    )
    assert sandbox.run(program, timeout=7, memory=300 * MIB) == Outcome(True, "passed")


# -- what is out of reach


def test_nothing_outside_can_be_written_or_seen(tmp_path):
    (tmp_path / "secret").write_text("secret")
    name = f"svdpeft-{secrets.token_hex(8)}"
    places = [Path.home(), Path.cwd(), tmp_path, Path("/etc"), Path("/usr"), Path("/usr/lib"), Path("/dev"), Path("/")]
    places += [Path(sys.executable).parent, Path(sys.base_prefix) / "lib", Path("/var/tmp"), Path("/dev/shm")]
    hidden = [str(tmp_path / "secret"), __file__, "/etc/passwd", "/proc/1/environ", "/sys", "/home", "/var"]
    assert run(
        "import os\n"
        f"for place in {[str(place) for place in places]}:\n"
        f"    for attempt in (lambda p: open(p, 'w'), os.mkdir, os.mkfifo, lambda p: os.symlink('x', p)):\n"
        f"        try: attempt(os.path.join(place, {name!r}))\n"
        "        except OSError: continue\n"
        "        raise AssertionError(place)\n"
        f"assert not list(filter(os.path.exists, {hidden}))\n"
        "assert os.listdir('/tmp') == [] and os.getcwd() == '/tmp'\n"
        "assert all(os.statvfs(place).f_flag & os.ST_RDONLY for place in ('/', '/usr', os.__file__))\n"
    ) == Outcome(True, "passed")
    assert not [place for place in places if (place / name).exists()]


def test_the_temporary_folder_is_its_own_each_time():
    name = f"svdpeft-{secrets.token_hex(8)}"
    program = f"import os\nassert not os.path.exists('/tmp/{name}')\nopen('/tmp/{name}', 'w').write('x')"
    assert run(program).passed
    assert not Path("/tmp", name).exists()
    assert run(program).passed


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SVDPEFT_TEST_TOKEN", "secret")
    assert run(
        "import os\nassert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'PYTHONHASHSEED', 'PWD'}, os.environ\n"
        "assert os.uname().nodename == 'sandbox' and os.getuid() == os.geteuid() == os.getgid() >= 60_000\n"
    ).passed


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):  # nobody has come
            server.accept()


CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"


def test_there_is_no_network(listening):
    assert run(CONNECT.format(port=listening)).reason.startswith("failed: PermissionError")


def test_processes_cannot_be_started():
    for start in ("os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "subprocess.run(['true'])"):
        assert run(f"import os, subprocess; {start}").reason.startswith("failed: PermissionError"), start
    assert run("import os; assert os.system('true')").passed  # not the status 0 of true


def test_every_call_of_the_list_is_refused():
    """Called by number: the C library has other ways to the same end."""
    column = list(syscalls.MACHINES).index(platform.machine())
    numbers = {name: both[column] for name, both in syscalls.REFUSED.items() if both[column] is not None}
    numbers |= {"fork": 57, "vfork": 58} if platform.machine() == "x86_64" else {}
    assert run(
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers}.items():\n"
        "    assert libc.syscall(number, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, name\n"
        "assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1\n"  # CLONE_NEWUSER
    ) == Outcome(True, "passed")


# -- the fences behind the first ones

LOAD = "from svdpeft.tasks import sandbox;"


@pytest.fixture
def unfiltered(monkeypatch) -> None:
    monkeypatch.setattr(syscalls, "filter_for", lambda machine: struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))


@pytest.mark.usefixtures("unfiltered")
def test_without_the_filter_there_is_still_no_network(listening):
    assert run(CONNECT.format(port=listening)).reason.startswith("failed: ConnectionRefusedError")


@pytest.mark.usefixtures("unfiltered")
def test_without_the_filter_processes_are_bounded_and_do_not_outlive_the_program():
    memory = size()
    program = (
        "import os, time\nstarted = 0\n"
        "try:\n"
        "    while started < 100:\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            time.sleep(60)\n"
        "            os._exit(0)\n"
        "        started += 1\n"
        "except BlockingIOError: pass\n"
        "assert 1 < started < 32, started"
    )
    assert sandbox._run(program, 5, memory) == Outcome(True, "passed")
    assert gone(memory)


def test_a_program_ends_with_its_caller():
    memory = size()
    program = STUBBORN + "import time; time.sleep(60)"
    call = f"sandbox.run({program!r}, timeout=30, memory={memory})"
    caller = subprocess.Popen([sys.executable, "-c", LOAD + call])
    try:
        while len(processes(memory)) < 4:  # the caller, bwrap twice, the program
            assert caller.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(caller.pid, signal.SIGKILL)
        caller.wait()
    assert gone(memory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user; the others are one")
def test_an_ordinary_user_has_the_same_fences():
    """In a namespace where root's files are the user's own: so the interpreter can be read."""
    programs = ("pass", "import os; os.fork()", "import os; raise OSError(os.getuid())")
    inside = f"assert not sandbox.available(); print([sandbox.run(each).reason for each in {programs}])"
    user = ["bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000", "--dev-bind", "/", "/"]
    said = subprocess.run([*user, sys.executable, "-c", LOAD + inside], capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == str(
        ["passed", "failed: PermissionError: [Errno 1] Operation not permitted", "failed: OSError: 65534"]
    ), said.stderr


# -- where there is no sandbox


@pytest.fixture
def unknown() -> Iterator[None]:
    sandbox.available.cache_clear()
    yield
    sandbox.available.cache_clear()


@pytest.mark.usefixtures("unknown")
def test_without_bubblewrap_nothing_is_run(monkeypatch, tmp_path):
    written = tmp_path / "written"
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (sandbox.run, lambda program: sandbox.run_all([program])):
        with pytest.raises(SandboxError, match=r"no program bwrap on the PATH: apt install bubblewrap"):
            call(f"open({str(written)!r}, 'w')")
    assert not written.exists()


@pytest.mark.usefixtures("unknown")
def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    assert sandbox.available() == "the sandbox needs Linux on x86_64 or aarch64; this is Linux on riscv64"


def fake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert shutil.which("bwrap") == str(folder / "bwrap")


@pytest.mark.usefixtures("unknown")
def test_what_bubblewrap_complains_of_is_told(monkeypatch, tmp_path):
    fake(tmp_path, "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1", monkeypatch)
    with pytest.raises(SandboxError, match=r"bwrap: No permissions to create a new namespace.*sysctl"):
        sandbox.run("pass")


@pytest.mark.usefixtures("unknown")
def test_a_sandbox_without_fences_is_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)  # else the bootstrap would give up root
    fake(tmp_path, 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"', monkeypatch)
    with pytest.raises(SandboxError, match=r"the sandbox does not hold on this machine: .*fork was not refused"):
        sandbox.run("pass")


def test_a_start_that_hangs_is_given_up_even_with_a_long_program(monkeypatch, tmp_path):
    fake(tmp_path, "exec sleep 30", monkeypatch)
    start = time.monotonic()
    with pytest.raises(SandboxError, match="did not start in time"):
        sandbox.run("#" * 2**20, timeout=0.2)
    assert time.monotonic() - start < 10


def test_a_start_that_stalls_once_does_not_cost_the_score(monkeypatch, tmp_path):
    real = shutil.which("bwrap")
    first = f'mkdir {tmp_path}/stalled 2>/dev/null && exec sleep 30; exec {real} "$@"'
    fake(tmp_path, first, monkeypatch)
    assert [outcome.reason for outcome in sandbox.run_all(["pass"], timeout=1)] == ["passed"]
    assert (tmp_path / "stalled").exists()
    fake(tmp_path, "exec sleep 30", monkeypatch)  # once, not for ever
    with pytest.raises(SandboxError, match="did not start in time"):
        sandbox.run_all(["pass"], timeout=0.2)


@pytest.mark.parametrize(("option", "value"), [("timeout", 0), ("memory", MIB)])
def test_limits_that_no_program_can_meet(option, value):
    with pytest.raises(ValueError, match=rf"{option} {value} is below"):
        sandbox.run("pass", **{option: value})
