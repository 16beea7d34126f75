"""Comparisons: specification, budget, runner, store, report, command line. A tiny model and task, no download."""

import csv
import json

import pytest
import torch
from comparison import REAL, Net
from PIL import Image
from typer.testing import CliRunner

import svdpeft
from svdpeft.cli import app
from svdpeft.compare import budget, report, run, runner
from svdpeft.compare.reading import read_spec
from svdpeft.compare.store import Store
from svdpeft.finetuning import session
from svdpeft.models import load
from svdpeft.training.recipe import Recipe

COMMAND = "compare --model tiny --task signs --seeds 0 --no-search"


def test_a_comparison_runs_reports_and_is_not_run_again(tiny, tmp_path, monkeypatch):
    spec = read_spec(**tiny, methods="head-only,full,lora:rank=2,sorsa:rank=2,svft:pattern=banded")
    records = runner.compare(spec, tmp_path)
    assert len(records) == 10
    assert not [r["error"] for r in records if "error" in r]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 10
    record = records[2]
    assert record["parameters"] == {
        "base": 12 * 20 + 20 + 20 * 14 + 14 + 30,
        "factors": 132,
        "trainable": 162,
    }
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["git"]) == {"revision", "dirty"}
    assert len(record["loss"]) == 4
    assert record["merge_error"] < 1e-6
    assert record["checkpoint_bytes"] > 162 * 4
    assert record["step_seconds"] > 0
    assert record["peak_memory_bytes"] >= 0

    monkeypatch.setattr(runner, "run", lambda *a, **k: pytest.fail("a finished run was run again"))
    assert runner.compare(spec, tmp_path) == records


def test_a_record_that_lacks_something_is_made_again(tiny, tmp_path):
    spec = read_spec(**tiny, methods="lora:rank=2")
    first = runner.compare(spec, tmp_path)
    file = sorted((tmp_path / "runs").iterdir())[0]
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "items"}))
    assert [damage.reason for damage in report.read(Store(tmp_path)).damaged] == ["has no items"]
    again = runner.compare(spec, tmp_path)
    assert [record["items"] for record in again] == [record["items"] for record in first]


def test_runs_are_reproducible_and_seeds_differ(tiny, tmp_path):
    spec = read_spec(**tiny, methods="sorsa:rank=2")
    first = runner.compare(spec, tmp_path / "a")
    again = runner.compare(spec, tmp_path / "b")
    assert [r["loss"] for r in first] == [r["loss"] for r in again]
    assert first[0]["loss"] != first[1]["loss"]


def test_a_failing_run_is_recorded_and_the_others_go_on(tiny, tmp_path):
    spec = read_spec(**{**tiny, "seeds": [0]}, methods="lora,svft:pattern=banded,pissa", budgets=[40])
    records = runner.compare(spec, tmp_path)
    errors = {r["label"]: r.get("error") for r in records}
    assert "over the budget of 40" in errors["LoRA"]  # rank 1 has 32 + 34 values
    assert "over the budget of 40" in errors["PiSSA"]
    assert errors["SVFT banded"] is None
    report.write(Store(tmp_path))
    assert "over the budget" in (tmp_path / "report.md").read_text()

    runner.compare(spec, tmp_path)
    assert len(Store(tmp_path).read("runs")[0]) == 3  # a failed run is tried again, in its own place


def test_an_interrupt_loses_only_the_run_under_way(tiny, tmp_path, monkeypatch):
    real, calls = runner.run, []

    def interrupted(job, *rest):
        calls.append(job.entry.label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(job, *rest)

    monkeypatch.setattr(runner, "run", interrupted)
    arguments = [*COMMAND.split(), "--methods", "lora:rank=2,full", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert [r["label"] for r in Store(tmp_path).read("runs")[0]] == ["LoRA rank=2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls == ["LoRA rank=2", "Full", "Full"]


def test_every_method_gets_the_most_that_a_budget_allows(tiny):
    model, methods = (
        Net(),
        [
            svdpeft.LoRA(),
            svdpeft.PiSSA(),
            svdpeft.SORSA(),
            svdpeft.SVFT(),
            svdpeft.SVFT(pattern="banded"),
            svdpeft.SVFT(pattern="random"),
            svdpeft.SVFT(pattern="topk"),
            svdpeft.DoRA(),
            svdpeft.DoRA({"name": "svft", "pattern": "banded"}),
            svdpeft.OFT(),
            svdpeft.BOFT(),
            svdpeft.BOFT(butterflies=2),
            svdpeft.FLoRA(),
        ],
    )
    for limit in (70, 100, 200, 400):
        for method in methods:
            sites = budget.sites_of(model, method, ["body", "wide"], [])
            values = list(method.knob_values(sites))
            if method.turned(values[0]).total(sites) > limit:
                assert isinstance(method, svdpeft.DoRA)  # one magnitude per output beside the least of its inner one
                continue
            fitted = budget.fit(method, limit, sites)
            adapter = svdpeft.attach(model, fitted, ["body", "wide"], clip_rank=True)
            assert adapter.trainable_count == fitted.total(sites) <= limit
            adapter.detach()
            larger = values[values.index(getattr(getattr(fitted, "inner", fitted), fitted.knob)) + 1 :]
            more = [method.turned(value).total(sites) for value in larger]
            assert not more or min(more) > limit, "a larger knob would have been within the budget"


def test_a_budget_is_read_as_share_or_count():
    assert budget.parse("0.5%", 200_000) == 1000
    assert budget.parse("12,000", 5) == 12_000
    for wrong in ("much", "0%", -3):
        with pytest.raises(ValueError, match="budget"):
            budget.parse(wrong, 100)


def test_a_cpu_sees_pictures_in_the_format_that_its_convolutions_are_fast_in():
    """And the weights of the base are what they were."""
    training = run.Training(run.Job(spec := read_spec(model="efficientnet-lite0"), spec.methods[0], None, 0))
    convolutions = [m for m in training.model.modules() if isinstance(m, torch.nn.Conv2d)]
    if not torch.cuda.is_available():
        assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    plain = load(spec.model, num_classes=10, image_size=spec.image_size).model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in training.model.state_dict().items())


def test_a_method_within_a_method_is_written_as_a_name_or_a_table(tmp_path):
    file = tmp_path / "spec.toml"
    file.write_text('methods = ["dora:inner=pissa", { name = "dora", inner = { name = "sorsa", rank = 3 } }]')
    methods = [entry.method for entry in read_spec(file).methods]
    assert methods == [svdpeft.DoRA(svdpeft.PiSSA()), svdpeft.DoRA(svdpeft.SORSA(rank=3))]


def test_a_specification_file(tmp_path):
    file = tmp_path / "spec.toml"
    file.write_text(
        """
        model = "efficientnet-lite0"
        seeds = [4]
        budgets = ["none"]
        methods = ["lora:rank=2", { name = "sorsa", label = "free", gamma = 0.0, lr = 0.5 }]
        """
    )
    spec = read_spec(file, epochs=3)
    assert spec.task == "mnist5k"
    assert spec.seeds == (4,)
    assert spec.epochs == 3
    assert [entry.label for entry in spec.methods] == ["LoRA rank=2", "free"]
    assert spec.methods[0].method == svdpeft.LoRA(rank=2)
    assert spec.methods[1].method == svdpeft.SORSA(gamma=0.0)
    assert spec.methods[1].lr == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "sorza"}, "did you mean 'sorsa'"),
        ({"methods": "sorsa:gama=1"}, "did you mean 'gamma'"),
        ({"methods": "svft:pattern=bended"}, "is not one of plain"),
        ({"methods": "lora:8"}, "name:key=value"),
        ({"methods": "lora,lora"}, "give one of them another label"),
        ({"methods": []}, "at least one of methods"),
        ({"seeds": []}, "at least one of seeds"),
        ({"task": "mnist"}, "did you mean 'mnist5k'"),
        ({"epoch": 1}, "did you mean 'epochs'"),
        ({"budget": "1%"}, "did you mean 'budgets'"),
        ({"search": {"trails": 5}}, "did you mean 'trials'"),
        ({"search": {"trials": 4}}, "trials 4 is not odd"),
        ({"search": "girdle"}, "'girdle' is not one of grid, halving"),
        ({"search": {"seed": 1}, "seeds": [0, 1]}, "seed 1 is the search's"),
        ({"task_options": {"train_sise": 5}}, "did you mean 'train_size'"),
        ({"baseline": "LORA", "methods": "lora"}, "no method is labelled 'LORA', the baseline: did you mean 'LoRA'"),
        ({"confidence": 0.95, "seeds": [3]}, "one seed gives no confidence interval"),
        ({"confidence": 95}, "confidence 95 is outside"),
        ({"seeds": [0, 0]}, "seeds names 0 twice"),
        ({"methods": "lora:lr=0"}, "learning rate of 'LoRA', 0 is not a number above 0"),
        ({"dtype": "float12"}, "is not one of float32"),
        ({"methods": "lora:rank=4"}, "asks for rank=4, which the budget 1.5% decides"),
        ({"methods": "sorsa:rank=4"}, "'SORSA rank=4' asks for rank=4, which the budget 1.5% decides"),  # its default
        ({"methods": [{"name": "lora", "rank": 8}]}, "asks for rank=8, which the budget 1.5% decides"),
        ({"methods": "lora:label=8"}, "the label 8 of lora is not a word"),
        ({"methods": "lora:lr=inf"}, "rate of 'LoRA', inf is not a number above 0"),
        ({"methods": [1]}, "the method 1 is neither"),
        ({"methods": [{"label": "x"}]}, "has no name="),
        ({"search": 5}, "search = 5 is neither a table"),
        ({"search": {"factor": "3"}}, "search factor '3' is not a number above 1"),
        (
            {"search": {"metric": "acuracy"}},
            "no metric 'acuracy', the search's, on its validation split: did you mean 'accuracy'",
        ),
        ({"task_options": [1]}, "is not a table"),
        ({"epochs": "two"}, "epochs 'two' is not a number"),
        ({"epochs": 0}, "epochs 0 is not a number above 0"),
        ({"epochs": 10**400}, "00 is not a number above 0"),
        ({"warmup": 10**400}, "00 is not a finite number of at least 0"),
        ({"batch_size": 0}, "batch_size 0 is not a whole number of at least 1"),
        ({"snapshots": -1}, "snapshots -1 is not a whole number of at least 0"),
        ({"seeds": 3}, r"seeds = 3 is not a list: write \[3\]"),
        ({"seeds": ["3-5"]}, "a seed '3-5' is not a whole number"),
        ({"targets": []}, "targets is empty"),
        ({"targets": [3]}, "targets, a pattern: 3 is not a text"),
        ({"budgets": [1e5]}, "a budget that is no share such as '0.5%', 100000.0 is not a whole number"),
        ({"budgets": [True]}, "a budget that is no share such as '0.5%', True is not a whole number"),
        ({"image_size": 64.5}, "image_size 64.5 is not a whole number of at least 1"),
        ({"model": 3}, "model 3 is not a text"),
        ({"task": 3}, "task 3 is not a text"),
        ({"methods": 5}, "methods = 5 is not a list"),
        (
            {"model": "smollm2-135m", "task": "humaneval", "search": {"metric": "accuracy"}},
            "no metric 'accuracy', the search's, on its validation split: Known: loss",
        ),
    ],
)
def test_a_wrong_specification_names_the_near_miss(options, message):
    with pytest.raises(ValueError, match=message):
        read_spec(**{"model": "efficientnet-lite0", **options})


def test_what_changes_a_result_changes_the_identity(tiny):
    spec = read_spec(**tiny, methods="lora")
    entry = spec.methods[0]
    first = run.Job(spec, entry, None, 0).identity()
    assert run.Job(spec, entry, None, 0).identity() == first
    others = [
        run.Job(spec, entry, None, 1).identity(),
        run.Job(spec, entry, 100, 0).identity(),
        run.Job(spec, entry, None, 0, rung=0).identity(),
        run.Job(spec, entry, None, 0, share=0.5).identity(),
        *(
            run.Job(read_spec(**{**tiny, **change}, methods="lora"), entry, None, 0).identity()
            for change in ({"epochs": 2}, {"exclude": ["wide"]}, {"targets": ["body"]}, {"dtype": "bfloat16"})
        ),
        run.Job(read_spec(**tiny, methods="lora", task_options={"train_size": 8}), entry, None, 0).identity(),
        run.Job(spec, read_spec(**tiny, methods="lora:alpha=2").methods[0], None, 0).identity(),
        run.Job(spec, read_spec(**tiny, methods="lora:lr=0.7").methods[0], None, 0).identity(),
    ]
    assert all(other != first for other in others)


FURTHER = {
    "accumulate": (2, "gradient_accumulation_steps"),
    "scheduler": ("linear", "lr_scheduler_type"),
    "warmup": (0.25, "warmup_steps"),
    "weight_decay": (0.125, "weight_decay"),
    "clip": (0.5, "max_grad_norm"),
    "mixed_precision": ("bf16", "bf16"),
}


def test_how_it_trains_reaches_the_trainer(tiny, tmp_path, monkeypatch):
    seen = []

    class Looking(session.Trainer):
        def train(self, *args, **kwargs):
            seen.append(self.args)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(session, "Trainer", Looking)
    words = [word for name, (value, _) in FURTHER.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [*COMMAND.split(), "--methods", "lora:rank=2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *words])
    assert result.exit_code == 0, result.output
    assert seen
    for name, (value, argument) in FURTHER.items():
        expected = True if name == "mixed_precision" else value
        assert {getattr(args, argument) for args in seen} == {expected}, name


@pytest.mark.parametrize("name", FURTHER)
def test_what_an_older_comparison_could_not_say_leaves_its_names(tiny, name):
    default = Recipe.__dataclass_fields__[name].default
    entry = read_spec(**tiny, methods="lora").methods[0]
    plain, said, other = (
        run.Job(read_spec(**tiny, **more, methods="lora"), entry, None, 0).identity()
        for more in ({}, {} if default is None else {name: default}, {name: FURTHER[name][0]})
    )
    assert said == plain
    assert name not in plain
    assert other == {**plain, name: FURTHER[name][0]}
    store = Store("anywhere")
    assert store.name("LoRA", said) == store.name("LoRA", plain) != store.name("LoRA", other)


def test_the_table_has_mean_deviation_and_interval(tiny, tmp_path):
    runner.compare(read_spec(**tiny, methods="lora:rank=2"), tmp_path)
    store = Store(tmp_path)
    for file, value in zip(sorted((tmp_path / "runs").iterdir()), (0.8, 0.9), strict=True):
        record = store.load("runs", file.stem)
        store.write("runs", file.stem, {**record, "metric": {**record["metric"], "value": value}})
    results = report.read(store)
    (row,) = results.rows
    assert row.mean == pytest.approx(0.85)
    assert row.std == pytest.approx(0.0707106781)
    assert row.interval.high - row.mean == pytest.approx(12.7062047 * 0.05)  # t of one degree of freedom · std / √2
    assert "| LoRA rank=2 | 85.0 (80.0, 90.0) |" in report.markdown(results)


def test_the_command_line_from_start_to_report(tiny, tmp_path):
    arguments = [*COMMAND.split(), "--methods", "head-only,lora:rank=2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--train-size", "32"])
    assert result.exit_code == 0, result.output
    assert "tiny on signs" in result.output
    assert "HeadOnly" in result.output
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [line["label"] for line in lines] == ["HeadOnly", "LoRA rank=2"]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b"), "--json"]).stdout)
    again = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert again.exit_code == 0
    assert "LoRA rank=2" in again.output


def test_the_command_line_ends_with_an_error_where_no_run_has_a_result(tiny, tmp_path, monkeypatch):
    def breaks(job, *rest):
        raise RuntimeError("no")

    monkeypatch.setattr(runner, "run", breaks)
    result = CliRunner().invoke(app, [*COMMAND.split(), "--methods", "full,head-only", "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output


def test_the_command_line_says_what_is_wrong(tmp_path):
    result = CliRunner().invoke(app, ["compare", "--methods", "sorza", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "did you mean 'sorsa'" in result.stderr
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert "is not a comparison" in result.stderr


def test_methods_lists_and_explains():
    names = [row["name"] for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)]
    assert sorted(names) == sorted(svdpeft.methods())
    assert "‖LᵀL − I‖_F" in CliRunner().invoke(app, ["methods", "sorsa"]).output
    assert "did you mean 'sorsa'" in CliRunner().invoke(app, ["methods", "sorza"]).stderr


def test_a_method_that_is_not_defined_on_a_model_is_no_failure(tmp_path):
    """CLOVER works on attention, which a CNN has none of: said in the record and in the report, and not run again."""
    records = runner.compare(read_spec(**REAL, methods="clover,head-only"), tmp_path)
    assert "no projection of an attention" in records[0]["undefined"]
    assert "error" not in records[0]
    report.write(Store(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "## Not defined on this model" in text
    assert "## Failed" not in text
    assert [row.label for row in report.read(Store(tmp_path)).rows] == ["HeadOnly"]


@pytest.mark.parametrize("name", ["eva", "lora-ga", "sc-lora"])
def test_a_method_that_starts_from_data_is_shown_training_batches(name, tmp_path):
    more = {}
    if name == "sc-lora":
        for i in range(4):
            for of in "ab":
                (tmp_path / "kept" / of).mkdir(exist_ok=True, parents=True)
                Image.new("RGB", (40, 40), (60 * i, 99, ord(of))).save(tmp_path / "kept" / of / f"{i}.png")
        more = {"preserve": str(tmp_path / "kept")}
    (record,) = runner.compare(read_spec(**REAL, **more, methods=name), tmp_path / "out")
    assert "error" not in record, record.get("error")
    assert 0 < record["parameters"]["factors"] <= 0.015 * record["parameters"]["base"]


def test_the_defaults_of_a_model_are_of_its_default_task(tmp_path):
    """dinov2-vits14 takes 1,000 digits to train on: of another task, with five pictures of a class, there are fewer."""
    assert read_spec(model="dinov2-vits14").task_options == {"train_size": 1000, "test_size": 1000}
    for task, options in (("images", {"data": str(tmp_path), "shots": 5}), ("flowers102", {"shots": 5})):
        spec = read_spec(model="dinov2-vits14", task=task, task_options=options)
        assert spec.task_options == options
        assert spec.make_task().train_size is None
        assert spec.image_size == 56, "what is no option of the task stays"
    spec = read_spec(model="dinov2-vits14", task="mnist5k", task_options={"train_size": 50})
    assert spec.task_options == {"train_size": 50, "test_size": 1000}


def test_an_adapter_of_which_a_kill_left_one_file_is_written_again(tiny, tmp_path):
    """Kept afterwards, of a run whose record is there: its folder was taken for the adapter."""
    spec = read_spec(**{**tiny, "seeds": [0]}, methods="lora")
    runner.compare(spec, tmp_path, runner.Engine(keep="all"))
    (folder,) = (tmp_path / "adapters").iterdir()
    first, last = sorted(folder.iterdir())
    whole = last.read_bytes()
    assert first.name == "adapter.json"
    last.unlink()
    runner.compare(spec, tmp_path, runner.Engine(keep="all"))
    assert last.read_bytes() == whole


@pytest.mark.parametrize("keep", ["all", "best"])
def test_adapters_are_kept(tiny, tmp_path, keep):
    """Those of a run that was done before without keeping them, too; they give the model that was judged."""
    spec = read_spec(**tiny, methods="lora:rank=2,pissa:rank=2")
    runner.compare(spec, tmp_path)
    assert not (tmp_path / "adapters").exists()
    before = {file.name: json.loads(file.read_text())["metric"] for file in (tmp_path / "runs").iterdir()}
    for _ in range(2):
        runner.compare(spec, tmp_path, runner.Engine(keep=keep))
        found = sorted(folder.name for folder in (tmp_path / "adapters").iterdir())
        assert len(found) == (4 if keep == "all" else 2)
    assert {file.name: json.loads(file.read_text())["metric"] for file in (tmp_path / "runs").iterdir()} == before
    if keep == "best":
        for label in ("lora", "pissa"):
            mine = {name: metric["value"] for name, metric in before.items() if name.startswith(label)}
            (kept,) = [name for name in found if name.startswith(label)]
            assert mine[f"{kept}.json"] == max(mine.values())
    name = found[0]
    record = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
    (job,) = [
        job
        for entry in spec.methods
        for seed in spec.seeds
        if (job := run.Job(runner.check(spec), entry, None, seed)).identity() == record["identity"]
    ]
    training = run.Training(job)
    svdpeft.load(training.model, tmp_path / "adapters" / name)
    items = training.data.evaluate(training.model, training.data.test)
    assert items["accuracy"] == record["items"]["accuracy"]
