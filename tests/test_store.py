"""The store of a comparison: names, whole files, several writers, damage, and one comparison a folder."""

import math
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from svdpeft.compare.store import Damaged, Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    """An empty store in a folder, and one that is not on a disk."""
    if request.param == "local":
        yield Store(tmp_path / "out")
        return
    yield Store("memory://svdpeft/out")
    if (memory := fsspec.filesystem("memory")).exists("/svdpeft"):
        memory.rm("/svdpeft", recursive=True)


def record(seed=0, **more):
    return {"label": "LoRA", "identity": {"model": "m", "seed": seed}, **more}


def put(store, path, data):
    """Write raw bytes past the store."""
    store._files.makedirs(f"{store._root}/{path}".rpartition("/")[0], exist_ok=True)
    store._files.pipe_file(f"{store._root}/{path}", data)


# Records


def test_a_record_is_read_as_it_was_written(store):
    name = store.name("SVFT, banded (1)", record()["identity"])
    assert not store.done("runs", name)
    assert store.read("runs") == ([], [])
    store.write("runs", name, record(items={"accuracy": (1, 0)}, where=Path("a/b"), none=None, yes=True))
    assert store.done("runs", name)
    assert not store.done("trials", name)
    expected = record(items={"accuracy": [1, 0]}, where="a/b", none=None, yes=True)
    assert store.load("runs", name) == expected
    assert store.read("runs") == ([expected], [])
    assert store.path("runs", name) == f"{store.address}/runs/{name}.json"


def test_the_name_says_what_decides_the_result():
    store = Store("x")
    name = store.name("SVFT banded", {"seed": 1, "lr": 0.1})
    assert name == "svft-banded-seed1-2ccbe222bd"  # of version 0.1.0: a store of that time is taken up
    assert store.name("SVFT banded", {"lr": 0.1, "seed": 1}) == name
    assert store.name("SVFT banded", {"lr": 0.2, "seed": 1}) != name
    assert store.name("方法", {"seed": 1}).startswith("run-seed1-")
    assert len(store.name("x" * 500, {"seed": 1})) < 120


def test_a_failed_run_is_not_done(store):
    store.write("runs", "a", record(error="OSError: no space"))
    assert not store.done("runs", "a")
    store.write("runs", "a", record())
    assert store.done("runs", "a")


def test_the_order_is_that_of_the_names(store):
    for seed in (3, 1, 2, 0):
        store.write("trials", f"t{seed}", record(seed))
    assert [each["identity"]["seed"] for each in store.read("trials")[0]] == [0, 1, 2, 3]


def test_browsers_can_read_what_is_not_finite(store):
    store.write(
        "runs", "a", record(loss=[math.nan, math.inf, -math.inf, np.float32("nan"), np.float32(0.5), np.int64(3)])
    )
    text = store._files.cat_file(f"{store._root}/runs/a.json").decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert store.load("runs", "a")["loss"] == [None, None, None, None, 0.5, 3]


def test_nan_that_others_wrote_is_read_as_none(store):
    put(store, "runs/a.json", b'{"identity": {}, "loss": [NaN, Infinity, 1.0]}')
    assert store.load("runs", "a")["loss"] == [None, None, 1.0]


def test_a_value_without_a_form_in_json_is_named_and_nothing_is_written(store):
    with pytest.raises(TypeError, match=r"runs/a\.json\.items\.loss\[1\] is a Tensor, for which JSON has no form"):
        store.write("runs", "a", record(items={"loss": [0.5, torch.ones(2)]}))
    assert store.read("runs") == ([], [])


# Damage


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"label": "LoRA", "identity": {"se', "no valid JSON (34 bytes)"),
        (b"", "no valid JSON (0 bytes)"),
        (b"\xff\xfe\x00", "no valid JSON (3 bytes)"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b'{"label": "LoRA"}', "has no 'identity'"),
        (b'{"identity": "x"}', "has no 'identity'"),
        (b'{"identity": {}, "epochs": 1%b}' % (b"0" * 400), "no valid JSON (429 bytes): the number 1000"),
    ],
    ids=["cut", "empty", "binary", "deep", "list", "anonymous", "text", "large"],
)
def test_a_damaged_file_is_named_and_skipped_and_its_run_done_again(store, data, reason):
    store.write("runs", "a", record(0))
    store.write("runs", "c", record(2))
    put(store, "runs/b.json", data)
    records, damaged = store.read("runs")
    assert [each["identity"]["seed"] for each in records] == [0, 2]
    assert damaged == [Damaged(store.path("runs", "b"), damaged[0].reason)]
    assert damaged[0].reason.startswith(reason)
    with pytest.raises(ValueError, match=r"runs/b\.json: "):
        store.load("runs", "b")
    assert not store.done("runs", "b")
    store.write("runs", "b", record(1))
    assert store.done("runs", "b")
    assert store.read("runs")[1] == []


def test_a_record_that_a_reader_has_no_use_for_is_named_by_its_file(store):
    def check(found):
        if found["identity"]["seed"] == 1:
            raise ValueError("is of no use")

    for seed in range(3):
        store.write("runs", f"r{seed}", record(seed))
    records, damaged = store.read("runs", check)
    assert [each["identity"]["seed"] for each in records] == [0, 2]
    assert damaged == [Damaged(store.path("runs", "r1"), "is of no use")]


def test_what_is_no_record_is_left_alone(tmp_path):
    store = Store(tmp_path)
    store.write("runs", "a", record())
    (tmp_path / "runs" / ".b.json.123").write_text("{")  # what a killed writer left
    (tmp_path / "runs" / ".c.json").write_text("{")
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    assert store.read("runs") == ([record()], [])


# Addresses


def test_an_address_is_opened_again_elsewhere(store, tmp_path, monkeypatch):
    store.write("runs", "a", record())
    monkeypatch.chdir(tmp_path.parent)
    again = pickle.loads(pickle.dumps(store))
    assert again.address == store.address
    assert again.read("runs") == store.read("runs")


def test_a_relative_folder_is_kept_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out/first/")
    assert store.address == str(tmp_path / "out" / "first")
    assert Store(Path("out/first")).address == store.address
    assert not (tmp_path / "out").exists()  # nothing is made by looking
    store.claim({"spec": {}})
    store.write_text("report.md", "ü")
    store.write_bytes("pictures/loss.png", b"\x89")
    assert (tmp_path / "out/first/report.md").read_bytes() == "ü".encode()
    assert (tmp_path / "out/first/pictures/loss.png").read_bytes() == b"\x89"


def test_names_with_signs_of_a_pattern_are_names(tmp_path):
    store = Store(tmp_path / "lr=[0.1,1]*?")
    store.write("runs", "a", record())
    assert store.read("runs")[0] == [record()]


def test_an_unknown_storage_is_named_with_the_near_miss():
    with pytest.raises(ValueError, match=r"no storage is called 'memroy' \(memroy://x\): did you mean 'memory'"):
        Store("memroy://x")


def test_others_may_read_what_is_written(tmp_path):
    store = Store(tmp_path)
    old = os.umask(0o022)
    try:
        store.write("runs", "a", record())
    finally:
        os.umask(old)
    assert (tmp_path / "runs" / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("runs", "a", record(0))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write("runs", "a", record(1))
    assert store.load("runs", "a") == record(0)
    assert os.listdir(tmp_path / "runs") == ["a.json"]


# Several processes

WRITER = """
import sys
sys.path.insert(0, sys.argv[4])
from svdpeft.compare.store import Store
store, me, count = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for i in range(count):
    own = {"identity": {"seed": i, "writer": me}, "items": [me] * (1 + 997 * i % 5000)}
    store.write("runs", f"shared{i % 5}", own)
    store.write("runs", f"own{me}-{i}", own)
"""


def test_several_writers_and_a_reader(tmp_path):
    writers, count = 3, 25
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, str(i), str(count), root]) for i in range(writers)]
    store, looked = Store(tmp_path), 0
    while any(process.poll() is None for process in running):
        records, damaged = store.read("runs")
        looked += bool(records)
        assert damaged == []
        for each in records:  # whole, and of one writer
            assert set(each["items"]) == {each["identity"]["writer"]}
            assert len(each["items"]) == 1 + 997 * each["identity"]["seed"] % 5000
    assert [process.returncode for process in running] == [0] * writers
    assert looked > 3
    assert len(store.read("runs")[0]) == 5 + writers * count
    assert [name for name in os.listdir(tmp_path / "runs") if name.startswith(".")] == []


def test_those_who_extend_a_comparison_wait_for_each_other(tmp_path, monkeypatch):
    look = Store.comparison

    def slow(store):
        found = look(store)
        time.sleep(0.05)  # in which the others would write
        return found

    monkeypatch.setattr(Store, "comparison", slow)
    specs = [{"spec": {"seeds": [seed], "methods": []}} for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda spec: Store(tmp_path).claim(spec), specs))
    assert Store(tmp_path).comparison()["spec"]["seeds"] == [0, 1, 2, 3]


# One comparison a folder

LORA = {"label": "LoRA", "method": {"name": "lora", "rank": 8}, "lr": 0.01}
SORSA = {"label": "SORSA", "method": {"name": "sorsa", "rank": 8}, "lr": 0.001}


def comparison(**changes):
    spec = {"model": "m", "task": {"name": "t", "train_size": 100}, "seeds": [0, 1], "methods": [LORA]}
    return {"spec": {**spec, "budgets": ["1%"], "search": None, "baseline": "LoRA", **changes}, "svdpeft": "0.1.0"}


def test_the_first_comparison_is_written_down_and_may_come_again(store):
    assert store.comparison() is None
    store.claim(comparison())
    assert store.comparison() == comparison()
    store.claim(comparison())
    store.claim(comparison(seeds=(1,)))  # a part of it
    assert store.comparison() == comparison()


def test_more_seeds_and_methods_extend_it(store):
    store.claim(comparison())
    store.claim(comparison(seeds=[2], methods=[SORSA]))
    assert store.comparison() == comparison(seeds=[0, 1, 2], methods=[LORA, SORSA])


def test_what_only_the_report_reads_may_change(store):
    store.claim(comparison())
    store.claim(comparison(baseline="SORSA", methods=[LORA, SORSA], confidence=0.9))
    assert store.comparison()["spec"]["baseline"] == "SORSA"
    assert store.comparison()["spec"]["confidence"] == 0.9


def test_what_was_not_given_again_stays(store):
    store.claim(comparison(confidence=0.9))
    store.claim(comparison(baseline=None, confidence=None, seeds=[2]))
    assert store.comparison() == comparison(confidence=0.9, seeds=[0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "n"}, 'model is "m" there and "n" here'),
        ({"task": {"name": "t", "train_size": 50}}, "task.train_size is 100 there and 50 here"),
        ({"budgets": ["1%", "2%"]}, r'budgets is ["1%"] there and ["1%", "2%"] here'),
        ({"search": {"kind": "grid", "trials": 5}}, 'search is not given there and {"kind": "grid", "trials": 5} here'),
        ({"epochs": 2}, "epochs is not given there and 2 here"),
        ({"methods": [{**LORA, "lr": 0.02}]}, "methods['LoRA'].lr is 0.01 there and 0.02 here"),
        (
            {"methods": [SORSA, {**LORA, "method": {"name": "lora", "rank": 16}}]},
            "methods['LoRA'].method.rank is 8 there and 16 here",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_comparison_is_refused(store, changes, message):
    store.claim(comparison())
    with pytest.raises(ValueError, match="another comparison") as caught:
        store.claim(comparison(**changes))
    assert str(caught.value) == f"{store.address} holds another comparison: {message}; take another --out for this one"
    assert store.comparison() == comparison()


def test_somebody_else_is_first(monkeypatch):
    """Two start in one empty object store: between the look and the put of one comes the put of the other."""
    store, other = Store("memory://svdpeft/race"), Store("memory://svdpeft/race")
    look = store._files.cat_file
    looks = iter([FileNotFoundError])

    def late(path):
        if next(looks, None):
            raise FileNotFoundError(path)
        return look(path)

    other.claim(comparison(model="other"))
    monkeypatch.setattr(store._files, "cat_file", late)
    with pytest.raises(ValueError, match='model is "other" there and "m" here'):
        store.claim(comparison())
    store._files.rm("/svdpeft", recursive=True)


@pytest.mark.parametrize("data", [b'{"spec": {"mod', b'{"svdpeft": "0.1.0"}'], ids=["cut", "no spec"])
def test_a_damaged_comparison_is_named(store, data):
    put(store, "comparison.json", data)
    for look in (store.comparison, lambda: store.claim(comparison())):
        with pytest.raises(ValueError, match=r"comparison\.json: "):
            look()
    assert store._files.cat_file(f"{store._root}/comparison.json") == data
