"""The report: rows, what is shown and what is not, text, tables, pictures, and the files that are written."""

import csv
import io
import json
import math
import statistics

import pytest
from PIL import Image
from report_records import comparison, failed, store
from rich.console import Console
from typer.testing import CliRunner

from svdpeft.cli import app
from svdpeft.compare import report
from svdpeft.compare.reading import read_spec
from svdpeft.compare.records import newest
from svdpeft.compare.report.columns import spread_text
from svdpeft.compare.report.limits import limits, shown
from svdpeft.compare.report.page import page
from svdpeft.compare.report.payload import payload
from svdpeft.compare.report.pictures import side_by_side
from svdpeft.compare.report.specification import bibtex, toml

SMALL = {"count": 4, "items": 60, "steps": 20}


def results(change=None, **options):
    """The results of a small comparison, its parts changed by a function first."""
    parts = comparison(**{**SMALL, **options})
    if change:
        parts = change(*parts) or parts
    head, runs, trials = parts
    records, older = newest(runs)
    return report.Results(records, trials, head, older=older)


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


def test_of_two_seeds_both_values_stand_beside_the_mean():
    """Student's interval of 10 % and 20 % is 15.0 ± 63.5 %."""

    def change(head, runs, trials):
        for run, value in zip(runs_of(runs, "LoRA"), (0.2, 0.1, 0.0), strict=True):
            run["metric"]["value"] = value
        runs.remove(runs_of(runs, "LoRA")[2])

    found = results(change)
    row = next(row for row in found.rows if row.label == "LoRA")
    assert row.ends == (0.1, 0.2)
    assert spread_text(row, found) == "15.0 (10.0, 20.0)"
    for text in (report.markdown(found), page(found)):
        assert "15.0 (10.0, 20.0)" in text
        assert "of two seeds the mean, and both values in brackets" in text
    assert "two seeds" not in report.markdown(results())


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


def test_methods_without_factors_stand_once_beside_every_budget():
    found = results(budgets=["0.5%", "1%"], count=9)
    assert [(row.label, row.budget) for row in found.rows if row.label in ("Full", "HeadOnly")] == [
        ("Full", None),
        ("HeadOnly", None),
    ]
    assert found.budgets == ["0.5%", "1%"]
    for budget in found.budgets:  # they are in the family of each
        assert {d.label for d in found.differences[budget]} >= {"Full", "HeadOnly", "SORSA"}
        assert found.differences[budget][0].comparisons == 8
    assert found.name("Full", None) == "Full"
    assert found.name("Full", "1%") == "Full against 1%"
    full = next(row for row in found.rows if row.label == "Full")
    assert found.baseline_of(full) is None  # there are two
    data = payload(found)
    assert [row["budget"] for row in data["rows"] if row["label"] == "Full"] == [""]
    assert len({d["name"] for d in data["differences"]}) == len(data["differences"]) == 16
    assert not any("not there yet" in text for text in limits(found))
    assert "| Full | – |" in report.markdown(found)
    one = results(count=9)
    assert one.title.startswith("dinov2-vits14 on mnist5k, budget 0.5%, 3 seeds")
    assert one.baseline_of(next(row for row in one.rows if row.label == "Full")).label == "LoRA"


@pytest.mark.parametrize("budgets", [[None], [None, "1%"]])
def test_methods_as_they_are_given_are_a_budget_of_their_own(budgets):
    found = results(budgets=budgets, count=9)
    assert found.budgets == budgets
    assert [len(found.differences[budget]) for budget in budgets] == [8] * len(budgets)
    assert any("as they have no factors" in text for text in limits(found)) == (len(budgets) > 1)


def test_the_baseline_is_what_was_asked_for_else_the_first_lora_else_the_first():
    def asked(label):
        return lambda head, runs, trials: head["spec"].update(baseline=label)

    def without_lora(head, runs, trials):
        head["spec"]["methods"] = [entry for entry in head["spec"]["methods"] if entry["label"] != "LoRA"]

    assert results().spec["baseline"] is None
    assert results().baseline == "LoRA"
    assert results(asked("PiSSA")).baseline == "PiSSA"
    assert results(without_lora).baseline == "SORSA"
    assert {d.baseline for d in results(asked("PiSSA")).differences["0.5%"]} == {"PiSSA"}


# -- searches ---------------------------------------------------------------------------------------------------------


def _of(trials, label):
    return [trial for trial in trials if trial["label"] == label]


def _search_failed(head, runs, trials):
    for trial in _of(trials, "LoRA"):
        del trial["value"], trial["metric"]
        trial["error"] = "RuntimeError: out of\nmemory"


def _search_undefined(head, runs, trials):
    for trial in _of(trials, "LoRA"):
        del trial["value"], trial["metric"]
        trial["undefined"] = "no attention here"


def _search_diverged(head, runs, trials):
    for trial in _of(trials, "LoRA"):
        trial["value"] = None


def _halved(head, runs, trials):
    head["spec"]["search"]["kind"] = "halving"
    for trial, share in zip(_of(trials, "LoRA"), (0.25, 0.25, 0.5, 1.0, 1.0), strict=True):
        trial["rung"] = {0.25: 0, 0.5: 1, 1.0: 2}[share]
        trial["identity"]["epochs"] = share * 1.0


@pytest.mark.parametrize(
    ("change", "reason", "cell"),
    [
        (_search_failed, "RuntimeError: out of memory", "failed"),
        (_search_diverged, "no trial gave a number", "not a number"),
    ],
)
def test_a_search_without_a_value_chose_nothing(change, reason, cell):
    found = results(change)
    search = next(s for s in found.searches if s.label == "LoRA")
    assert search.chosen is None
    assert search.edge == ""
    assert f"The search of LoRA failed ({reason}); its own rate was used." in limits(found)
    assert f"| LoRA | – |  | {cell} |" in report.markdown(found)
    assert next(s for s in payload(found)["searches"] if s["label"] == "LoRA")["chosen"] is None


def test_a_method_that_is_not_defined_did_not_fail():
    found = results(_search_undefined)
    assert "| LoRA | – |  | not defined |" in report.markdown(found)
    assert not any("search of LoRA failed" in text for text in limits(found))


def test_a_rate_that_stopped_early_is_marked():
    plain, found = results(), results(_halved)
    for write in (report.markdown, report.page):
        assert "(25 %), " in write(found)
        assert "share of the epochs" in write(found)
        assert "share of the epochs" not in write(plain)
    (search,) = (s for s in payload(found)["searches"] if s["label"] == "LoRA")
    assert [point["share"] for point in search["points"]] == [0.25, 0.25, 0.5, 1, 1]


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
        ("Not held to the budget, as they have no factors: Full, HeadOnly", {"count": 9}),
        ("On a CPU, allocators make peak memory differ by a few percent", {}),
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
    assert len(texts) == 3, texts  # how a rate was judged, how memory is measured, and that one task is one task
    assert texts[0].startswith("A learning rate was judged")
    assert texts[1].startswith("On a CPU, allocators")
    assert texts[2].startswith("One model on one task")


def test_the_best_mean_the_tests_and_the_front_are_what_is_shown():
    found = results()
    best, tested, front = shown(found)
    row = found.rows[0]
    assert best.startswith(f"{row.label} has the highest mean accuracy, {100 * row.mean:.1f} ±")
    assert "; LoRA (the baseline) has " in best
    assert "LoRA" in tested
    least = min(found.rows, key=lambda row: row.trainable)
    assert f"these: {least.label}, " in front


def test_equal_methods_are_called_equal():
    def tie(head, runs, trials):
        for seed in range(3):
            best, base = runs_of(runs, "SVFT topk")[seed], runs_of(runs, "LoRA")[seed]
            base["metric"], base["items"] = best["metric"], best["items"]

    found = results(tie)
    mean = f"{100 * found.rows[0].mean:.1f} %"
    assert shown(found)[0] == f"The highest mean accuracy, {mean}, is shared by LoRA (the baseline), SVFT topk."
    for text in (report.markdown(found), report.page(found)):
        assert "SVFT topk and LoRA cannot be told apart: the runs agree on every item." in text
        assert "equal on every item" in text
        assert "0.0 to 0.0" not in text
    assert [d["low"] for d in payload(found)["differences"] if d["label"] == "SVFT topk"] == [None]


def test_every_method_has_its_place_among_all_in_the_text_and_on_the_page():
    found = results()
    (placed,) = found.standings.values()
    assert {each.label for each in placed} == {row.label for row in found.rows}
    text, page = report.markdown(found), report.page(found)
    for each in placed:
        ranks = f"{each.best} to {each.worst}" if each.best < each.worst else str(each.best)
        low, high = (f"{100 * value:.1f}".replace("-", "−") for value in (each.low, each.high))
        assert f"| {each.label} | {ranks} | " in text
        assert f" | {low} to {high} |" in text
        assert f"<td>{ranks}</td>" in page
        assert f"<td>{low} to {high}</td>" in page
    (tested,) = found.differences.values()
    for d in tested:
        assert f" | {100 * d.within:.1f} | {d.seeds} | " in text


def test_comparisons_side_by_side_are_a_column_each_light_or_dark():
    def unmeasured(head, runs, trials):
        for run in runs:
            run["forgetting"] = None

    def image(comparisons, dark=False):
        return Image.open(io.BytesIO(side_by_side(comparisons, dark))).convert("L")

    one, two = image([results()]), image([results(), results(unmeasured)])
    assert two.width > 1.6 * one.width
    assert two.height == one.height
    assert one.getpixel((1, 1)) == 255
    assert image([results()], dark=True).getpixel((1, 1)) < 40
    assert side_by_side([results()]) == side_by_side([results()])


def test_sentences_and_tables_have_one_rule_for_percent():
    def large(head, runs, trials):
        for run in runs:
            run["metric"] = {"name": "bleu", "value": 100 * run["metric"]["value"]}
            run["items"] = {"bleu": [100 * value for value in run["items"]["accuracy"]]}

    found = results(large)
    assert not found.percent
    text = report.markdown(found)
    mean = next(d.mean for d in found.differences["0.5%"] if d.label == "SORSA")
    assert f"| SORSA | {mean:.3f} |" in text
    assert f"by {mean:.3g} bleu" in text or f"came out {mean:.3g} bleu" in text
    assert " points" not in text


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


def test_no_cell_of_the_csv_is_a_formula():
    """Labels and errors are texts of users; a number may begin with a minus."""
    found = results(_one_fails)
    (failed,) = [record for record in found.records if "error" in record]
    run = found.records[-1]
    for text in ('=HYPERLINK("http://x")', "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1"):
        failed["error"], run["label"], run["metric"]["value"] = text, text, -0.5
        lines = list(csv.DictReader(io.StringIO(report.table_csv(found), newline="")))
        assert len(lines) == 12
        told = "'" + text.replace("\r", " ")
        assert (lines[0]["error"], lines[-1]["label"]) == (told, told)
        assert lines[-1]["value"] == "-0.5"


@pytest.mark.parametrize("trials", [True, False])
@pytest.mark.parametrize("budgets", [["0.5%", 9000], ["none", 9000], ["none"]], ids=str)
def test_the_specification_reads_back_as_it_was(trials, budgets, tmp_path):
    options = {"model": "efficientnet-lite0", "seeds": [3, 4], "budgets": budgets}
    methods = [
        "lora",
        {"name": "dora", "inner": {"name": "sorsa", "gamma": 0.0}, "label": 'a "b" \\ γ'},
    ]
    rank = {"rank": {r"features\.0": 8, ".*": 4}} if budgets == ["none"] else {}  # else the budget decides it
    methods.append({"name": "sorsa", "lr": 3e-5, **rank})
    spec = read_spec(methods=methods, search={"trials": 3} if trials else False, **options)
    found = report.Results([], (), {"spec": json.loads(json.dumps(spec.to_json()))})
    file = tmp_path / "specification.toml"
    file.write_text(toml(found))
    assert "null" not in file.read_text()
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


def test_another_metric_ranks_and_tests(tmp_path):
    """Every metric of the test split has a column, and may take the place of the task's own."""
    head, runs, trials = comparison(**SMALL)
    found = store(tmp_path, (head, runs, trials))
    by_loss = report.write(found, "loss")
    groups = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(statistics.fmean(run["items"]["loss"]))
    means = {label: statistics.fmean(values) for label, values in groups.items()}
    assert [row.mean for row in by_loss.rows] == pytest.approx(sorted(means.values()))
    assert all(row.mean == pytest.approx(means[row.label]) for row in by_loss.rows)
    text = (tmp_path / "report.md").read_text()
    assert "the lowest mean loss" in text
    assert "| accuracy |" in text
    own = report.read(found)
    assert own.metric == "accuracy"
    assert own.rows[0].mean_of("loss") == pytest.approx(means[own.rows[0].label])
    assert own.rows[0].mean_of("bleu") is None
    assert "| test loss |" in report.markdown(own)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--metric", "los"])
    assert done.exit_code == 2
    assert "no run was judged by 'los': did you mean 'loss'?" in " ".join(done.stderr.split())
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--metric", "loss"]).exit_code == 0
    assert (tmp_path / "report.md").read_text() == text
