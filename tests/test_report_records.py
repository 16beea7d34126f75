"""What the report reads: which records count, and which files are damaged, each named."""

import copy
import json

import pytest
from report_records import comparison, failed, store
from test_report import SMALL, results, runs_of
from typer.testing import CliRunner

from svdpeft.cli import app
from svdpeft.compare import report
from svdpeft.compare.report.limits import limits

# -- newer and older runs ---------------------------------------------------------------------------------------------


def test_of_two_runs_with_one_seed_the_newer_counts():
    def change(head, runs, trials):
        again = copy.deepcopy(runs_of(runs, "LoRA")[0])
        again["metric"]["value"], again["date"] = 0.123, "2027-01-01T00:00:00+00:00"
        runs.insert(0, again)

    found = results(change)
    row = next(row for row in found.rows if row.label == "LoRA")
    assert row.seeds == (0, 1, 2)
    assert row.values[0] == 0.123
    assert "1 older run of LoRA, done again, is left out." in limits(found)


def test_of_two_runs_of_one_moment_the_one_with_a_result_counts():
    def change(head, runs, trials):
        runs.append(failed(copy.deepcopy(runs_of(runs, "LoRA")[0])))

    row = next(row for row in results(change).rows if row.label == "LoRA")
    assert row.seeds == (0, 1, 2)


def test_a_row_has_one_learning_rate_that_of_the_newest_run():
    """A trial failed, was tried again when the comparison went on, and won."""

    def change(head, runs, trials):
        old = copy.deepcopy(runs_of(runs, "LoRA"))
        old[2] = failed(old[2])
        for run in old:
            run["identity"]["lr"] = 3e-4
        del runs[runs.index(runs_of(runs, "LoRA")[-1])]  # the last seed has not been run at the new rate yet
        for run in runs_of(runs, "LoRA"):
            run["date"] = "2026-12-01T00:00:00+00:00"
        runs += old

    found = results(change)
    row = next(row for row in found.rows if row.label == "LoRA")
    assert row.seeds == (0, 1)
    assert {run["identity"]["lr"] for run in row.runs} == {1e-2}
    texts = limits(found)
    assert "3 older runs of LoRA at another learning rate (0.0003) are left out." in texts
    assert "1 of 12 runs are not there yet." in texts
    assert not any("failed" in text for text in texts)  # the old failure is not told as one of these runs
    assert len(report.table_csv(found).splitlines()) == 1 + 11


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_and_left_out(tmp_path):
    found = store(tmp_path, comparison(**SMALL))
    broken, *_ = (tmp_path / "runs").glob("lora-seed0-*.json")
    broken.write_text(broken.read_text()[:100])
    other, *_ = (tmp_path / "runs").glob("pissa-seed1-*.json")
    old = json.loads(other.read_text())
    del old["reload_error"]
    other.write_text(json.dumps(old))
    read = report.write(found)
    assert {(row.label, len(row.runs)) for row in read.rows} == {
        ("SORSA", 3),
        ("SVFT topk", 3),
        ("PiSSA", 2),
        ("LoRA", 2),
    }
    for text in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert f"runs/{broken.name}: no valid JSON" in text
        assert f"runs/{other.name}: has no reload_error" in text
        assert "2 damaged files are left out" in text
        assert str(tmp_path) not in text


def _put(place, value):
    """A change of one field of a record, named by its path; ``...`` deletes it."""

    def change(record):
        *path, last = place.split(".")
        for part in path:
            record = record[part]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return change


@pytest.mark.parametrize(
    ("kind", "place", "value", "reason"),
    [
        ("runs", "metric", None, "metric is null, not an object"),
        ("runs", "metric.value", "0.9", 'metric.value is "0.9", not a number'),
        ("runs", "metric.name", "f1", "has no items.f1"),
        ("runs", "items", {}, "has no items.accuracy"),
        ("runs", "items.accuracy", [1, True], "items.accuracy[1] is true, not a number"),
        ("runs", "parameters", {}, "has no parameters.base"),
        ("runs", "parameters.trainable", 1.5, "parameters.trainable is 1.5, not a whole number"),
        ("runs", "loss", None, "loss is null, not a list"),
        ("runs", "loss", [[1]], "loss[0] has 1 values, not 2"),
        ("runs", "loss", [[None, 1.0]], "loss[0][0] is null, not a number"),
        ("runs", "versions", None, "versions is null, not an object"),
        ("runs", "versions", {"torch": 2}, "versions.torch is 2, not text"),
        ("runs", "git", {}, "has no git.revision"),
        ("runs", "machine", {}, "has no machine.device"),
        ("runs", "date", 5, "date is 5, not text"),
        ("runs", "forgetting", {"name": "loss"}, "has no forgetting.before"),
        ("runs", "forgetting", ..., "has no forgetting"),
        ("runs", "spectra", {"steps": [1], "sites": ["a"]}, "has no spectra.delta_sigma"),
        ("runs", "spectra.delta_d", [[0.1]], "spectra.delta_d is not a table of 11 steps and 12 sites"),
        ("runs", "throughput", 3, "throughput is 3, not an object"),
        ("runs", "label", 7, "label is 7, not text"),
        ("runs", "identity.seed", "0", 'identity.seed is "0", not a whole number'),
        ("runs", "identity.lr", None, "identity.lr is null, not a number"),
        ("runs", "identity.lr", 0, "identity.lr is 0, not above 0"),
        ("runs", "identity.method", "lora", 'identity.method is "lora", not an object'),
        ("runs", "identity.budget", "much", "budget 'much' is neither"),
        ("runs", "identity.budget", 0.5, "identity.budget is 0.5, not text or a whole number"),
        ("runs", "identity.task.train_size", "1k", 'identity.task.train_size is "1k", not'),
        ("runs", "error", ["x"], 'error is ["x"], not text'),
        ("trials", "identity.lr", None, "identity.lr is null, not a number"),
        ("trials", "value", "x", 'value is "x", not a number'),
        ("trials", "value", ..., "has no value"),
        ("trials", "rung", ..., "has no rung"),
    ],
)
def test_a_record_with_a_wrong_inside_is_left_out_and_its_file_named(kind, place, value, reason, tmp_path):
    found = store(tmp_path, comparison(count=2, items=8, steps=3))
    file = sorted((tmp_path / kind).iterdir())[0]
    wrong = json.loads(file.read_text())
    _put(place, value)(wrong)
    file.write_text(json.dumps(wrong))
    read = report.read(found)
    assert [damage.path for damage in read.damaged] == [f"{kind}/{file.name}"]
    assert read.damaged[0].reason.startswith(reason), read.damaged
    assert f"{kind}/{file.name}: {reason}".replace("|", "\\|") in report.markdown(read)
    assert report.page(read)
    assert report.table_csv(read)


def test_what_may_be_null_is_no_damage(tmp_path):
    """What was not finite is null in JSON, and a part that does not apply is."""
    head, runs, trials = comparison(**SMALL)
    for place in ("attach_seconds", "attach_warm_seconds", "step_seconds", "merge_error", "distance", "spectra", "git"):
        _put(place, None)(runs[0])
    for place in ("metric.value", "throughput.per_second", "forgetting.after"):
        _put(place, None)(runs[0])
    runs[0]["loss"][0][1] = runs[0]["items"]["accuracy"][0] = trials[0]["value"] = None
    read = report.write(store(tmp_path, (head, runs, trials)))
    assert read.damaged == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "no valid JSON"),
        ("{}", "has no 'spec'"),
        ('{"spec": {}}', "has no spec.methods"),
        ('{"spec": {"methods": [{"label": "A"}]}}', "has no spec.methods[0].method"),
        ('{"spec": {"methods": [], "seeds": [], "budgets": [], "confidence": 95}}', "spec.confidence is 95"),
        ('{"spec": {"methods": [], "seeds": [], "budgets": [], "search": 3}}', "spec.search is 3, not an object"),
    ],
)
def test_a_damaged_comparison_is_named_and_the_runs_are_reported(text, reason, tmp_path):
    found = store(tmp_path, comparison(**SMALL))
    rows = len(report.read(found).rows)
    (tmp_path / "comparison.json").write_text(text)
    read = report.write(found)
    assert [file.path for file in read.damaged] == ["comparison.json"]
    assert read.damaged[0].reason.startswith(reason)
    assert len(read.rows) == rows
    assert "1 damaged file is left out." in (tmp_path / "report.md").read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0
    assert "damaged: comparison.json: " in done.output


def test_runs_with_different_metrics_are_no_comparison(tmp_path):
    head, runs, trials = comparison(**SMALL)
    runs[0]["metric"]["name"] = "loss"
    with pytest.raises(ValueError, match="different metrics: accuracy, loss"):
        report.read(store(tmp_path, (head, runs, trials)))
