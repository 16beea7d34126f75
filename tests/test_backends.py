"""Jobs here, in several processes, and on a Ray cluster; workers that die, interrupts."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from svdpeft.compare.backends import map_jobs
from svdpeft.compare.store import Store


def do(folder: Path, job: dict) -> dict:
    """A job: says in a file that it has begun, does what its name says, and says when it has ended."""
    name, begun = job["name"], time.monotonic()
    tries = len(list(folder.glob(f"{name}.begun*"))) + 1
    (folder / f"{name}.begun{tries}").write_text(f"{begun} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    if name == "raises":
        raise ValueError("no such thing")
    if name == "unpicklable":
        return {"lock": threading.Lock()}
    if name.startswith("dies") or (name.startswith("died") and tries == 1):
        if name == "died-with-child":  # which holds all that its parent had open
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(120,))
            child.start()
            (folder / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("waits"):
        time.sleep(300)
    time.sleep(0.1)
    threads, bars = torch.get_num_threads(), transformers.logging.is_progress_bar_enabled()
    ended = time.monotonic()
    return {"begun": begun, "ended": ended, "pid": os.getpid(), "tries": tries, "threads": threads, "bars": bars}


def named(*names: str) -> list[dict]:
    return [{"name": name} for name in names]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def soon(condition, seconds: float = 120.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pid_of(folder: Path, name: str) -> int:
    """The process that does a job: waits for its beginning."""
    path = folder / f"{name}.begun1"
    soon(lambda: path.exists() and path.read_text())
    return int(path.read_text().split()[1])


# Here


def test_one_worker_is_this_process(tmp_path):
    seen = []
    jobs = named("a", "raises", "unpicklable", "b")
    outcomes = map_jobs(lambda job: do(tmp_path, job), jobs, workers=1, on_start=seen.append)
    first = next(outcomes)
    assert first.job is jobs[0]
    assert first.result["pid"] == os.getpid()
    assert seen == jobs[:1]  # one after the other
    raised, lock, last = outcomes
    assert raised.error == "ValueError: no such thing"
    assert 'raise ValueError("no such thing")' in raised.traceback
    assert lock.error is None  # nothing is pickled
    assert last.result["tries"] == 1
    assert seen == jobs


def test_an_interrupt_passes(tmp_path):
    def interrupted(job):
        if job["name"] == "b":
            raise KeyboardInterrupt
        return job

    outcomes = map_jobs(interrupted, named("a", "b", "c"))
    assert next(outcomes).error is None
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "rya"}, "no backend is called 'rya': did you mean 'ray'"),
        ({"workers": 0}, "workers=0: at least one is needed"),
        ({"address": "auto"}, "address='auto' is of a Ray cluster: it needs backend='ray'"),
    ],
)
def test_bad_options_are_named_before_anything_is_done(options, message):
    with pytest.raises(ValueError, match=message):
        map_jobs(abs, [1], **options)


def test_no_jobs():
    assert list(map_jobs(abs, [], workers=3)) == []


# Several processes


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What becomes of all kinds of jobs with two workers: outcomes by name, in order; starts; the folder."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs, starts, outcomes = named("a", "died-with-child", "raises", "dies", "unpicklable", "b", "c", "d"), [], {}
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")  # the last does not exist
        patch.setattr(torch, "get_num_threads", lambda: 5)
        for outcome in map_jobs(partial(do, folder), jobs, on_start=lambda job: starts.append(job["name"])):
            assert outcome.job["name"] not in outcomes
            assert any(outcome.job is job for job in jobs)
            outcomes[outcome.job["name"]] = outcome
        assert os.environ == {**before, "CUDA_VISIBLE_DEVICES": "3,5,7"}
    child = int((folder / "child").read_text())
    assert alive(child)  # the death of its parent was seen all the same
    os.kill(child, signal.SIGKILL)
    return outcomes, starts, folder


def test_every_job_has_one_outcome(done):
    outcomes, starts, _ = done
    assert sorted(outcomes) == ["a", "b", "c", "d", "died-with-child", "dies", "raises", "unpicklable"]
    assert starts[:8] == ["a", "died-with-child", "raises", "dies", "unpicklable", "b", "c", "d"]
    good = {name: outcome.result for name, outcome in outcomes.items() if outcome.error is None}
    assert sorted(good) == ["a", "b", "c", "d", "died-with-child"]
    assert os.getpid() not in {result["pid"] for result in good.values()}


def test_a_job_whose_worker_died_is_taken_up_alone_when_all_others_are_done(done):
    outcomes, starts, folder = done
    assert sorted(starts[8:]) == ["died-with-child", "dies"]  # in the order in which they died
    assert outcomes["died-with-child"].result["tries"] == 2
    others = [outcomes[name].result for name in "abcd"]
    assert all(result["tries"] == 1 for result in others)
    assert outcomes["died-with-child"].result["begun"] > max(result["ended"] for result in others)
    again = float((folder / "dies.begun2").read_text().split()[0])
    begun, ended = (outcomes["died-with-child"].result[word] for word in ("begun", "ended"))
    assert again > max(result["ended"] for result in others)
    assert not begun <= again <= ended


def test_a_job_that_kills_its_worker_again_has_failed(done):
    outcomes, _, folder = done
    assert outcomes["dies"].result is None
    assert outcomes["dies"].error == "WorkerDied: the worker was killed by SIGKILL (out of memory?) at try 2 of 2"
    assert len(list(folder.glob("dies.begun*"))) == 2


def test_an_exception_is_an_outcome_and_the_worker_goes_on(done):
    outcomes, _, folder = done
    assert outcomes["raises"].error == "ValueError: no such thing"
    assert "in do\n" in outcomes["raises"].traceback
    assert outcomes["unpicklable"].error == "TypeError: cannot pickle '_thread.lock' object"
    pids = [path.read_text().split()[1] for path in folder.glob("*.begun*")]
    assert len(set(pids)) < len(pids)


def test_gpus_and_threads_are_shared(done):
    outcomes, _, folder = done
    begun = {path.name: path.read_text().split()[1:] for path in folder.glob("*.begun*")}
    assert {begun["a.begun1"][1], begun["died-with-child.begun1"][1]} == {"3", "5"}
    assert len({tuple(each) for each in begun.values()}) == len(
        {pid for pid, _ in begun.values()}
    )  # each keeps its own
    assert {outcome.result["threads"] for outcome in outcomes.values() if outcome.result} == {2}


def test_workers_draw_no_bars_over_the_callers(done):
    outcomes, _, _ = done
    assert {outcome.result["bars"] for outcome in outcomes.values() if outcome.result} == {False}


HERE = [
    str(folder) for folder in (Path(__file__).with_name("light"), *Path(__file__).parents[:2])
]  # of workers: this module, svdpeft
SCRIPT = """
import signal, sys, time
from functools import partial
from pathlib import Path
from test_backends import do, map_jobs, named
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it would be ignored
    folder = Path({folder!r})
    outcomes = map_jobs(partial(do, folder), named("a", "waits1", "waits2", "waits3"), workers=2)
    for outcome in outcomes:
        (folder / "outcome").write_text(outcome.job["name"])
        while (folder / "leave").exists():
            if (folder / "waits1.begun1").exists():
                sys.exit(7)  # the loop is not closed: its name is a global one
            time.sleep(0.02)
"""


@contextlib.contextmanager
def started(folder):
    script = folder / "program.py"
    script.write_text(SCRIPT.format(folder=str(folder)))
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(HERE)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group as a terminal makes one
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def program(tmp_path):
    """A program whose two workers are both in the middle of a job, after one that is done."""
    with started(tmp_path) as process:
        yield process, [pid_of(tmp_path, name) for name in ("waits1", "waits2")]


def test_an_interrupt_from_the_keyboard_stops_the_workers(program, tmp_path):
    process, workers = program
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # only the program's own
    assert not any(alive(pid) for pid in workers)
    assert (tmp_path / "outcome").read_text() == "a"
    assert not (tmp_path / "waits3.begun1").exists()


def test_workers_do_not_outlive_a_program_that_was_killed(program):
    process, workers = program
    process.kill()
    soon(lambda: not any(alive(pid) for pid in workers))


def test_a_program_that_ends_in_the_middle_does_not_wait_for_its_jobs(tmp_path):
    (tmp_path / "leave").touch()
    with started(tmp_path) as process:
        assert process.wait(120) == 7
        assert not alive(pid_of(tmp_path, "waits1"))


# Ray

RAY_MISSING = importlib.util.find_spec("ray") is None
on_ray = [
    pytest.mark.skipif(RAY_MISSING, reason='Ray is not installed: pip install "svdpeft[ray]"'),
    pytest.mark.xdist_group("ray"),  # one cluster
]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "svdpeft\[ray\]"'):
        map_jobs(abs, [1], backend="ray")


@pytest.fixture(scope="module")
def cluster():
    """A head that does no jobs, and two nodes with room for one job each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(HERE))
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 80 * 2**20}
        head = {"num_cpus": 0, "include_dashboard": False, **small}
        with warnings.catch_warnings():
            # older versions of Ray leave the files open that the processes which they start write to
            warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)
            cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(2):
                cluster.add_node(num_cpus=1, **small)
        yield cluster
        cluster.shutdown()


def on_node(address: str, folder: Path, job: dict) -> dict:
    """A job on a cluster, which writes its record; the first ones wait in the middle until they may go on."""
    import ray

    done = do(folder, job)
    if job["name"].startswith("first"):
        soon(lambda: (folder / "go").exists())
    Store(address).write("runs", job["name"], {"identity": job, "tries": done["tries"]})
    return {"node": ray.get_runtime_context().get_node_id(), "tries": done["tries"]}


@pytest.fixture(scope="module")
def done_on_ray(cluster, tmp_path_factory):
    """What becomes of all kinds of jobs while a node is killed in the middle; the store; the job that the node had."""
    folder = tmp_path_factory.mktemp("jobs")
    store, killed = Store(folder / "out"), []

    def kill() -> None:
        pids = {name: pid_of(folder, name) for name in ("first1", "first2")}  # one on each node
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        soon(lambda: not all(alive(pid) for pid in pids.values()))
        killed.extend(name for name, pid in pids.items() if not alive(pid))
        (folder / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    jobs, starts = named("first1", "first2", "raises", "died", "dies", "a"), []
    found = map_jobs(
        partial(on_node, store.address, folder),
        jobs,
        backend="ray",
        address=cluster.address,
        workers=2,
        on_start=starts.append,
    )
    outcomes = {outcome.job["name"]: outcome for outcome in found}
    killer.join()
    assert all(any(outcome.job is job for job in jobs) for outcome in outcomes.values())
    assert starts == jobs
    return outcomes, store, killed, folder


class TestRay:
    pytestmark = on_ray

    def test_the_run_of_a_node_that_is_killed_is_taken_up_again(self, done_on_ray):
        outcomes, store, killed, _ = done_on_ray
        (lost,) = killed
        (kept,) = {"first1", "first2"} - {lost}
        assert outcomes[kept].result["tries"] == 1
        assert outcomes[lost].result["tries"] == 2
        assert outcomes[lost].result["node"] == outcomes[kept].result["node"]
        records, damaged = store.read("runs")
        assert damaged == []
        assert {each["identity"]["name"]: each["tries"] for each in records} == {"a": 1, "died": 2, kept: 1, lost: 2}

    def test_jobs_that_fail_do_not_stop_the_others(self, done_on_ray):
        outcomes, _, _, folder = done_on_ray
        assert sorted(outcomes) == ["a", "died", "dies", "first1", "first2", "raises"]
        assert outcomes["died"].result["tries"] == 2
        assert outcomes["raises"].error == "ValueError: no such thing"
        assert "in do\n" in outcomes["raises"].traceback
        assert outcomes["dies"].error.startswith("WorkerDied: ")
        assert len(list(folder.glob("dies.begun*"))) == 2

    def test_leaving_the_loop_stops_the_workers(self, cluster, tmp_path):
        function = partial(do, tmp_path)
        outcomes = map_jobs(function, named("unpicklable", "waits"), backend="ray", address=cluster.address)
        assert "cannot pickle" in next(outcomes).error
        worker = pid_of(tmp_path, "waits")
        outcomes.close()
        soon(lambda: not alive(worker))

    def test_a_comparison_is_the_one_of_a_single_process(self, cluster, done_on_ray, tmp_path):
        """After a node has died: the cluster that is left trains whole runs, and they are those of this process."""
        from svdpeft.compare import runner  # not above: workers import this module, and need neither
        from svdpeft.compare.reading import read_spec

        spec = read_spec(
            model="efficientnet-lite0",
            methods="head-only,lora",
            seeds=[0],
            epochs=1,
            batch_size=8,
            search={"trials": 3},
            task_options={"train_size": 16, "validation_size": 8, "test_size": 8},
        )
        there = runner.compare(spec, tmp_path / "ray", runner.Engine("ray", 1, cluster.address))
        assert [record.get("error") for record in there] == [None, None]
        assert len(list((tmp_path / "ray" / "trials").iterdir())) == 6
        torch.set_num_threads(there[0]["machine"]["threads"])  # sums depend on how many threads share them
        here = runner.compare(spec, tmp_path / "here")
        assert [(r["search"]["lr"], r["loss"]) for r in there] == [(r["search"]["lr"], r["loss"]) for r in here]
