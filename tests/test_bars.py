"""Progress bars: nothing that another process does holds one up."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from svdpeft.bars import Bar, bar

KILLED = """
import os, signal, sys
from svdpeft.bars import Bar, bar
list(bar(range(3), what="count", unit="number"))
reading, saying = os.pipe()
process = os.fork()
if not process:
    Bar.get_lock().acquire()  # as it is held while a bar is drawn
    os.write(saying, b"1")
    signal.pause()
os.read(reading, 1)
os.kill(process, signal.SIGKILL)
os.waitpid(process, 0)
print(len(list(bar(range(3), what="count", unit="number"))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_that_is_killed_while_it_draws_a_bar_holds_up_no_other():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "3\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_process_that_is_forked_while_a_thread_draws_a_bar_has_bars():
    held, done = threading.Event(), threading.Event()

    def draw() -> None:
        with Bar.get_lock():
            held.set()
            done.wait()

    thread = threading.Thread(target=draw)
    thread.start()
    held.wait()
    process = os.fork()
    if not process:
        signal.alarm(20)  # what ends it where it waits
        os._exit(len(list(bar(range(3), what="count", unit="number"))))
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3


def test_no_thread_watches_over_it():
    code = (
        "import threading; from svdpeft.bars import bar; "
        "list(bar([1], what='count', unit='number')); print(threading.active_count())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
