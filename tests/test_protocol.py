"""The protocol of a comparison: equal search for all, the test split touched once, everything measured."""

import copy
import itertools
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from comparison import Net, Signs
from helpers import LIGHT
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from svdpeft import LoRA
from svdpeft.cli import app
from svdpeft.compare import measures, report, run, runner
from svdpeft.compare.backends.outcome import Outcome
from svdpeft.compare.reading import read_spec
from svdpeft.compare.run import Job
from svdpeft.compare.spec import Search
from svdpeft.compare.store import Store
from svdpeft.decomposition import svd as truncated
from svdpeft.finetuning import session
from svdpeft.finetuning.words import read_values, tomllib
from svdpeft.models import load
from svdpeft.registry import METHODS
from svdpeft.tasks import probes


def searched(tiny, **search):
    return read_spec(**{**tiny, "search": search}, methods="lora:rank=2:lr=0.01,full:lr=0.001")


def test_every_method_has_the_same_trials_and_the_test_split_is_looked_at_once_per_run(tiny, tmp_path):
    spec = searched(tiny, trials=3, factor=10)
    records = runner.compare(spec, tmp_path)
    trials, damaged = Store(tmp_path).read("trials")
    assert not damaged
    rates = {
        label: sorted(t["identity"]["lr"] for t in trials if t["label"] == label) for label in ("LoRA rank=2", "Full")
    }
    assert rates == {"LoRA rank=2": [0.001, 0.01, 0.1], "Full": [0.0001, 0.001, 0.01]}
    assert {t["identity"]["seed"] for t in trials} == {1000}
    assert {t["metric"] for t in trials} == {"accuracy"}
    assert Signs.looked_at.count(30) == 6, "a trial is judged once, on the validation split"
    assert Signs.looked_at.count(40) == 4, "a run is judged once, on the test split"
    for record in records:
        mine = [t for t in trials if t["label"] == record["label"]]
        best = max(mine, key=lambda t: (t["value"], -t["loss"]))
        assert record["identity"]["lr"] == record["search"]["lr"] == best["identity"]["lr"]
        assert record["search"]["tried"] == sorted([t["identity"]["lr"], t["value"]] for t in mine)

    looks = len(Signs.looked_at)
    assert runner.compare(spec, tmp_path) == records
    assert len(Signs.looked_at) == looks, "what is there is not done again"


def scripted(monkeypatch, worth):
    """Replace training by a function of the rate; returns what was trained."""
    seen = []

    def trial(job, callbacks=()):
        seen.append((job.entry.lr, job.epochs, job.rung))
        return {"metric": "accuracy", "value": worth(job), "loss": 1.0}

    monkeypatch.setattr(runner, "trial", trial)
    monkeypatch.setattr(runner, "run", lambda job, *rest: {"search": job.search, "epochs": job.epochs})
    return seen


def test_halving_trains_fewer_rates_for_longer(tiny, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, lambda job: -abs(math.log10(job.entry.lr) + 3))  # 1e-3 is best
    spec = read_spec(
        **{**tiny, "epochs": 8, "search": {"kind": "halving", "trials": 9, "factor": 10}}, methods="full:lr=1e-5"
    )
    records = runner.compare(spec, tmp_path)
    at = {rung: sorted(lr for lr, _, r in seen if r == rung) for rung in range(4)}
    assert at[0] == pytest.approx([10.0**k for k in range(-9, 0)])
    assert at[1] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert at[2] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert len(at[3]) == 2
    assert {(rung, epochs) for _, epochs, rung in seen} == {(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0)}
    assert {r["identity"]["lr"] for r in records} == {1e-3}
    assert not records[0]["search"]["edge"]


@pytest.mark.parametrize("sign", [1, -1], ids=["largest", "smallest"])
def test_the_best_rate_at_the_edge_of_its_grid_is_said(tiny, tmp_path, monkeypatch, sign):
    scripted(monkeypatch, lambda job: sign * job.entry.lr)
    records = runner.compare(read_spec(**{**tiny, "search": {}}, methods="full:lr=1e-3"), tmp_path)
    assert records[0]["search"]["edge"]
    assert records[0]["identity"]["lr"] == (0.01 if sign > 0 else 0.0001)
    assert Search().rates(1e-3) == [1e-4, 0.000316228, 1e-3, 0.00316228, 1e-2]


@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize("kind", ["grid", "halving"])
def test_an_edge_is_followed_until_the_best_rate_lies_inside(tiny, tmp_path, monkeypatch, sign, kind):
    seen = scripted(monkeypatch, lambda job: -abs(math.log10(job.entry.lr) + 3 - 3 * sign))
    search = {"kind": kind, "trials": 3, "factor": 10, "further": 9}
    spec = read_spec(**{**tiny, "epochs": 8, "search": search}, methods="full:lr=1e-3,lora:rank=2:lr=1e-2")
    records = runner.compare(spec, tmp_path)
    further = sorted({lr for lr, _, _ in seen} - {1e-4, 1e-3, 1e-2, 1e-1})
    assert further == pytest.approx([1.0, 10.0] if sign > 0 else [1e-7, 1e-6, 1e-5])
    assert {epochs for lr, epochs, _ in seen if lr in further} == {8.0}
    assert {r["identity"]["lr"] for r in records} == {10.0 ** (3 * sign - 3)}
    assert not any(r["search"]["edge"] for r in records)


def test_an_edge_is_followed_no_further_than_said(tiny, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda job: job.entry.lr)
    search = {"trials": 3, "factor": 10, "further": 2}
    records = runner.compare(read_spec(**{**tiny, "search": search}, methods="full:lr=1e-3"), tmp_path)
    assert records[0]["search"]["tried"] == [[lr, lr] for lr in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    assert records[0]["search"]["edge"]


def test_a_rate_without_a_value_is_no_edge_to_follow(tiny, tmp_path, monkeypatch):
    """What diverges beyond the edge ends the search, and a search without any value is not followed."""
    seen = scripted(monkeypatch, lambda job: job.entry.lr if job.entry.lr < 0.1 else math.nan)
    search = {"trials": 3, "factor": 10, "further": 9}
    records = runner.compare(read_spec(**{**tiny, "search": search}, methods="full:lr=1e-3"), tmp_path / "a")
    assert [lr for lr, _, _ in seen] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert records[0]["search"]["lr"] == 1e-2
    assert not records[0]["search"]["edge"]
    seen = scripted(monkeypatch, lambda job: math.nan)
    runner.compare(read_spec(**{**tiny, "search": search}, methods="full:lr=1e-3"), tmp_path / "b")
    assert len(seen) == 3


def test_every_rate_is_trained_with_every_seed_of_the_search_and_their_mean_counts(tiny, tmp_path, monkeypatch):
    lucky = {(1000, 1e-2): 0.9, (1001, 1e-2): 0.1, (1000, 1e-3): 0.6, (1001, 1e-3): 0.6, (1000, 1e-4): 1.0}

    def worth(job):
        return lucky.get((job.seed, job.entry.lr), math.nan)

    scripted(monkeypatch, worth)
    search = {"trials": 3, "factor": 10, "seeds": 2}
    records = runner.compare(read_spec(**{**tiny, "search": search}, methods="full:lr=1e-3"), tmp_path)
    assert records[0]["search"]["tried"] == [[1e-4, None], [1e-3, 0.6], [1e-2, 0.5]]
    assert records[0]["identity"]["lr"] == 1e-3
    assert {t["identity"]["seed"] for t in Store(tmp_path).read("trials")[0]} == {1000, 1001}


def test_a_search_of_two_seeds_in_the_report(tiny, tmp_path):
    spec = searched(tiny, trials=3, seeds=2, further=1)
    runner.compare(spec, tmp_path)
    results = report.write(Store(tmp_path))
    trials, _ = Store(tmp_path).read("trials")
    for found in results.searches:
        for point in found.points:
            mine = [t["value"] for t in trials if (t["label"], t["identity"]["lr"]) == (found.label, point.rate)]
            assert len(mine) == 2
            assert point.value == pytest.approx(sum(mine) / 2)
    text = (tmp_path / "report.md").read_text()
    assert "judged on the validation split by 2 trainings;" in text
    assert read_spec(**tomllib.loads(text.split("```toml")[1].split("```")[0])).search == spec.search


def test_a_search_says_what_is_new_only_where_it_is_used():
    """Else a comparison of before could not be gone on with."""
    assert set(Search().to_json()) == {"kind", "trials", "factor", "metric", "seed"}
    assert Search(seeds=2, further=3).to_json().items() >= {"seeds": 2, "further": 3}.items()


def test_no_run_has_a_seed_of_the_search(tiny):
    with pytest.raises(ValueError, match="seed 1001 is the search's"):
        read_spec(**{**tiny, "seeds": [0, 1001], "search": {"seeds": 2}})
    for field, value in (("seeds", 0), ("further", -1), ("seeds", 1.5)):
        with pytest.raises(ValueError, match=f"search {field} {value} is not a whole number"):
            Search(**{field: value})


@pytest.mark.parametrize("bad", ["fails", "nan"])
def test_a_rate_that_fails_or_diverges_is_not_chosen(tiny, tmp_path, monkeypatch, bad):
    def worth(job):
        if job.entry.lr < 1e-3:
            return 0.5
        if bad == "fails":
            raise RuntimeError("out of memory")
        return float("nan")

    scripted(monkeypatch, worth)
    records = runner.compare(read_spec(**{**tiny, "search": {"factor": 10}}, methods="full:lr=1e-3"), tmp_path)
    assert records[0]["identity"]["lr"] == 1e-5  # two rates are equally good, the first is taken
    scripted(monkeypatch, lambda job: float("nan"))
    records = runner.compare(read_spec(**{**tiny, "search": {}}, methods="full:lr=1e-3"), tmp_path / "b")
    assert records[0]["identity"]["lr"] == 1e-3, "no trial has a value: the method's own rate"


def test_a_metric_that_is_a_loss_is_better_when_less(tiny, tmp_path):
    spec = searched(tiny, trials=3, factor=100, metric="loss")
    records = runner.compare(spec, tmp_path)
    trials, _ = Store(tmp_path).read("trials")
    for record in records:
        mine = [t for t in trials if t["label"] == record["label"]]
        assert {t["metric"] for t in mine} == {"loss"}
        assert record["identity"]["lr"] == min(mine, key=lambda t: t["value"])["identity"]["lr"]


def test_several_budgets_are_lines_of_one_comparison(tiny, tmp_path):
    spec = read_spec(**{**tiny, "budgets": [70, 140]}, methods="lora,svft:pattern=banded")
    records = runner.compare(spec, tmp_path)
    assert [(r["label"], r["identity"]["budget"], r["identity"]["seed"]) for r in records] == [
        (label, limit, seed) for seed in (0, 1) for limit in (70, 140) for label in ("LoRA", "SVFT banded")
    ]
    assert all(r["parameters"]["factors"] <= r["identity"]["budget"] for r in records)
    lora = {r["identity"]["budget"]: r["parameters"]["factors"] for r in records if r["label"] == "LoRA"}
    assert lora[140] > lora[70]


def test_a_budget_that_no_method_can_meet_is_refused_before_anything_is_trained(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *a: pytest.fail("trained"))
    spec = read_spec(**{**tiny, "budgets": [200, 3]}, methods="lora,pissa,full")
    with pytest.raises(ValueError, match=r"no method can meet the budget 3: LoRA.* has at least 66 values"):
        runner.compare(spec, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_two_comparisons_do_not_share_a_folder(tiny, tmp_path):
    runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path)
    more = read_spec(**{**tiny, "seeds": [0, 2]}, methods="lora:rank=2,full")  # an extension, not another comparison
    assert len(runner.compare(more, tmp_path)) == 4
    for change in ({"epochs": 2}, {"batch_size": 8}, {"search": {}}, {"methods": "lora:rank=2:lr=0.5"}):
        with pytest.raises(ValueError, match="--out"):
            runner.compare(read_spec(**{**tiny, "methods": "lora:rank=2", **change}), tmp_path)


def test_what_is_measured(tiny, tmp_path):
    (record, *_) = runner.compare(read_spec(**{**tiny, "snapshots": 2}, methods="sorsa:rank=2"), tmp_path)
    assert "error" not in record, record["traceback"]
    assert len(record["items"]["accuracy"]) == len(record["items"]["loss"]) == 40
    assert record["metric"]["value"] == pytest.approx(sum(record["items"]["accuracy"]) / 40)
    assert record["reload_error"] == 0.0
    assert record["merge_error"] < 1e-6
    assert 0 < record["distance"] < 1
    assert record["attach_seconds"] > 0
    assert record["attach_warm_seconds"] > 0
    assert record["throughput"]["unit"] == "images"
    assert record["throughput"]["per_second"] == pytest.approx(16 / record["step_seconds"])
    assert record["forgetting"] is None  # this model has no features that could drift
    spectra = record["spectra"]
    assert spectra["steps"][0] == 0
    assert spectra["steps"][-1] == 4
    assert len(spectra["delta_sigma"]) == len(spectra["steps"])
    assert len(spectra["delta_d"][0]) == len(spectra["sites"]) == record["sites"]
    assert max(spectra["delta_d"][-1]) > 0


@pytest.mark.filterwarnings("ignore:.*trains whole in torch.bfloat16")  # the head of a bfloat16 model
def test_the_error_of_merging_is_that_of_the_merged_model(tiny, tmp_path):
    """In bfloat16 the rounded weight shows in the output; nothing of it stays."""
    spec = read_spec(**{**tiny, "dtype": "bfloat16"}, methods="lora:rank=2")
    training = run.Training(Job(spec, spec.methods[0], None, 0))
    model = training.model
    adapter, _ = training.attached(model)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    for example in training.data.train:
        example["x"] = example["x"].bfloat16()
    adapted = measures.outputs(model, training.data)
    error = measures.merge_error(model, adapter, training.data)
    assert adapter.state == "attached"
    assert torch.equal(measures.outputs(model, training.data), adapted)
    adapter.merge()
    assert error == measures.gap(measures.outputs(model, training.data), adapted) > 0


def test_each_seed_draws_its_own_factors(tiny, tmp_path, monkeypatch):
    drawn, attach = [], run.Training.attached

    def remembered(self, model):
        adapter, seconds = attach(self, model)
        drawn.append((self.job.seed, adapter.sites["body"].factors.A.detach().clone()))
        return adapter, seconds

    monkeypatch.setattr(run.Training, "attached", remembered)
    runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path)
    for (seed, a), (other, b) in itertools.combinations(drawn, 2):
        assert torch.equal(a, b) == (seed == other)


def test_the_warm_start_reads_every_svd(tiny, tmp_path, monkeypatch):
    """Three times a method is attached: to train, to fill the cache, and from it."""
    found, really, attach = [], truncated.full_svd, run.Training.attached
    monkeypatch.setattr(truncated, "full_svd", lambda *args: found.append(args) or really(*args))
    counts = []

    def counted(self, model):
        before = len(found)
        result = attach(self, model)
        counts.append(len(found) - before)
        return result

    monkeypatch.setattr(run.Training, "attached", counted)
    (record,) = runner.compare(read_spec(**{**tiny, "seeds": [0]}, methods="pissa:rank=2"), tmp_path)
    assert "error" not in record
    assert counts == [2, 2, 0]


def test_a_worker_that_is_gone_is_a_failed_run_and_done_again(tiny, tmp_path, monkeypatch):
    spec = read_spec(**{**tiny, "seeds": [0]}, methods="lora:rank=2")
    with monkeypatch.context() as patch:
        gone = "WorkerDied: the worker was killed by SIGKILL (out of memory?) at try 2 of 2"
        patch.setattr(runner, "map_jobs", lambda work, jobs, **options: (Outcome(job, None, gone) for job in jobs))
        (record,) = runner.compare(spec, tmp_path)
    assert record["error"] == gone
    assert gone in report.markdown(report.write(Store(tmp_path)))
    assert "error" not in runner.compare(spec, tmp_path)[0]


def test_the_distance_is_that_of_the_weights_without_a_new_head():
    base, model = Net(), Net()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        model.body.weight += 0.1
        model.head.weight += 5
    squares = sum(p.detach().double().square().sum() for n, p in base.named_parameters() if not n.startswith("head."))
    assert measures.distance(model, base, ["head"]) == pytest.approx(float((0.01 * 240 / squares).sqrt()), rel=1e-5)
    assert measures.distance(copy.deepcopy(base), base) == 0


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made within the block; views are none."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(each.alias_info for each in func._schema.returns):
            made = [t.nbytes for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.bytes = max(self.bytes, *made, 0)
        return out


def test_large_weights_and_logits_are_measured_in_parts():
    """Of an embedding, or of the logits of a large vocabulary, a copy in float64 would be the peak of a comparison."""
    base = torch.nn.Embedding(2 * measures.PART // 64 + 1, 64)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.weight[-1] += 1
        expected = float((64 / base.weight.double().square().sum()).sqrt())
    with Largest() as weights:
        found = measures.distance(model, base)
    assert found == pytest.approx(expected, rel=1e-5)
    assert weights.bytes == 8 * measures.PART < base.weight.nbytes * 2
    y, reference = torch.randn(4, 9, 500), torch.randn(4, 9, 500)
    with Largest() as logits:
        found = measures.gap(y, reference)
    assert found == float((y - reference).abs().max() / reference.abs().max())
    assert logits.bytes == y[0].nbytes
    for wrong in (y.where(y < y.max(), float("nan")), -y / 0):
        assert not math.isfinite(measures.gap(wrong, reference))


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "head-only", "sorsa", "dora", "oft"])
def test_reload_and_merge_are_measured_for_methods_of_every_sort(tiny, tmp_path, method):
    record = runner.compare(read_spec(**{**tiny, "seeds": [3], "snapshots": 1}, methods=method), tmp_path)[0]
    assert "error" not in record, record["traceback"]
    assert record["reload_error"] == 0.0
    assert record["merge_error"] < 1e-5
    assert (record["distance"] > 0) == (method != "head-only")
    sites = record["spectra"]["sites"] if record["spectra"] else []
    assert sites == ([] if method in ("bitfit", "head-only") else ["body", "wide"]), "a new head drifts from nothing"


def test_a_file_that_does_not_come_back_the_same_is_noticed(tiny, tmp_path, monkeypatch):
    real = run.reload

    def off(model, path):
        adapter = real(model, path)
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.01

    monkeypatch.setattr(run, "reload", off)
    record = runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path)[0]
    assert record["reload_error"] > 1e-3


def test_forgetting_is_measured_on_a_real_model(tmp_path, monkeypatch):
    """The base is looked at once, whatever the number of runs: its new head alone differs between seeds."""
    looks, real = [], probes._features
    monkeypatch.setattr(probes, "_seen", [])
    monkeypatch.setattr(probes, "_features", lambda *args: looks.append(args) or real(*args))
    sizes = {"train_size": 32, "test_size": 32}
    spec = read_spec(
        model="efficientnet-lite0",
        methods="lora:lr=0.1",
        seeds=[0, 1],
        epochs=1,
        batch_size=8,
        search=False,
        task_options=sizes,
    )
    record, _ = runner.compare(spec, tmp_path)
    assert len(looks) == 1 + 2, "the base, and what became of it in each run"
    assert record["forgetting"]["name"] == "feature drift"
    assert record["forgetting"]["before"] == 0
    assert record["forgetting"]["after"] > 1e-3
    assert 4 * record["parameters"]["base"] < record["peak_memory_bytes"] < 2**30


def test_a_tracker_follows_the_training(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    spec = read_spec(**tiny, methods="lora:rank=2")
    runner.compare(spec, tmp_path, runner.Engine(tracker="tensorboard"))
    assert len({file.parent for file in tmp_path.glob("logs/**/events.out.tfevents.*")}) == 2, "a folder for each run"


@pytest.mark.parametrize(
    ("name", "message"), [("tensorbord", "did you mean 'tensorboard'"), ("comet_ml", "pip install")]
)
def test_a_tracker_that_is_not_there_is_refused_first(tiny, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path, runner.Engine(tracker=name))
    assert not list(tmp_path.iterdir())


MEASURED = ("items", "loss", "forgetting", "merge_error", "distance", "spectra", "parameters", "checkpoint_bytes")


def test_two_workers_give_the_records_of_one(tmp_path, monkeypatch):
    """Real processes: the model is loaded anew in each, and the results are those of a single process, to the last bit.

    That process has two threads, and each worker one: the specification says how many a run takes.
    """
    sizes = {"train_size": 32, "test_size": 32}
    spec = read_spec(
        model="efficientnet-lite0",
        methods="head-only,lora",
        seeds=[0],
        epochs=1,
        batch_size=8,
        search=False,
        task_options=sizes,
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(LIGHT), os.environ.get("PYTHONPATH", "")]))
    together = runner.compare(spec, tmp_path / "two", runner.Engine(workers=2))
    assert [r["label"] for r in together] == ["HeadOnly", "LoRA"]
    assert all("error" not in r for r in together)
    torch.set_num_threads(2)
    alone = runner.compare(spec, tmp_path / "one")
    assert torch.get_num_threads() == 2
    assert {r["machine"]["threads"] for r in together + alone} == {r["identity"]["threads"] for r in alone} == {1}
    for one, other in zip(alone, together, strict=True):
        assert {name: one[name] for name in MEASURED} == {name: other[name] for name in MEASURED}


def test_as_many_runs_at_once_as_the_processors_have_threads_for(tiny, tmp_path, monkeypatch):
    """Where the specification says what a run takes; a script's own call starts no process that it did not ask for."""
    one, engines = read_spec(model="efficientnet-lite0"), []
    assert one.threads == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert runner.at_once(one) == 2
    assert runner.at_once(replace(one, threads=4)) == 1
    assert runner.at_once(read_spec(**tiny, methods="lora")) is None, "the backend's own: one, or one per GPU"
    assert runner.at_once(one, "ray") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runner.at_once(one) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert runner.at_once(one) == runner.MOST, "memory has an end, too"

    def refuse(spec, out, engine):
        engines.append(engine)
        raise ValueError("enough")

    monkeypatch.setattr(runner, "compare", refuse)
    for words in ([], ["--workers", "3"]):
        CliRunner().invoke(app, ["compare", "--out", str(tmp_path), *words])
    assert [engine.workers for engine in engines] == [runner.MOST, 3]
    assert runner.Engine().workers is None


def test_the_threads_of_a_run_are_part_of_what_decides_its_result(tiny):
    def identity(**change):
        spec = read_spec(**tiny, **change, methods="lora:rank=2")
        return Job(spec, spec.methods[0], None, 0).identity()

    assert identity(threads=1) != identity(threads=2)
    assert "threads" not in identity(), "runs of before, which took what their process had, keep their names"


def test_each_run_is_told_when_it_has_ended(tiny, tmp_path, monkeypatch, capsys):
    """A newcomer sees numbers long before the table."""
    told, real = [], runner.run

    def watched(*args):
        told.append(capsys.readouterr().err)
        return real(*args)

    monkeypatch.setattr(runner, "run", watched)
    records = runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path)
    first, second = (
        f"LoRA rank=2, seed {i}: accuracy {100 * r['metric']['value']:.1f} %" for i, r in enumerate(records)
    )
    assert first in told[1], "before the second begins"
    assert second in capsys.readouterr().err


def test_the_comparison_file_is_the_specification(tiny, tmp_path):
    spec = read_spec(**tiny, methods="lora:rank=2,sorsa:gamma=0.5")
    runner.compare(spec, tmp_path)
    plain = Store(tmp_path).comparison()["spec"]
    assert plain["baseline"] is None, "nobody asked for one: the report takes the first LoRA of all methods"
    methods = [{**m["method"], "label": m["label"], "lr": m["lr"]} for m in plain.pop("methods")]
    again = read_spec(**{**plain, "search": plain["search"] or False}, methods=methods)
    assert again.to_json() == {**spec.to_json(), "targets": ["all-linear"]}  # as the model told


def test_a_job_is_named_for_people(tiny):
    spec = read_spec(**{**tiny, "budgets": ["1%", "2%"]}, methods="lora")
    assert str(Job(spec, spec.methods[0], "1%", 3)) == "LoRA at 1%, seed 3"
    assert str(Job(spec, spec.methods[0], "1%", 3, rung=0)).startswith("LoRA at 1%, rate ")


def test_the_command_line_passes_everything_on(tiny, tmp_path):
    call = "compare --model tiny --task signs --methods lora:rank=2,full --seeds 0,1 --trials 3 --search grid"
    call += f" --option train_size=32 --test-size 20 --baseline Full --confidence 0.9 --out {tmp_path}"
    call += " --targets body --targets wide"
    result = CliRunner().invoke(app, call.split())
    assert result.exit_code == 0, result.output
    spec = Store(tmp_path).comparison()["spec"]
    assert spec["search"]["trials"] == 3
    assert spec["task_options"] == {"train_size": 32, "test_size": 20}
    assert (spec["baseline"], spec["confidence"]) == ("Full", 0.9)
    assert spec["targets"] == ["body", "wide"]
    wrong = CliRunner().invoke(app, [*call.split(), "--backend", "rai"])
    assert wrong.exit_code == 2
    assert "did you mean 'ray'" in wrong.stderr


def test_head_only_is_trained_at_the_rate_that_is_tried(tiny, tmp_path):
    """It has no factors, whose rate the search would turn beside a fixed one of the head."""
    spec = read_spec(**{**tiny, "seeds": [0], "search": {"trials": 3}}, methods="head-only,lora:rank=2")
    runner.compare(spec, tmp_path)
    trials, _ = Store(tmp_path).read("trials")
    for label in ("HeadOnly", "LoRA rank=2"):
        assert len({t["loss"] for t in trials if t["label"] == label}) == 3


def test_a_method_without_factors_is_trained_once_whatever_the_budgets(tiny, tmp_path):
    records = runner.compare(read_spec(**{**tiny, "seeds": [0], "budgets": [70, 140]}, methods="full,lora"), tmp_path)
    assert [(r["label"], r["identity"]["budget"]) for r in records] == [("Full", None), ("LoRA", 70), ("LoRA", 140)]


def test_a_batch_that_is_larger_than_the_data_counts_what_it_holds(tiny, tmp_path):
    spec = read_spec(**{**tiny, "batch_size": 500, "epochs": 3}, methods="lora:rank=2")
    record = runner.compare(spec, tmp_path)[0]
    assert record["throughput"]["per_second"] == pytest.approx(64 / record["step_seconds"])


def test_steps_whose_spectra_were_measured_are_not_timed(tiny, tmp_path, monkeypatch):
    def slow(self, step):
        real(self, step)
        time.sleep(0.3)

    real = run.DriftTracker.record
    monkeypatch.setattr(run.DriftTracker, "record", slow)
    record = runner.compare(read_spec(**{**tiny, "epochs": 2, "snapshots": 4}, methods="lora:rank=2"), tmp_path)[0]
    assert len(record["spectra"]["steps"]) == 5  # of 8, with the start
    assert record["step_seconds"] < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "64 training examples in batches of 64 for 1 epochs are 1 step, whose learning rate is 0"),
        ({"search": {"kind": "halving"}}, "for 0.25 epochs are 1 step"),
        ({"targets": ["bodi"]}, "no method can adapt this model: .*'bodi'"),
        ({"model": "efficientnet-lite"}, "did you mean 'efficientnet-lite0'"),
        ({"probe": "nowhere"}, "nowhere is no folder with pictures"),
        ({"preserve": "nowhere", "methods": "sc-lora"}, "there is no folder 'nowhere'"),
        ({"preserve": "nowhere"}, r"preserve='nowhere': none of LoRA\(rank=8\) starts from data whose outputs"),
        ({"methods": "lora,sc-lora"}, "SCLoRA.* starts from data whose outputs are to stay, too: .*preserve=PATH"),
        ({"task": "images"}, "task 'images' needs data"),
    ],
)
def test_what_would_make_every_run_fail_is_refused_first(tiny, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(runner, "run", lambda *a: pytest.fail("trained"))
    if {"model", "probe", "preserve"} & change.keys():
        monkeypatch.setattr(session, "load", load)
        change = {"model": "efficientnet-lite0", **change}
    with pytest.raises(ValueError, match=message):
        runner.compare(read_spec(**{**tiny, "methods": "lora", **change}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (runner.Engine(backend="rai"), "did you mean 'ray'"),
        (runner.Engine(workers=0), "workers=0"),
        (runner.Engine(address="auto"), "needs backend='ray'"),
        (runner.Engine(workers=2), "this process's memory"),
    ],
)
def test_a_wrong_engine_is_refused_first(tiny, engine, message):
    with pytest.raises(ValueError, match=message):
        runner.compare(read_spec(**tiny, methods="lora"), "memory://nowhere", engine)
    assert Store("memory://nowhere").comparison() is None


def test_options_are_read_as_what_they_are():
    words = ["path=.", "a=e", "b=2024-01-01", "c=-3", "d=1e-3", "e=true", "f=[1, 2]", "g=inf-x"]
    expected = {"path": ".", "a": "e", "b": "2024-01-01", "c": -3, "d": 0.001, "e": True, "f": [1, 2], "g": "inf-x"}
    assert read_values(words) == expected


@pytest.mark.parametrize("call", ["--seeds 0,x", "--budget inf", "--no-search --trials 5", "--epochs -1"])
def test_mistakes_on_the_command_line_are_one_line(call, tmp_path):
    result = CliRunner().invoke(app, ["compare", *call.split(), "--out", str(tmp_path / "a")])
    assert result.exit_code == 2
    assert result.stderr.startswith("svdpeft: ")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("modality", ["vision", "language"])
def test_every_method_has_a_rate_around_which_it_is_searched(modality):
    for name in METHODS:
        if METHODS[name].__module__.startswith("svdpeft."):
            assert 0 < METHODS[name].learning_rates[modality] < 1, name


def test_a_method_of_a_plugin_has_its_own_rate_or_is_asked_for_one(monkeypatch):
    class Mine(LoRA):
        learning_rates: ClassVar[dict] = {"vision": 0.07}

    monkeypatch.setitem(METHODS._classes, "mine", Mine)
    assert read_spec(model="efficientnet-lite0", methods="mine").methods[0].lr == 0.07
    assert read_spec(model="efficientnet-lite0", methods="mine:lr=0.2").methods[0].lr == 0.2
    with pytest.raises(ValueError, match=r"'mine' says no learning rate for language models: write mine:lr=1e-3, or"):
        read_spec(model="smollm2-135m", methods="mine")


@pytest.mark.parametrize("model", ["efficientnet-lite0", "dinov2-vits14", "smollm2-135m"])
def test_the_methods_own_rate_is_the_middle_of_its_grid(model):
    defaults = tomllib.loads((Path(runner.__file__).parent / "defaults.toml").read_text())["lr"]
    spec = read_spec(model=model, methods="lora,pissa,dora,svft:pattern=banded,sorsa:gamma=0:label=mine")
    modality = "language" if model == "smollm2-135m" else "vision"
    rates = {name: METHODS[name].learning_rates[modality] for name in METHODS} | defaults[modality] | defaults[model]
    for entry, name in zip(spec.methods, ("lora", "pissa", "dora", "svft", "sorsa"), strict=True):
        grid = spec.search.rates(entry.lr)
        assert grid[len(grid) // 2] == pytest.approx(rates[name])
