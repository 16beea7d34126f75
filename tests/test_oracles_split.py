"""Methods that train split factors, their papers written out in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import nn

from svdpeft import OSF, Budget, KaSA, MiCA, MiLoRA, OLoRA, SpectralAdapter, SpectralAdapterR, attach
from svdpeft.adapter.adapter import Adapter

SCALES = [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rs": True}, 6 / math.sqrt(3))]  # at rank 3
every_scale = pytest.mark.parametrize(("options", "scale"), SCALES)


def gram_error(a: Array) -> float:
    return float(np.linalg.norm(a - np.eye(len(a))))


@pytest.mark.parametrize("cls", [MiLoRA, OLoRA, MiCA, KaSA])
def test_a_triplet_without_a_share_of_the_budget_leaves_no_update(cls: Any):
    model, w, x = linear((6, 9))
    adapter = attach(model, cls(rank=3, allocate=Budget(target_rank=1, total_steps=3)))
    start = w + adapter.delta("layer").numpy()
    stepper = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for step in range(3):
        stepper.zero_grad()
        model["layer"](torch.from_numpy(x)).pow(3).sum().backward()
        adapter.before_step(peak_lr=1e-2)
        stepper.step()
        adapter.after_step()
        change = w + adapter.delta("layer").numpy() - start
        # A triplet of which both factors moved changes two directions, one that went back changes none.
        assert rank_of(change) <= (3, 2, 1)[step] * (2 if cls in (MiLoRA, OLoRA) else 1)
    assert np.abs(change).max() > 1e-6
    with pytest.raises(TypeError, match="allocate"):
        OSF(allocate=Budget())


# -- MiLoRA --------------------------------------------------------------------------------------------------


@every_shape
@every_scale
def test_milora(shape: tuple[int, int], options: dict[str, Any], scale: float):
    model, w, x = linear(shape)
    adapter = attach(model, MiLoRA(rank=3, **options))
    u, s, vh = triplets(w)
    u, s, vh = u[:, -3:], s[-3:], vh[-3:]
    start = u * np.sqrt(s), np.sqrt(s)[:, None] * vh
    f = tensors(adapter)
    assert f.keys() == {"L", "A", "L0", "A0"}
    near(f["L"], start[0])
    near(f["A"], start[1])
    perturb(adapter)
    f = tensors(adapter)
    near(output(model, x), x @ (w + scale * (f["L"] @ f["A"] - start[0] @ start[1])).T)
    assert adapter.trainable_count == 3 * sum(shape)


@every_shape
def test_milora_leaves_the_principal_part_in_a_folded_weight(shape: tuple[int, int]):
    model, w, _ = linear(shape)
    attach(model, MiLoRA(rank=3)).fold()
    u, s, vh = triplets(w, min(shape) - 3)
    near(model["layer"]._parameters["weight"], (u * s) @ vh)


# -- OLoRA ---------------------------------------------------------------------------------------------------


@every_shape
@every_scale
def test_olora(shape: tuple[int, int], options: dict[str, Any], scale: float):
    model, w, x = linear(shape)
    adapter = attach(model, OLoRA(rank=3, **options))
    q, upper = np.linalg.qr(w)
    sign = np.where(np.diag(upper) < 0, -1, 1)
    q, upper = (q * sign)[:, :3], (sign[:, None] * upper)[:3]
    f = tensors(adapter)
    near(f["L"], q)
    near(f["A"], upper)
    near(f["L"] @ f["A"][:, :3], w[:, :3])  # all of the first r columns, whatever their size
    perturb(adapter)
    f = tensors(adapter)
    near(output(model, x), x @ (w + scale * (f["L"] @ f["A"] - q @ upper)).T)
    assert adapter.trainable_count == 3 * sum(shape)


def test_olora_has_one_answer_whatever_the_signs_of_the_decomposition():
    model, _, _ = linear((6, 9))
    upper = tensors(attach(model, OLoRA(rank=4)))["A"]
    assert (np.diag(upper) > 0).all()
    near(np.tril(upper[:, :4], -1), np.zeros((4, 4)))


# -- MiCA ----------------------------------------------------------------------------------------------------


@every_shape
@every_scale
def test_mica(shape: tuple[int, int], options: dict[str, Any], scale: float):
    model, w, x = linear(shape)
    adapter = attach(model, MiCA(rank=3, **options))
    u = triplets(w)[0][:, -3:]
    f = tensors(adapter)
    assert f.keys() == {"L", "A"}
    near(f["L"], u)
    assert (f["A"] == 0).all()
    perturb(adapter)
    f = tensors(adapter)
    near(f["L"], u)
    near(output(model, x), x @ (w + scale * u @ f["A"]).T)
    assert adapter.trainable_count == 3 * shape[1]
    assert adapter.sites["layer"].method.export_rank(*shape) == 3


@every_shape
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_mica_with_the_full_basis(shape: tuple[int, int], rank: int):
    model, w, _ = linear(shape)
    left = tensors(attach(model, MiCA(rank=rank, basis="full")))["L"]
    u = np.linalg.svd(w, full_matrices=True)[0][:, -rank:]
    near(left.T @ left, np.eye(rank))
    null = min(rank, shape[0] - min(shape))
    if null < rank or null == 0:  # otherwise any r of the null space's directions will do
        near(left @ left.T, u @ u.T)
    near(w.T @ left[:, rank - null :], np.zeros((shape[1], null)))


def test_mica_names_the_bases():
    with pytest.raises(ValueError, match="basis 'whole' is not one of thin, full"):
        MiCA(basis="whole")  # type: ignore[arg-type]


# -- KaSA ----------------------------------------------------------------------------------------------------


@every_shape
@every_scale
@pytest.mark.parametrize("drop", [None, 0, 2])
def test_kasa(shape: tuple[int, int], options: dict[str, Any], scale: float, drop: int | None):
    model, w, x = linear(shape)
    adapter = attach(model, KaSA(rank=3, drop=drop, **({"alpha": None} | options)))
    u, s, vh = triplets(w)
    kept = min(shape) - (3 if drop is None else drop)
    world = (u[:, :kept] * s[:kept]) @ vh[:kept]
    near(output(model, x), x @ world.T)
    f = tensors(adapter)
    assert (f["L"] == 0).all()
    assert np.abs(f["A"]).max() <= 1 / math.sqrt(shape[1])
    perturb(adapter)
    f = tensors(adapter)
    expected = x @ (world + scale * (f["L"] * f["C"]) @ f["A"]).T
    near(output(model, x), expected)
    adapter.fold()
    near(output(model, x), expected)
    near(model["layer"]._parameters["weight"], world)
    assert adapter.trainable_count == 3 * (sum(shape) + 1)
    assert adapter.sites["layer"].method.export_rank(*shape) == min(3 + min(shape) - kept, *shape)


def test_kasa_has_the_scale_of_the_published_code():
    assert KaSA().rank == 8
    assert KaSA().scale == 2.0


def test_kasa_starts_with_standard_normal_singular_values():
    model = nn.ModuleDict({"layer": nn.Linear(1000, 900)})
    f = tensors(attach(model, KaSA(rank=800)))
    assert abs(f["C"].mean()) < 0.1
    assert abs(f["C"].std() - 1) < 0.1
    assert abs(f["A"].std() * math.sqrt(3 * 1000) - 1) < 0.01


def test_kasa_keeps_one_triplet_at_least():
    model, w, x = linear((6, 9))
    attach(model, KaSA(rank=6))
    u, s, vh = triplets(w, 1)
    near(output(model, x), x @ ((u * s) @ vh).T)
    assert KaSA(rank=1).at("row", 1, 9).drop == 0  # a single row is left as it is
    assert KaSA(rank=1).at("row", 1, 9).exact_start
    with pytest.raises(ValueError, match=r"drop 6 is outside \[0, 5\] at layer \(6x9\)"):
        attach(linear((6, 9))[0], KaSA(rank=2, drop=6))
    assert attach(linear((6, 9))[0], KaSA(rank=2, drop=6), clip_rank=True).sites["layer"].method.drop == 5


def several(**options: Any) -> tuple[Adapter, list[dict[str, Array]]]:
    """KaSA on two layers of one shape, one of another and a grouped convolution, moved off the start."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(7, 5), "b": nn.Linear(7, 5), "c": nn.Linear(4, 9), "d": nn.Conv1d(4, 6, 3, groups=2)}
    adapter = attach(nn.ModuleDict(layers).double(), KaSA(rank=2, beta=0.3, gamma=0.7, **options), targets="all")
    perturb(adapter)
    return adapter, [{k: t.numpy() for k, t in site.factors.tensors().items()} for site in adapter.sites.values()]


def matrices(factors: list[dict[str, Array]]) -> list[tuple[Array, Array, Array]]:
    """(L, C, A) of every matrix of every site; a grouped convolution has one per group."""
    return [
        (f["L"][i], f["C"][i], f["A"][i]) if f["L"].ndim == 3 else (f["L"], f["C"], f["A"])
        for f in factors
        for i in range(len(f["L"]) if f["L"].ndim == 3 else 1)
    ]


def test_kasa_penalty_of_the_paper():
    adapter, factors = several()
    expected = sum(
        0.3 * (c**2).sum() + 0.7 * (gram_error(left.T @ left) + gram_error(a @ a.T)) for left, c, a in matrices(factors)
    )
    near(adapter.penalty(), expected)


def test_kasa_penalty_of_the_published_code():
    adapter, factors = several(regulariser="reference")
    found = matrices(factors)
    assert len(found) == 5
    expected = sum(0.3 * (c**2).sum() + 0.7 * (gram_error(left @ left.T) + gram_error(a.T @ a)) for left, c, a in found)
    near(adapter.penalty(), expected / 5)


@pytest.mark.parametrize("regulariser", ["paper", "reference"])
def test_kasa_penalty_has_the_gradient_of_finite_differences(regulariser: str):
    adapter, _ = several(regulariser=regulariser)
    assert torch.autograd.gradcheck(lambda *_: adapter.penalty(), tuple(adapter.parameters()))


@pytest.mark.parametrize("regulariser", ["paper", "reference"])
def test_kasa_penalty_has_a_gradient_at_the_start_and_at_full_rank(regulariser: str):
    model, _, _ = linear((7, 7))
    adapter = attach(model, KaSA(rank=7, regulariser=regulariser))  # type: ignore[arg-type]
    with torch.no_grad():
        adapter.sites["layer"].factors.A.copy_(torch.eye(7))  # orthonormal: the norm has no slope there
    adapter.penalty().backward()
    for p in adapter.parameters():
        assert torch.isfinite(p.grad).all()
    assert any(bool((p.grad != 0).any()) for p in adapter.parameters())


def test_kasa_without_weights_has_no_penalty():
    model, _, _ = linear((6, 9))
    assert attach(model, KaSA(rank=2, beta=0, gamma=0)).penalty() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta -1.0 is negative"),
        ({"gamma": -1.0}, "gamma -1.0 is negative"),
        ({"drop": -1}, "drop -1 is negative"),
        ({"regulariser": "code"}, "regulariser 'code' is not one of paper, reference"),
    ],
)
def test_kasa_refuses(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KaSA(**options)


# -- Spectral Adapter ----------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("offset", [0, 2, -3])
@pytest.mark.parametrize("values", [False, True])
def test_spectral_adapter(shape: tuple[int, int], offset: int, values: bool):
    model, w, x = linear(shape)
    adapter = attach(model, SpectralAdapter(rank=3, offset=offset, values=values))
    window = slice(offset, offset + 3 if offset >= 0 else None)
    u, s, vh = triplets(w)
    f = tensors(adapter)
    near(f["L"], u[:, window])
    near(f["C"], s[window])
    near(f["A"], vh[window])
    assert all((f[name] == 0).all() for name in ("P", "Q"))
    perturb(adapter)
    f = tensors(adapter)
    u, s, vh = u.copy(), s.copy(), vh.copy()
    u[:, window] += f["P"]
    vh[window] += f["Q"]
    if values:
        s[window] += f["D"]
    near(output(model, x), x @ ((u * s) @ vh).T)
    adapter.fold()
    near(output(model, x), x @ ((u * s) @ vh).T)
    assert adapter.trainable_count == 3 * (sum(shape) + values)
    assert rank_of((u * s) @ vh - w) == adapter.sites["layer"].method.export_rank(*shape) == min(6, *shape)


def test_spectral_adapters_of_disjoint_windows_add_up():
    model, w, x = linear((8, 9))
    u, s, vh = triplets(w)
    for name, offset in (("first", 0), ("second", 3)):
        adapter = attach(model, SpectralAdapter(rank=3, offset=offset), name=name)
        perturb(adapter, seed=offset)
        f = tensors(adapter)
        u[:, offset : offset + 3] += f["P"]
        vh[offset : offset + 3] += f["Q"]
    near(output(model, x), x @ ((u * s) @ vh).T)


def test_spectral_adapter_keeps_a_change_far_smaller_than_the_weight():
    model, _, _ = linear((6, 9))
    adapter = attach(model.float(), SpectralAdapter(rank=3))
    perturb(adapter, size=1e-6)
    f = {k: v.astype(np.float64) for k, v in tensors(adapter).items()}
    expected = ((f["L"] + f["P"]) * f["C"]) @ (f["A"] + f["Q"]) - (f["L"] * f["C"]) @ f["A"]
    np.testing.assert_allclose(adapter.delta("layer"), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", [SpectralAdapter, SpectralAdapterR])
def test_spectral_adapter_windows_stay_within_the_triplets(method: Any):
    with pytest.raises(ValueError, match=r"offset 6 is outside \[-6, 5\] at layer \(6x9\)"):
        attach(linear((6, 9))[0], method(rank=2, offset=6))
    with pytest.raises(ValueError, match=r"rank 3 is outside \[1, 2\] at layer \(6x9\)"):
        attach(linear((6, 9))[0], method(rank=3, offset=4))
    assert attach(linear((6, 9))[0], method(rank=3, offset=4), clip_rank=True).sites["layer"].method.rank == 2
    assert attach(linear((6, 9))[0], method(rank=None, offset=-4)).sites["layer"].method.rank == 4


def cayley(x: Array) -> Array:
    k, eye = (x - x.T) / 2, np.eye(len(x))
    return (eye + k) @ np.linalg.inv(eye - k)


@every_shape
@pytest.mark.parametrize("offset", [0, 2])
def test_spectral_adapter_r(shape: tuple[int, int], offset: int):
    model, w, x = linear(shape)
    adapter = attach(model, SpectralAdapterR(rank=3, offset=offset))
    window = slice(offset, offset + 3)
    f = tensors(adapter)
    assert all((f[name] == 0).all() for name in ("X", "Y"))
    assert (f["c"] == 1).all()
    perturb(adapter)
    f = tensors(adapter)
    u, s, vh = triplets(w)
    u[:, window] = u[:, window] @ cayley(f["X"])
    s[window] *= f["c"]
    vh[window] = (vh[window].T @ cayley(f["Y"])).T
    near(u.T @ u, np.eye(min(shape)))
    near(output(model, x), x @ ((u * s) @ vh).T)
    adapter.fold()
    near(output(model, x), x @ ((u * s) @ vh).T)
    assert adapter.trainable_count == 2 * 3**2 + 3
    assert rank_of((u * s) @ vh - w) == adapter.sites["layer"].method.export_rank(*shape) == 3


def test_spectral_adapter_r_of_the_published_code_has_the_other_sign():
    model, w, x = linear((6, 9))
    adapter = attach(model, SpectralAdapterR(rank=3))
    perturb(adapter)
    f, eye = tensors(adapter), np.eye(3)
    with torch.no_grad():
        for name in ("X", "Y"):
            adapter.sites["layer"].factors.get_parameter(name).neg_()
    left, right = ((eye - k) @ np.linalg.inv(eye + k) for k in ((f[n] - f[n].T) / 2 for n in ("X", "Y")))
    u, s, vh = triplets(w, 3)
    near(output(model, x), x @ (w + u @ (left * (s * f["c"]) @ right.T - np.diag(s)) @ vh).T)


def test_spectral_adapter_r_of_one_vector_trains_its_value_alone():
    model, w, x = linear((6, 9))
    adapter = attach(model, SpectralAdapterR(rank=1))
    assert adapter.trainable_count == 1
    perturb(adapter)
    u, s, vh = triplets(w, 1)
    near(output(model, x), x @ (w + (u * s * (tensors(adapter)["c"] - 1)) @ vh).T)


# -- OSF -----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [2, None])
def test_osf(shape: tuple[int, int], rank: int | None):
    model, w, x = linear(shape)
    adapter = attach(model, OSF(rank=rank))
    r = (min(shape) + 1) // 2 if rank is None else rank
    u, s, vh = triplets(w)
    f = tensors(adapter)
    near(f["L"], u[:, -r:])
    near(f["C"], s[-r:])
    near(f["A"], vh[-r:])
    perturb(adapter)
    f = tensors(adapter)
    high = min(shape) - r
    near(output(model, x), x @ ((u[:, :high] * s[:high]) @ vh[:high] + (f["L"] * f["C"]) @ f["A"]).T)
    assert adapter.trainable_count == r * (sum(shape) + 1)


def gradients(model: nn.ModuleDict, x: Array) -> None:
    model["layer"](torch.from_numpy(x)).pow(3).sum().backward()


def leak(basis: Array, x: Any) -> float:
    return float(np.abs(basis.T @ x.detach().numpy()).max())


@every_shape
@pytest.mark.parametrize("rank", [2, 6])
def test_osf_projects_the_gradients(shape: tuple[int, int], rank: int):
    model, w, x = linear(shape)
    adapter = attach(model, OSF(rank=rank))
    perturb(adapter)
    gradients(model, x)
    f = adapter.sites["layer"].factors
    left, c, a = (p.grad.numpy().copy() for p in (f.L, f.C, f.A))
    high = min(shape) - rank
    u, _, vh = triplets(w, high)
    assert high == 0 or min(np.abs(u.T @ left).max(), np.abs(vh @ a.T).max()) > 1e-3
    adapter.before_step(peak_lr=1e-3)
    near(f.L.grad, left - u @ (u.T @ left))
    near(f.A.grad, a - (a @ vh.T) @ vh)
    near(f.C.grad, c)


def test_osf_projects_every_site_whatever_its_shape_and_reach():
    torch.manual_seed(0)
    shapes = {"a": (5, 8), "b": (5, 8), "c": (8, 5), "d": (8, 6), "e": (7, 7), "f": (6, 4)}
    layers: dict[str, nn.Module] = {name: nn.Linear(n, m) for name, (m, n) in shapes.items()}
    model = nn.ModuleDict(layers | {"g": nn.Conv1d(6, 10, 3, groups=2)}).double()
    adapter = attach(model, OSF(rank=2), targets="all")
    perturb(adapter)
    outputs = [model[name](torch.randn(3, n).double()) for name, (_, n) in shapes.items() if name != "b"]
    outputs.append(model["g"](torch.randn(2, 6, 9).double()))
    torch.stack([out.pow(3).sum() for out in outputs]).sum().backward()
    before = {name: [f.L.grad, f.A.grad] for name, site in adapter.sites.items() if (f := site.factors)}
    before = {name: [None if g is None else g.numpy().copy() for g in pair] for name, pair in before.items()}
    assert before["b"] == [None, None]
    adapter.before_step(peak_lr=1e-3)
    for name, site in adapter.sites.items():
        f = site.factors
        if name == "b":
            assert f.L.grad is f.A.grad is None
            continue
        w = site.base_matrix().numpy()
        for i in range(len(w)) if w.ndim == 3 else [...]:
            u, _, vh = triplets(w[i], min(w.shape[-2:]) - 2)
            left, a = before[name][0][i], before[name][1][i]
            near(f.L.grad[i], left - u @ (u.T @ left))
            near(f.A.grad[i], a - (a @ vh.T) @ vh)


@every_shape
@pytest.mark.parametrize("project", ["gradient", "factors"])
def test_osf_leaks_only_through_the_optimizer(shape: tuple[int, int], project: Any):
    for optimizer, leaks in ((torch.optim.SGD, False), (torch.optim.Adam, project == "gradient")):
        model, w, x = linear(shape)
        adapter = attach(model, OSF(rank=2, project=project))
        stepper = optimizer(adapter.parameters(), lr=1e-2)
        for _ in range(3):
            stepper.zero_grad()
            gradients(model, x)
            adapter.before_step(peak_lr=1e-2)
            stepper.step()
            adapter.after_step()
        f = adapter.sites["layer"].factors
        u, _, vh = triplets(w, min(shape) - 2)
        found = max(leak(u, f.L), leak(vh.T, f.A.mT))
        assert found > 1e-4 if leaks else found < 1e-12


def test_osf_wants_to_be_called_before_the_step():
    model, _, x = linear((6, 9))
    adapter = attach(model, OSF(rank=2))
    gradients(model, x)
    with pytest.raises(RuntimeError, match="before_step"):
        adapter.after_step()
    attach(linear((6, 9))[0], OSF(rank=2, project="factors")).after_step()


def test_osf_keeps_a_leading_basis_only_where_the_trailing_one_does_not_tell_it():
    for shape, kept in {(6, 9): {"V"}, (9, 6): {"U"}, (7, 7): set()}.items():
        assert tensors(attach(linear(shape)[0], OSF(rank=2))).keys() & {"U", "V"} == kept


def test_osf_names_what_can_be_projected():
    with pytest.raises(ValueError, match="project 'loss' is not one of gradient, factors"):
        OSF(project="loss")  # type: ignore[arg-type]
