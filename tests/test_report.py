"""The report: rows, what is shown and what is not, text, tables, pictures, and the files that are written."""

import copy
import csv
import io
import json
import math
import statistics

import pytest
from report_records import comparison, failed, store
from rich.console import Console
from typer.testing import CliRunner

from svdpeft.cli import app
from svdpeft.compare import report
from svdpeft.compare.report.limits import limits, shown
from svdpeft.compare.report.payload import payload
from svdpeft.compare.report.specification import bibtex, toml
from svdpeft.compare.spec import read_spec

SMALL = {"count": 4, "items": 60, "steps": 20}


def results(change=None, **options):
    """The results of a small comparison, its parts changed by a function first."""
    parts = comparison(**{**SMALL, **options})
    if change:
        parts = change(*parts) or parts
    head, runs, trials = parts
    return report.Results(runs, trials, head)


def runs_of(runs, label):
    return [run for run in runs if run["label"] == label]


# -- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_has_the_mean_the_deviation_and_the_interval_over_its_seeds():
    def change(head, runs, trials):
        for run, value in zip(runs_of(runs, "LoRA"), (0.8, 0.9, 0.85), strict=True):
            run["metric"]["value"] = value
            run["attach_seconds"] = 10 * value
            run["peak_memory_bytes"] = int(1e9 * value)

    row = next(row for row in results(change).rows if row.label == "LoRA")
    half = 4.302652729911275 * 0.05 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert row.mean == pytest.approx(0.85)
    assert row.std == pytest.approx(0.05)
    assert (row.interval.low, row.interval.high) == pytest.approx((0.85 - half, 0.85 + half))
    assert row.median("attach_seconds") == pytest.approx(8.5)  # times: the median; memory: the most
    assert row.largest("peak_memory_bytes") == int(0.9e9)


def test_rows_are_ranked_by_what_the_metric_means():
    better = [row.mean for row in results().rows]
    assert better == sorted(better, reverse=True)

    def as_loss(head, runs, trials):
        for run in runs:
            run["metric"] = {"name": "loss", "value": statistics.fmean(run["items"]["loss"])}
        runs_of(runs, "SORSA")[0]["metric"]["value"] = None  # JSON has no NaN

    found = results(as_loss)
    values = [row.mean for row in found.rows[:-1]]
    assert values == sorted(values)
    assert found.rows[-1].label == "SORSA"
    assert math.isnan(found.rows[-1].mean)
    assert not found.percent
    assert any("not a number for SORSA" in text for text in limits(found))
    assert "NaN" not in json.dumps(payload(found), allow_nan=False)
    assert "| SORSA | – |" in report.markdown(found)


def test_each_budget_has_its_own_rows_and_tests():
    found = results(budgets=["0.5%", "1%"])
    assert {(row.label, row.budget) for row in found.rows} >= {("SORSA", "0.5%"), ("SORSA", "1%")}
    assert len(found.rows) == 8
    assert [len(found.differences[budget]) for budget in ("0.5%", "1%")] == [3, 3]
    assert found.name("SORSA", "1%") == "SORSA at 1%"
    assert "budgets 0.5%, 1%" in found.title
    assert [text[:21] for text in shown(found)[1:3]] == ["At a budget of 0.5%: ", "At a budget of 1%: Wi"]


def test_of_two_runs_with_one_seed_the_newer_counts():
    def change(head, runs, trials):
        again = copy.deepcopy(runs_of(runs, "LoRA")[0])
        again["metric"]["value"], again["date"] = 0.123, "2027-01-01T00:00:00+00:00"
        runs.insert(0, again)

    row = next(row for row in results(change).rows if row.label == "LoRA")
    assert row.seeds == (0, 1, 2)
    assert row.values[0] == 0.123


# -- what is not shown, said only where it is so ----------------------------------------------------------------------


def _one_fails(head, runs, trials):
    runs[0] = failed(runs[0])


def _one_is_undefined(head, runs, trials):
    runs[:3] = [{k: v for k, v in failed(run).items() if k not in ("error", "traceback")} for run in runs[:3]]
    for run in runs[:3]:
        run["undefined"] = "no attention here"


def _at_the_edge(head, runs, trials):
    for run in runs_of(runs, "PiSSA"):
        run["identity"]["lr"] = 1e-4


def _another_machine(head, runs, trials):
    runs[-1]["machine"] = {**runs[-1]["machine"], "device": "NVIDIA H200"}


def _another_version(head, runs, trials):
    runs[-1]["versions"] = {**runs[-1]["versions"], "torch": "2.14.0"}


def _dirty(head, runs, trials):
    runs[-1]["git"] = {**runs[-1]["git"], "dirty": True}


def _one_is_missing(head, runs, trials):
    del runs[-1]


def _no_baseline(head, runs, trials):
    runs[:] = [failed(run) if run["label"] == "LoRA" else run for run in runs]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("There is one seed", {"seeds": 1}),
        ("3 seeds are few: an interval is 4.3 standard errors long", {}),
        ("Fewer seeds than the others: SORSA (2 of 3)", {"change": _one_fails}),
        ("1 run failed and is left out: SORSA", {"change": _one_fails}),
        ("3 runs are not defined on this model and are left out: SORSA", {"change": _one_is_undefined}),
        ("Learning rates were not searched", {"trials": False}),
        ("The best rate lies at the edge of its grid", {"change": _at_the_edge}),
        ("PiSSA (lowest, 0.0001)", {"change": _at_the_edge}),
        ("LoRA (72 %)", {}),
        ("Not held to the budget, as they train parameters of the base: Full, HeadOnly", {"count": 9}),
        ("The runs come from 2 machines", {"change": _another_machine}),
        ("more than one version", {"change": _another_version}),
        ("1 run of 12 was made from sources with uncommitted changes", {"change": _dirty}),
        ("1 of 12 runs are not there yet", {"change": _one_is_missing}),
        ("the baseline LoRA has no finished run", {"change": _no_baseline}),
        ("One model on one task (1,000 training examples, 1 epoch)", {}),
    ],
)
def test_what_the_results_do_not_show_is_said(words, options):
    found = results(**options)
    assert any(words in text for text in limits(found)), limits(found)
    assert words in report.markdown(found)
    assert words in report.page(found).replace("&#x27;", "'")


def test_nothing_is_held_against_a_clean_comparison():
    def settled(head, runs, trials):
        for run in runs:
            run["identity"]["lr"] = 1e-3  # in the middle of the grid
            run["parameters"] = {**run["parameters"], "factors": 100_000}

    texts = limits(results(settled, seeds=6))
    assert len(texts) == 2, texts  # how a rate was judged, and that one task is one task
    assert texts[0].startswith("A learning rate was judged")
    assert texts[1].startswith("One model on one task")


def test_the_best_mean_the_tests_and_the_front_are_what_is_shown():
    found = results()
    best, tested, front = shown(found)
    row = found.rows[0]
    assert best.startswith(f"{row.label} has the highest mean accuracy, {100 * row.mean:.1f} ±")
    assert "; LoRA, the baseline, has " in best
    assert "LoRA" in tested
    least = min(found.rows, key=lambda row: row.trainable)
    assert f"these: {least.label}, " in front


# -- text, CSV, TOML, BibTeX ------------------------------------------------------------------------------------------


def test_the_text_has_intervals_deviations_and_every_row():
    found = results()
    text = report.markdown(found)
    for row in found.rows:
        half = 100 * (row.interval.high - row.mean)
        assert f"| {row.label} | {100 * row.mean:.1f} ± {half:.1f} | {100 * row.std:.1f} | 3 |" in text
    for heading in ("What the results show", "What they do not show", "Table", "Differences from LoRA", "To cite"):
        assert f"\n## {heading}\n" in text
    assert "seeds that would settle it" in text
    assert "\n## Failed" not in text


def test_the_terminal_has_eighty_columns_and_the_conclusion():
    found = results(_one_fails, count=9)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.terminal(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for row in found.rows:
        assert f"{row.trainable:,}" in text
    assert "highest mean accuracy" in text
    assert "failed: SORSA, seed 0: RuntimeError: out of memory" in text.replace("\n", " ")


def test_the_csv_has_every_run_with_its_numbers():
    found = results(_one_fails)
    lines = list(csv.DictReader(report.table_csv(found).splitlines()))
    assert len(lines) == 12
    assert lines[0]["error"] == "RuntimeError: out of memory"
    assert lines[0]["value"] == ""
    for line, run in zip(lines[1:], found.records[1:], strict=True):
        assert (line["label"], int(line["seed"])) == (run["label"], run["identity"]["seed"])
        assert float(line["value"]) == run["metric"]["value"]
        assert float(line["throughput"]) == run["throughput"]["per_second"]
        assert int(line["trainable"]) == run["parameters"]["trainable"]
        assert float(line["forgetting_after"]) == run["forgetting"]["after"]


@pytest.mark.parametrize("trials", [True, False])
def test_the_specification_reads_back_as_it_was(trials, tmp_path):
    options = {"model": "efficientnet-lite0", "seeds": [3, 4], "budgets": ["0.5%", 9000], "confidence": 0.9}
    methods = [
        "lora:rank=2",
        {"name": "dora", "inner": {"name": "sorsa", "rank": 3, "gamma": 0.0}, "label": 'a "b" \\ γ'},
    ]
    methods.append({"name": "sorsa", "rank": {r"features\.0": 8, ".*": 4}, "lr": 3e-5})
    spec = read_spec(methods=methods, search={"trials": 3} if trials else False, **options)
    found = report.Results([], (), {"spec": json.loads(json.dumps(spec.to_json()))})
    file = tmp_path / "specification.toml"
    file.write_text(toml(found))
    assert read_spec(file).to_json() == spec.to_json()


def test_bibtex_has_every_method_also_the_inner_ones_and_skips_unknown_ones():
    def change(head, runs, trials):
        runs[-1]["identity"] = {**runs[-1]["identity"], "method": {"name": "made at home"}}

    entries = bibtex(results(change, count=9))
    for key in ("cao2024sorsa", "meng2024pissa", "hu2022lora", "liu2024dora", "lingam2024svft"):
        assert entries.count(f"{{{key},") == 1


# -- the store --------------------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes_in_whatever_order_they_came(tmp_path):
    head, runs, trials = comparison(**SMALL)
    report.write(store(tmp_path / "a", (head, runs, trials)))
    report.write(store(tmp_path / "b", (head, runs[::-1], trials[::-1])))
    names = ["report.html", "report.md", "report.png", "loss.png", "results.csv"]
    assert sorted(p.name for p in (tmp_path / "a").glob("[!.]*.*")) == sorted([*names, "comparison.json"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_store_at_any_address():
    head, runs, trials = comparison(**SMALL)
    there = store("memory://report-test", (head, runs, trials))
    report.write(there)
    assert there._files.cat_file("/report-test/report.html").startswith(b"<!doctype html>")


def test_damaged_files_are_named_and_left_out(tmp_path):
    found = store(tmp_path, comparison(**SMALL))
    broken, *_ = (tmp_path / "runs").glob("lora-seed0-*.json")
    broken.write_text(broken.read_text()[:100])
    other, *_ = (tmp_path / "runs").glob("pissa-seed1-*.json")
    old = json.loads(other.read_text())
    del old["reload_error"]
    other.write_text(json.dumps(old))
    (tmp_path / "comparison.json").write_text("[")
    read = report.write(found)
    assert {(row.label, len(row.runs)) for row in read.rows} == {
        ("SORSA", 3),
        ("SVFT topk", 3),
        ("PiSSA", 2),
        ("LoRA", 2),
    }
    for text in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert f"runs/{broken.name}: no valid JSON" in text
        assert "PiSSA, seed 1: has no " in text
        assert "reload_error" in text
        assert "comparison.json: no valid JSON" in text
        assert "3 damaged files are left out" in text
        assert "no baseline is named" in text
        assert str(tmp_path) not in text


def test_the_command_writes_everything_and_says_what_is_wrong(tmp_path):
    store(tmp_path / "there", comparison(**SMALL))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "there")])
    assert done.exit_code == 0, done.output
    assert "SVFT topk" in done.output
    assert (tmp_path / "there" / "report.html").exists()
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert wrong.exit_code == 2
    assert "is not a comparison" in wrong.stderr
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "there" / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "there" / "runs").mkdir()
    (tmp_path / "there" / "runs" / "x.json").write_text("{")
    assert "runs/x.json: no valid JSON" in CliRunner().invoke(app, ["report", str(tmp_path / "there")]).stderr


@pytest.mark.parametrize(
    "options",
    [
        {"change": lambda head, runs, trials: (head, [failed(run) for run in runs], [])},
        {"change": lambda head, runs, trials: (None, runs, [])},
        {"change": lambda head, runs, trials: (head, runs[:1], [])},
        {"seeds": 1, "trials": False, "spectra": False, "budgets": [None]},
        {"change": lambda head, runs, trials: (head, runs, [failed(trial) | {"rung": 0} for trial in trials])},
    ],
    ids=["all failed", "no comparison.json", "one run", "nothing optional", "all trials failed"],
)
def test_missing_parts_are_no_obstacle(options):
    found = results(**options)
    assert report.markdown(found).startswith("# dinov2-vits14 on mnist5k")
    assert report.page(found).startswith("<!doctype html>")
    assert report.table_csv(found).count("\n") == len(found.records) + 1
    if found.rows:
        assert report.picture(found)[:4] == report.curves(found)[:4] == b"\x89PNG"


def test_labels_are_no_mathematics_in_the_pictures():
    report.picture(results(labels={"LoRA": "costs $5 {and} \\frac"}))
