"""The tracker: what it measures on every kind of layer and method, and that training does not notice it."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from helpers import adapt, host, merge, perturb
from rows import every_kind, every_method, every_trainable, has
from scipy.optimize import linear_sum_assignment
from test_trainer import arguments, make, trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import svdpeft
from svdpeft.analysis import COLUMNS, DriftTracker, inspect
from svdpeft.analysis.matrices import Matrix, _copied
from svdpeft.analysis.tables import to_rows
from svdpeft.sites.weights import stored


def read(model, adapter):
    """The matrices that the model computes with, as NumPy, by site: merged, read, and unmerged again."""
    merge(adapter)
    found = {}
    for name, site in adapter.sites.items():
        place = site.places[0]
        found[name] = site.kind.to_matrix(place.module, stored(place.module, place.parameter).detach())
    whole = {name: stored(*place).detach() for name, place in adapter.whole.items()}
    found = {name: w.double().clone().numpy() for name, w in (found | whole).items()}
    adapter.unmerge()
    return found


def expected(before, after):
    """ΔΣ, ΔD and ΔD assigned, each the mean over a site's matrices, from plain SVDs."""
    found = []
    for w, w1 in zip(before.reshape(-1, *before.shape[-2:]), after.reshape(-1, *after.shape[-2:]), strict=True):
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        u1, s1, vh1 = np.linalg.svd(w1, full_matrices=False)
        left, right = np.abs(u.T @ u1), np.abs(vh @ vh1.T)
        pairs = linear_sum_assignment(left * right, maximize=True)
        cosines = [(np.diag(c).mean(), c[pairs].mean()) for c in (left, right)]
        found.append((np.abs(s - s1).mean(), *(1 - (a + b) / 2 for a, b in zip(*cosines, strict=True))))
    return np.mean(found, 0)


def check(tracker, before, after, rtol=2e-6):
    rows = {row["site"]: row for row in tracker.table if row["step"] == tracker.table[-1]["step"]}
    for name, row in rows.items():
        key = name if name in before else f"{name}.weight"
        found = [row["delta_sigma"], row["delta_d"], row["delta_d_assigned"]]
        np.testing.assert_allclose(found, expected(before[key], after[key]), rtol=rtol, atol=1e-8)
    return rows


@every_kind
def test_every_kind_of_layer_is_measured_as_its_matrices(kind):
    model, _ = host(kind)
    adapter = adapt(model, svdpeft.SORSA(rank=2))
    before = read(model, adapter)
    tracker = DriftTracker(adapter)
    tracker.record(0)
    assert [row["site"] for row in tracker.table] == list(adapter.sites)
    for row in tracker.table:
        assert max(row["delta_sigma"], row["delta_d"], row["delta_d_assigned"], row["distance"]) < 1e-6
        assert row["orthonormality"] == 0
        assert row["overlap_left"] is row["overlap_right"] is row["amplification"] is None
    perturb(adapter)
    tracker.record(3)
    # What is merged in 32 bits is rounded, and a vector turns by that over the gap of its singular value, some 1/100.
    rows = check(tracker, before, read(model, adapter), rtol=2e-6 if has(kind, "float64") else 2e-5)
    assert rows.keys() == adapter.sites.keys()
    for row in rows.values():
        assert row["distance"] > 0.01
        assert row["orthonormality"] > 0
        assert 0 <= row["overlap_left"] <= 1 + 1e-6


@every_trainable
def test_full_fine_tuning_is_measured_on_every_kind(kind):
    model, _ = host(kind)
    names = {name for name, p in model.layer.named_parameters() if p.ndim >= 2}
    adapter = adapt(model, svdpeft.Full(), train=())
    tracker = DriftTracker(adapter, [f"layer.{name}" for name in names])
    tracker.record(0)
    assert max(row["distance"] for row in tracker.table) == 0
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb(adapter)
    tracker.record(1)
    sizes = {row["site"]: row["distance"] for row in tracker.table if row["step"] == 1}
    for name, size in sizes.items():
        if "[" not in name:
            full = name if name in start else f"{name}.weight"
            w = start[full]
            change = float((model.get_parameter(full).detach() - w).norm() / w.norm())
            assert size == pytest.approx(change, rel=1e-6) or w.ndim > 2  # a mean over several matrices
    assert min(sizes.values()) > 0.01


@every_method
def test_every_method_is_measured(method):
    model, _ = host(("linear", 0))
    adapter = adapt(model, method)
    if not (adapter.sites or "layer.weight" in adapter.whole):
        with pytest.raises(ValueError, match="matches no matrix that the adapter trains"):
            DriftTracker(adapter, "layer")
        return
    with adapter.disabled():
        before = {"layer": model.layer.weight.detach().numpy().copy()}
    tracker = DriftTracker(adapter, "layer")
    perturb(adapter, 0.2)
    tracker.record(5)
    after = read(model, adapter)
    rows = check(tracker, before, {"layer": after.get("layer", after.get("layer.weight"))})
    assert set(COLUMNS) <= rows["layer"].keys()
    assert rows["layer"]["distance"] > 0
    json.dumps(tracker.to_json(), allow_nan=False)


def test_part_and_whole_of_a_fused_weight():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 18)

    torch.manual_seed(0)
    block = Block()
    adapter = svdpeft.attach(block, svdpeft.LoRA(rank=2), ["qkv[q,v]"])
    assert [m.name for m in DriftTracker(adapter, "qkv").matrices] == ["qkv[q]", "qkv[v]"]
    assert [m.name for m in DriftTracker(adapter, "qkv[v]").matrices] == ["qkv[v]"]
    adapter.detach()
    adapter = svdpeft.attach(block, svdpeft.Full())
    tracker = DriftTracker(adapter, ["qkv[v]", "qkv"])
    with torch.no_grad():
        block.qkv.weight[12:] *= 1.5
    tracker.record(1)
    assert {row["site"]: row["distance"] > 0 for row in tracker.table} == {"qkv": True, "qkv[v]": True}
    assert tracker.table[1]["distance"] == pytest.approx(0.5)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 5))


@pytest.mark.parametrize("method", [svdpeft.LoRA(rank=2), svdpeft.Full()], ids=lambda m: m.name)
def test_axes_of_a_raw_parameter_are_named_as_in_attach(method):
    model = Spectral()
    adapter = svdpeft.attach(model, method, ["w[in,mode,out]"])
    tracker = DriftTracker(adapter, "w[in,mode,out]")
    before = model._parameters["w"].detach().permute(1, 2, 0).double().numpy()
    perturb(adapter)
    tracker.record(1)
    after = (
        (before + adapter.delta("w").permute(1, 2, 0).numpy()) if adapter.sites else model.w.detach().permute(1, 2, 0)
    )
    check(tracker, {"w": before}, {"w": np.asarray(after, dtype=float)}, rtol=1e-4)


def test_experts_are_a_mean_over_their_matrices():
    model = Spectral()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["w"])
    before = read(model, adapter)
    tracker = DriftTracker(adapter)
    with torch.no_grad():
        adapter.site("w").factors.L[1] *= 3  # one of four
    tracker.record(1)
    check(tracker, before, read(model, adapter))
    assert tracker.table[0]["delta_sigma"] > 0
    s = np.linalg.svd(read(model, adapter)["w"], compute_uv=False)
    assert tracker.table[0]["condition_principal"] == pytest.approx((s[:, 0] / s[:, 1]).max(), rel=1e-5)


# -- the columns that belong to the factors -----------------------------------------------------------------------


def test_the_condition_of_what_the_factors_hold():
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=3, gamma=0), ["body"])
    tracker = DriftTracker(adapter)
    perturb(adapter)
    tracker.record(1)
    f = adapter.site("body").factors.tensors()
    s = torch.linalg.svdvals((f["L"] * f["C"]) @ f["A"])
    assert tracker.table[0]["condition_factors"] == pytest.approx(float(s[0] / s[2]), rel=1e-4)
    error = sum(float((q.mT @ q - torch.eye(3)).norm()) for q in (f["L"], f["A"].mT))
    assert tracker.table[0]["orthonormality"] == pytest.approx(error, rel=1e-5)


def test_lora_has_no_condition_before_it_moves_and_no_orthonormal_bases():
    adapter = svdpeft.attach(make(), svdpeft.LoRA(rank=2), ["body"])
    tracker = DriftTracker(adapter)
    tracker.record(0)
    assert tracker.table[0]["condition_factors"] is tracker.table[0]["orthonormality"] is None
    perturb(adapter)
    tracker.record(1)
    assert tracker.table[1]["condition_factors"] > 1
    assert tracker.table[1]["orthonormality"] is None


def test_the_rank_can_be_set():
    adapter = svdpeft.attach(make(), svdpeft.LoRA(rank=2), ["body"])
    for rank, r in ((None, 2), (4, 4), (99, 6)):
        tracker = DriftTracker(adapter, rank=rank)
        tracker.record(0)
        s = torch.linalg.svdvals(adapter.model.body.weight.detach())
        assert tracker.table[0]["condition_principal"] == pytest.approx(float(s[0] / s[r - 1]), rel=1e-4)


def test_sites_of_one_shape_are_measured_as_they_are_alone():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 3))
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank={"3": 3, ".*": 2}))
    perturb(adapter)
    together = DriftTracker(adapter)
    assert sorted(len(group) for group in together._groups()) == [1, 1, 3]
    together.record(1)
    for row in together.table:
        alone = DriftTracker(adapter, row["site"])
        alone.record(1)
        assert alone.table[0].pop("site") == row["site"]
        assert alone.table[0] == pytest.approx({k: v for k, v in row.items() if k != "site"}, rel=1e-5, abs=1e-7)


# -- training does not notice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [svdpeft.SORSA(rank=2, dropout=0.2), svdpeft.LoRA(rank=2, dropout=0.2), svdpeft.VeRA(rank=2), svdpeft.Full()],
    ids=lambda m: m.name,
)
def test_training_is_the_same_to_the_last_bit(method, tmp_path):
    def run(*, tracked):
        model = make()
        adapter = svdpeft.attach(model, method, "body" if method.factored else "all", train=["head"] * method.factored)
        torch.manual_seed(3)
        own = [DriftTracker(adapter, every=2)] if tracked else []
        session = trainer(model, adapter, arguments(tmp_path, max_steps=5), callbacks=own)
        session.train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return state, torch.get_rng_state(), np.random.get_state()[1].copy(), own

    plain, *random_plain, _ = run(tracked=False)
    tracked, *random_tracked, (tracker,) = run(tracked=True)
    assert plain.keys() == tracked.keys()
    for name, value in plain.items():
        assert torch.equal(value, tracked[name]), name
    assert torch.equal(random_plain[0], random_tracked[0])
    assert (random_plain[1] == random_tracked[1]).all()
    assert sorted({row["step"] for row in tracker.table}) == [0, 2, 4, 5]
    assert tracker.table[-1]["distance"] > 0
    assert tracker.seconds > 0


def test_the_copy_of_a_weight_that_trains_whole_is_on_the_host_and_of_its_own():
    with FakeTensorMode():  # a device that need not be there
        w = torch.empty(4, 3, device="cuda")
        assert _copied(Matrix("w", ("w",), True, True, lambda: w)).device.type == "cpu"
    w = torch.randn(4, 3)
    assert _copied(Matrix("w", ("w",), True, True, lambda: w)).data_ptr() != w.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: no memory of it to be kept")
def test_nothing_stays_on_the_gpu():
    model = nn.Sequential(nn.Linear(64, 64)).cuda()
    adapter = svdpeft.attach(model, svdpeft.Full())
    perturb(adapter)
    DriftTracker(adapter).record(0)  # the libraries keep workspaces of their own
    held = torch.cuda.memory_allocated()
    tracker = DriftTracker(adapter)
    tracker.record(1)
    assert torch.cuda.memory_allocated() - held < model[0].weight.nbytes


@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=2), svdpeft.Full()], ids=lambda m: m.name)
def test_the_svd_cache_keeps_the_base_alone(method, tmp_path):
    adapter = svdpeft.attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), method)
    with svdpeft.svd_cache(tmp_path):
        tracker = DriftTracker(adapter)
        tracker.record(0)
        before = sorted(tmp_path.iterdir())
        for step in (1, 2):
            perturb(adapter)
            tracker.record(step)
        assert sorted(tmp_path.iterdir()) == before
        assert len(before) == 2
        inspected = tmp_path / "inspect"
        with svdpeft.svd_cache(inspected):
            for _ in range(2):
                inspect(adapter)
                perturb(adapter, seed=1)
        assert len(list(inspected.iterdir())) == 2


def test_the_model_is_left_alone():
    model = make()
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["body"], train=["head"])
    perturb(adapter)
    before = {name: (id(p), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    tracker = DriftTracker(adapter, "body")
    tracker.record(0)
    assert before == {name: (id(p), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert adapter.state == "attached"


@pytest.mark.parametrize("state", ["merge", "fold"])
def test_merged_and_folded_it_is_the_same_weight(state):
    adapter = svdpeft.attach(make(), svdpeft.PiSSA(rank=2), ["body"])
    perturb(adapter)
    tracker = DriftTracker(adapter)
    tracker.record(1)
    getattr(adapter, state)()
    tracker.record(1)
    assert tracker.table[0] == tracker.table[1]


def test_an_adapter_that_is_off_cannot_be_read():
    adapter = svdpeft.attach(make(), svdpeft.PiSSA(rank=2), ["body"])
    tracker = DriftTracker(adapter)
    with adapter.disabled(), pytest.raises(RuntimeError, match="is disabled"):
        tracker.record(1)


def test_steps_by_list_and_the_ends(tmp_path):
    model = make()
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2), ["body"])
    for options, steps in (({"steps": [1, 3, 9]}, [0, 1, 3, 4]), ({}, [0, 4]), ({"every": 4}, [0, 4])):
        tracker = DriftTracker(adapter, **options)
        trainer(model, adapter, arguments(tmp_path), callbacks=[tracker]).train()
        assert [row["step"] for row in tracker.table] == steps
    trainer(model, adapter, arguments(tmp_path), callbacks=[tracker]).train()
    assert [row["step"] for row in tracker.table] == [0, 4]  # another training, another table


def test_a_stock_trainer_takes_it(tmp_path):
    from test_trainer import WithLoss

    model = make(WithLoss)
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["body"])
    tracker = DriftTracker(adapter, every=1)
    own = [svdpeft.AdapterCallback(adapter), tracker]
    trainer(model, adapter, arguments(tmp_path), cls=transformers.Trainer, callbacks=own).train()
    assert [row["step"] for row in tracker.table] == [0, 1, 2, 3, 4]
    assert tracker.table[-1]["delta_d"] > 0


def test_only_the_main_process_works():
    adapter = svdpeft.attach(make(), svdpeft.PiSSA(rank=2), ["body"])
    tracker = DriftTracker(adapter, every=1)
    state = transformers.TrainerState(global_step=1, is_world_process_zero=False)
    args, control = transformers.TrainingArguments(report_to="none"), transformers.TrainerControl()
    tracker.on_train_begin(args, state, control)
    tracker.on_step_end(args, state, control)
    assert tracker.table == []


# -- numbers that are not there, precisions, what comes out --------------------------------------------------------


def test_a_training_that_blew_up_leaves_empty_rows_and_goes_on():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=2))
    tracker = DriftTracker(adapter)
    tracker.record(0)
    perturb(adapter)
    with torch.no_grad():
        adapter.site("0").factors.L.fill_(float("nan"))
    tracker.record(1)
    first, second = tracker.table[2:]
    assert {key for key, value in first.items() if value is not None} == {"step", "site"}
    assert second["delta_d"] > 0
    assert first.keys() == second.keys() == tracker.table[0].keys()


def test_a_base_with_nan_is_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2))
    with torch.no_grad():
        model[1]._parameters["weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^1 \(6x6\) holds 1 NaN"):
        DriftTracker(adapter).record(0)


def test_a_base_of_zeros():
    model = nn.Sequential(nn.Linear(6, 5))
    nn.init.zeros_(model[0].weight)
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2))
    tracker = DriftTracker(adapter)
    tracker.record(0)
    perturb(adapter)
    tracker.record(1)
    assert tracker.table[0]["delta_sigma"] == 0
    assert tracker.table[1]["delta_sigma"] > 0
    assert tracker.table[1]["delta_d_assigned"] == pytest.approx(0, abs=1e-5)
    assert tracker.table[1]["distance"] is None


@pytest.mark.filterwarnings("ignore:.*trains whole in torch.bfloat16")
@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=2), svdpeft.Full()], ids=lambda m: m.name)
def test_bfloat16_weights(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24)).to(torch.bfloat16)
    adapter = svdpeft.attach(model, method)
    w = model[0]._parameters["weight"].detach().double()
    tracker = DriftTracker(adapter)
    tracker.record(0)
    assert tracker.table[0]["delta_d"] < 1e-6
    perturb(adapter, 0.05)
    tracker.record(1)
    now = adapter.delta("0").double() + w if adapter.sites else model[0].weight.detach().double()
    check(tracker, {"0": w.numpy()}, {"0": now.numpy()}, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: everything runs where the weight is")
@pytest.mark.parametrize("method", [svdpeft.SORSA(rank=4), svdpeft.Full()], ids=lambda m: m.name)
def test_on_a_gpu_it_is_the_same(method):
    tables = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 48), nn.Linear(48, 40)).to(device)
        adapter = svdpeft.attach(model, method)
        tracker = DriftTracker(adapter)
        tracker.record(0)
        perturb(adapter, 0.01)
        tracker.record(1)
        tables.append(tracker.table)
    for a, b in zip(*tables, strict=True):
        for column in ("delta_sigma", "delta_d_assigned", "effective_rank", "distance"):
            assert a[column] == pytest.approx(b[column], rel=1e-2, abs=1e-5), column


def test_what_comes_out(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2))
    tracker = DriftTracker(adapter)
    for step in (0, 4):
        tracker.record(step)
        perturb(adapter)
    found = json.loads(json.dumps(tracker.to_json(), allow_nan=False))
    assert found["steps"] == [0, 4]
    assert found["sites"] == ["0", "1"]
    assert found.keys() == {"steps", "sites", *COLUMNS}
    assert found["delta_d"][1][0] == next(r["delta_d"] for r in tracker.table if r["step"] == 4 and r["site"] == "0")
    assert to_rows(found) == [{k: row[k] for k in ("step", "site", *COLUMNS)} for row in tracker.table]
    assert tracker.to_json(["delta_d"]).keys() == {"steps", "sites", "delta_d"}
    tracker.to_csv(tmp_path / "drift.csv")
    lines = (tmp_path / "drift.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("step,site,delta_sigma,delta_d")
    assert lines[3].startswith(f"4,0,{tracker.table[2]['delta_sigma']},")


def test_patterns():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    adapter = svdpeft.attach(nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}), svdpeft.LoRA(rank=1))

    def names(sites):
        return [m.name for m in DriftTracker(adapter, sites).matrices]

    assert names("q_proj|v_proj") == [f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qv"]
    assert names(["v_proj", "layers.0.q_proj"]) == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]
    assert names(r"layers\.1\..*") == [f"layers.1.{p}_proj" for p in "qkv"]
    assert len(names("all")) == len(names("all-linear")) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": "q_porj"}, ("sites='q_porj'", "q_proj")),
        ({"sites": ["all", "(q"]}, ("(q",)),
        ({"every": 0}, ("every=0",)),
        ({"rank": -1}, ("rank=-1",)),
        ({"every": 2, "steps": [1]}, ("every=2", "steps=[1]", "only one")),
    ],
)
def test_mistakes(options, words):
    model = nn.Sequential()
    model.q_proj = nn.Linear(3, 3)
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=1))
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        DriftTracker(adapter, **options)
    for word in words:
        assert word in str(caught.value)
