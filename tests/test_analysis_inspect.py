"""A look at a model, the command, and the pictures with their numbers."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import adapt, assert_same, host, merge, perturb, snapshot
from rows import every_kind
from torch import nn
from typer.testing import CliRunner

import svdpeft
from svdpeft import models
from svdpeft.analysis import (
    COLUMNS,
    DriftTracker,
    inspect,
    plot_course,
    plot_drift,
    plot_energy,
    plot_spectrum,
)
from svdpeft.analysis.plots import COURSES
from svdpeft.cli import app


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width // 2)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def get_classifier(self):
        return self.head


def net():
    torch.manual_seed(0)
    return Net()


# -- inspect ------------------------------------------------------------------------------------------------------


def test_a_model_as_plain_svds_see_it():
    model = net()
    found = inspect(model, energy=0.8)
    assert [row["site"] for row in found.table] == [
        f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "v_proj", "conv")
    ]
    row = found.table[1]
    s = np.linalg.svd(model.layers[0].v_proj.weight.detach().double().numpy(), compute_uv=False)
    p, shares = s / s.sum(), (s**2).cumsum() / (s**2).sum()
    assert (row["matrices"], row["m"], row["n"]) == (1, 8, 16)
    assert row["sigma_max"] == pytest.approx(s[0], rel=1e-5)
    assert row["condition"] == pytest.approx(s[0] / s[-1], rel=1e-4)
    assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
    assert row["energy_rank"] == 1 + (shares < 0.8).sum()
    conv = model.layers[0].conv.weight.detach().double().reshape(2, 3, -1).numpy()  # two groups
    s = np.linalg.svd(conv, compute_uv=False)
    row = found.table[2]
    assert (row["matrices"], row["m"], row["n"]) == (2, 3, 18)
    assert row["condition"] == pytest.approx((s[:, 0] / s[:, -1]).max(), rel=1e-4)
    assert row["stable_rank"] == pytest.approx(((s**2).sum(-1) / s[:, 0] ** 2).mean(), rel=1e-5)
    np.testing.assert_allclose(found.spectra["layers.0.conv"], s, rtol=1e-4)


def test_targets_are_those_of_attach():
    model = net()
    assert [row["site"] for row in inspect(model, "q_proj|head").table] == [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "head",
    ]
    assert len(inspect(model, ["all-linear"]).table) == 4
    with pytest.raises(ValueError, match=r"targets='q_porj'.*q_proj"):
        inspect(model, "q_porj")


def test_what_matches_nothing_names_what_there_is():
    with pytest.raises(ValueError, match=r"of the model \(Known: all, all-linear, conv, head, q_proj, v_proj\)$"):
        inspect(net(), "zzz")
    with pytest.raises(ValueError, match=r"\(did you mean 'q_proj'\? Known: all, "):
        inspect(net(), "q_porj")
    with pytest.raises(ValueError, match=r"\(Known: all, all-linear, weight\)$"):
        inspect(nn.Linear(3, 3), "zzz")  # a model that is one layer has no name


def test_weights_without_a_model():
    state = net().state_dict()
    found = inspect(state, "q_proj")
    assert [row["site"] for row in found.table] == ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]
    assert [row["sigma_max"] for row in found.table] == [row["sigma_max"] for row in inspect(net(), "q_proj").table]
    batch = inspect({"experts": torch.randn(3, 5, 4), "bias": torch.ones(4), "index": torch.ones(2, 2).int()})
    assert [(row["site"], row["matrices"]) for row in batch.table] == [("experts", 3)]


@every_kind
def test_every_kind_is_inspected_and_left_alone(kind):
    model, _ = host(kind)
    adapter = adapt(model, svdpeft.PiSSA(rank=2))
    sites = list(adapter.sites)
    perturb(adapter)
    before = snapshot(model)
    found = inspect(adapter)
    assert_same(before, snapshot(model))
    assert [row["site"] for row in found.table] == sites
    tracker = DriftTracker(adapter)
    tracker.record(0)
    for row, tracked in zip(found.table, tracker.table, strict=True):
        assert {column for column in COLUMNS if row[column] is None} == {c for c in COLUMNS if tracked[c] is None}
        for column in (column for column in COLUMNS if row[column] is not None):
            assert row[column] == pytest.approx(tracked[column], rel=1e-5, abs=1e-7), column
    merge(adapter)
    merged = {row["site"]: row for row in inspect(model, model.targets).table}
    for row in found.table:
        plain = merged[row["site"]]
        for column in ("sigma_max", "effective_rank", "stable_rank", "energy_rank"):
            assert row[column] == pytest.approx(plain[column], rel=1e-6), column


def test_weights_that_train_whole_are_compared_with_the_base_too():
    model = net()
    adapter = svdpeft.attach(model, svdpeft.Full(), "all")
    with torch.no_grad():
        model.layers[0].q_proj.weight *= 1.5
    rows = {row["site"]: row for row in inspect(adapter, "q_proj").table}
    assert rows["layers.0.q_proj"]["distance"] == pytest.approx(0.5)
    assert rows["layers.0.q_proj"]["delta_d"] == pytest.approx(0, abs=1e-6)
    assert rows["layers.1.q_proj"]["distance"] == 0


def test_zeros_and_nan():
    row = inspect({"w": torch.zeros(3, 4)}).table[0]
    assert (row["condition"], row["energy_rank"], row["effective_rank"]) == (None, 0, 0)
    with pytest.raises(ValueError, match=r"w \(2x2\) holds 4 NaN"):
        inspect({"w": torch.full((2, 2), torch.nan)})
    with pytest.raises(ValueError, match="energy 90"):
        inspect({"w": torch.ones(2, 2)}, energy=90)


# -- pictures -----------------------------------------------------------------------------------------------------


def table(steps=(0, 5, 10), seed=0):
    adapter = svdpeft.attach(net(), svdpeft.SORSA(rank=2), ["q_proj", "v_proj"])
    tracker = DriftTracker(adapter)
    for step in steps:
        tracker.record(step)
        perturb(adapter, 0.1, seed + step)
    return tracker


def numbers(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_picture_of_a_drift_and_its_numbers(tmp_path):
    tracker = table()
    plot_drift(tracker.table, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    rows = numbers(tmp_path / "drift.csv")
    assert list(rows[0]) == ["run", "site", "step", "delta_sigma", "delta_d", "delta_d_assigned"]
    for row, tracked in zip(rows, tracker.table, strict=True):
        assert (row["site"], int(row["step"])) == (tracked["site"], tracked["step"])
        assert float(row["delta_d"]) == tracked["delta_d"]


def test_several_runs_in_one_picture_and_records_as_they_are_kept(tmp_path):
    runs = {"SORSA": table().table, "other": table(seed=5).to_json(["delta_sigma", "delta_d", "delta_d_assigned"])}
    plot_drift(runs, tmp_path / "drift.svg")
    text = (tmp_path / "drift.svg").read_text()
    assert text.startswith("<?xml")
    assert {row["run"] for row in numbers(tmp_path / "drift.csv")} == {"SORSA", "other"}
    with pytest.raises(KeyError, match="condition_principal"):
        plot_course(runs, tmp_path / "condition.png")


def test_the_lines_of_a_drift_start_at_zero_and_the_thick_one_is_the_mean(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: (drawn.append(figure), save(figure, *args)))
    tracker = table()
    plot_drift(tracker.table, tmp_path / "drift.png")
    for axes, column in zip(drawn[0].axes, ("delta_d", "delta_d_assigned"), strict=True):
        assert len(axes.lines) == 6  # two types of layer, two layers and a mean each
        for line in axes.lines:
            assert line.get_xydata()[0].tolist() == [0, 0]
            assert len(line.get_xydata()) == 4
        for kind in ("q_proj", "v_proj"):
            (mean,) = [line for line in axes.lines if line.get_label() == kind]
            last = [row for row in tracker.table if row["step"] == 10 and row["site"].endswith(kind)]
            expected = [np.mean([row[key] for row in last]) for key in ("delta_sigma", column)]
            assert mean.get_xydata()[-1].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_has_a_picture_of_its_own(column, tmp_path):
    plot_course(table().table, tmp_path / "c.svg", column)
    assert column in numbers(tmp_path / "c.csv")[0]
    assert set(COURSES) == set(COLUMNS)
    assert len(set(COURSES.values())) == len(COLUMNS)


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no column is called 'intruder': did you mean 'intruders'"):
        plot_course(table().table, tmp_path / "c.png", "intruder")
    assert not list(tmp_path.iterdir())


def test_the_picture_of_a_condition_number(tmp_path):
    plot_course(table().table, tmp_path / "c.png")
    plot_course(table().table, tmp_path / "f.png", "condition_factors")
    assert list(numbers(tmp_path / "c.csv")[0]) == ["run", "site", "step", "condition_principal"]
    assert float(numbers(tmp_path / "f.csv")[-1]["condition_factors"]) > 1


def test_the_pictures_of_spectra(tmp_path):
    found = inspect(net())
    plot_energy(found, tmp_path / "energy.png")
    plot_spectrum(found, tmp_path / "spectrum.pdf")
    rows = [row for row in numbers(tmp_path / "energy.csv") if row["site"] == "layers.0.v_proj"]
    assert [int(row["rank"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["energy"]) == 1
    first = next(row for row in rows if float(row["energy"]) >= 0.9)
    assert int(first["rank"]) == found.table[1]["energy_rank"]
    sigma = [float(row["sigma"]) for row in numbers(tmp_path / "spectrum.csv") if row["site"] == "layers.0.v_proj"]
    np.testing.assert_allclose(sigma, found.spectra["layers.0.v_proj"][0], rtol=1e-5)
    plot_spectrum({"zeros": torch.zeros(4), "one": torch.ones(1)}, tmp_path / "odd.png")


def test_a_picture_leaves_no_global_state(tmp_path):
    code = "import sys; from svdpeft.analysis import plot_drift, inspect; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    plot_energy({"a": torch.tensor([2.0, 1.0])}, tmp_path / "e.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(("name", "rows", "words"), [("a.csv", True, "a picture is"), ("a.png", False, "no rows")])
def test_a_picture_of_nothing(tmp_path, name, rows, words):
    with pytest.raises(ValueError, match=words):
        plot_drift(table((0,)).table if rows else [], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The command loads this model in the place of a pretrained one; real ones are loaded in test_models."""
    model = net()
    monkeypatch.setattr(models, "load", lambda name, **options: models.Loaded(model, name, None, "vision", "head"))
    return model


def call(*arguments):
    return CliRunner().invoke(app, ["inspect", "tiny", *map(str, arguments)])


def test_the_command_prints_a_table(loads):
    result = call("--energy", 0.8)
    assert result.exit_code == 0, result.output
    assert "layers.0.q_proj" in result.stdout.replace("\n", "")
    assert "80% energy" in result.stdout
    assert "99.9% energy" in call("--energy", 0.999).stdout


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--picture", "x.jpg", "a picture is a .png, .svg or .pdf file"),
        ("--picture", "nodir/x.png", "there is no folder"),
        ("--csv", "nodir/x.csv", "there is no folder"),
        ("--csv", "", "is a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path, option, file, words):
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("work before the check"))
    result = call(option, tmp_path / file)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


def test_a_picture_does_not_write_over_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("work before the check"))
    result = call("--csv", tmp_path / "a.csv", "--picture", tmp_path / "a.png")
    assert result.exit_code == 2, result.output
    assert "give --csv another name" in " ".join(result.output.split())


def doubled(module):
    if isinstance(module, torch.nn.Linear):
        module.weight.data.mul_(2)


def test_an_adapter_of_another_dtype_is_pointed_to_the_option(monkeypatch, tmp_path):
    monkeypatch.setattr(
        models, "load", lambda name, dtype, **options: models.Loaded(net().to(dtype), name, None, "vision", "head")
    )
    adapter = svdpeft.attach(net().bfloat16(), svdpeft.SORSA(rank=2), ["q_proj"])
    adapter.save(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"was made for a base in torch\.bfloat16"):
        assert call("--adapter", tmp_path / "adapter").exit_code == 0
    other = svdpeft.attach(net().bfloat16().apply(doubled), svdpeft.SORSA(rank=2), ["q_proj"])
    other.save(tmp_path / "other")
    result = call("--adapter", tmp_path / "other")
    assert result.exit_code == 2
    assert result.output.startswith("svdpeft: give --dtype bfloat16,")
    result = call("--adapter", tmp_path / "adapter", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == inspect(adapter).table


@pytest.mark.parametrize("head", [nn.Identity(), nn.Linear(16, 7)], ids=["no head", "another head"])
def test_an_adapter_with_a_head_is_pointed_to_the_option(monkeypatch, tmp_path, head):
    def load(name, num_classes, **options):
        model = net()
        if num_classes is None:
            model.head = head
        return models.Loaded(model, name, None, "vision", "head")

    monkeypatch.setattr(models, "load", load)
    svdpeft.attach(net(), svdpeft.SORSA(rank=2), ["q_proj"], train=["head"]).save(tmp_path / "adapter")
    result = call("--adapter", tmp_path / "adapter")
    assert result.exit_code == 2
    assert result.output.startswith("svdpeft: give --num-classes")
    assert "Known" not in result.output
    assert call("--adapter", tmp_path / "adapter", "--num-classes", 3).exit_code == 0


def test_the_command_for_machines(loads, tmp_path):
    result = call("--targets", "q_proj", "--json", "--csv", tmp_path / "a.csv", "--picture", tmp_path / "a-energy.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "tiny"
    assert [row["site"] for row in found["sites"]] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert found["sites"] == inspect(loads, "q_proj").table
    assert [row["site"] for row in numbers(tmp_path / "a.csv")] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert (tmp_path / "a-energy.png").stat().st_size > 1000
    assert len(numbers(tmp_path / "a-energy.csv")) == 32


def test_the_command_with_an_adapter(loads, tmp_path):
    adapter = svdpeft.attach(loads, svdpeft.SORSA(rank=2), ["q_proj"])
    perturb(adapter)
    expected = inspect(adapter).table
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    result = call("--adapter", tmp_path / "adapter", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == expected


def test_the_commands_second_table_is_about_the_adapter(loads, tmp_path):
    adapter = svdpeft.attach(loads, svdpeft.SORSA(rank=2), ["q_proj"])
    perturb(adapter)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    out = call("--adapter", tmp_path / "adapter").stdout
    for heading in ("ΔΣ", "ΔD", "assigned", "intru-", "overlap"):
        assert heading in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "q_porj"], "q_proj"),
        (["--energy", "90"], "outside (0, 1]"),
        (["--adapter", "nowhere"], "not an adapter folder"),
        (["--picture", "x.gif"], ".png, .svg or .pdf"),
    ],
)
def test_mistakes_are_one_line(loads, arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
