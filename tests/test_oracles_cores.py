"""The methods that train a core between frozen bases: their papers, written out in NumPy float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close, perturb
from oracle import SHAPES, Array, check, every_shape, linear, near, output, rank_of, tensors, triplets
from torch import nn

from svdpeft import PSOFT, SSVD, SVF, SVFT, AntiPaSTO, LoRAXS, SVDiff, SVFit, SVFTransformer2, attach
from svdpeft.methods.base import Factored

Shape = tuple[int, int]


def lower(values: Array, size: int) -> Array:
    """A skew-symmetric matrix with the values below its diagonal, row by row."""
    q, position = np.zeros((size, size)), 0
    for i in range(size):
        for j in range(i):
            q[i, j], q[j, i] = values[position], -values[position]
            position += 1
    assert position == len(values)
    return q


def rotation(q: Array) -> Array:
    """(I + Q)(I − Q)⁻¹."""
    return (np.eye(len(q)) + q) @ np.linalg.inv(np.eye(len(q)) - q)


def raises(words: str, make: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# -- SVF -----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [None, 3])
def test_svf(shape: Shape, rank: int | None):
    r = rank or min(shape)

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        s[:r] = f["C"]
        return u @ np.diag(s) @ vh

    _, start, w = check(SVF(rank=rank), shape, weight, r)
    near(start["C"], triplets(w, r)[1])


@every_shape
def test_svf_is_plain_svft_and_svdiff_without_its_relu(shape: Shape):
    """One function of W0, from three origins: σ' = σ + M = σ + δ."""
    outputs = []
    for method in (SVF(), SVFT(), SVDiff()):
        model, _, x = linear(shape)
        perturb(attach(model, method), size=0.01)  # too little to reach the ReLU
        outputs.append(output(model, x))
    assert np.abs(outputs[0] - output(linear(shape)[0], x)).max() > 1e-3
    near(outputs[0], outputs[1])
    near(outputs[0], outputs[2])


# -- SVDiff --------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("strength", [1.0, 0.4, -2.0, 0.0])
def test_svdiff(shape: Shape, strength: float):
    model, w, x = linear(shape)
    adapter = attach(model, SVDiff(strength=strength))
    assert adapter.trainable_count == min(shape)
    assert (tensors(adapter)["C"] == 0).all()
    perturb(adapter, 1.0)
    delta = tensors(adapter)["C"]
    u, s, vh = triplets(w)
    cut = np.maximum(s + strength * delta, 0)
    if strength in (1.0, -2.0):
        assert (cut == 0).any(), "the ReLU is part of this test"
    near(output(model, x), x @ (u @ np.diag(cut) @ vh).T)
    adapter.fold()
    near(output(model, x), x @ (u @ np.diag(cut) @ vh).T)


def test_svdiff_gradient_is_that_of_the_relu():
    """s ∂/∂σ where σ + s δ is positive, and nothing where it is not."""
    model, w, x = linear((6, 9))
    adapter = attach(model, SVDiff(strength=0.5))
    perturb(adapter, 2.0)
    model["layer"](torch.from_numpy(x)).sum().backward()
    u, s, vh = triplets(w)
    delta = tensors(adapter)["C"]
    alive = s + 0.5 * delta > 0
    assert alive.any()
    assert not alive.all()
    slope = 0.5 * np.array([u[:, i].sum() * (x @ vh[i]).sum() for i in range(6)]) * alive
    near(adapter.sites["layer"].factors.C.grad, slope)


def test_svdiff_refuses_a_strength_that_is_no_number():
    raises("strength nan is not a finite", lambda: SVDiff(strength=math.nan))


# -- SVF of Transformer² -------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rank", [None, 4])
def test_svf_transformer2(shape: Shape, rank: int | None):
    r = rank or min(shape)

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        s[:r] *= f["z"]
        return u @ np.diag(s) @ vh

    _, start, _ = check(SVFTransformer2(rank=rank), shape, weight, r)
    assert (start["z"] == 1).all()


@every_shape
def test_svf_transformer2_official_code(shape: Shape):
    """W' = U diag(σ · sigmoid(p)) Vᵀ · Σσ / Σ(σ · sigmoid(p)): the nuclear norm stays."""

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        masked = s / (1 + np.exp(-f["z"]))
        return u @ np.diag(masked) @ vh * s.sum() / masked.sum()

    adapter, start, w = check(SVFTransformer2(reference_init=True), shape, weight, min(shape))
    assert np.abs(start["z"] - 0.1).max() < 0.05
    merged = w + adapter.delta("layer").numpy()
    near(np.linalg.svd(merged, compute_uv=False).sum(), np.linalg.svd(w, compute_uv=False).sum())


def test_svf_transformer2_official_start_is_half_a_percent_off():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(300, 200, bias=False, dtype=torch.float64)})
    adapter = attach(model, SVFTransformer2(reference_init=True))
    z = tensors(adapter)["z"]
    assert abs(z.mean() - 0.1) < 0.003
    assert abs(z.std() - 0.01) < 0.002
    share = adapter.delta("layer").norm() / model["layer"]._parameters["weight"].norm()
    assert 0.003 < float(share) < 0.007


def test_svf_transformer2_refuses_the_official_code_on_one_value():
    model, _, _ = linear((6, 9))
    raises("rank 1 at layer .6x9.: with reference_init", lambda: attach(model, SVFTransformer2(1, reference_init=True)))


# -- SVFit ---------------------------------------------------------------------------------------------------


@every_shape
def test_svfit(shape: Shape):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        return u[:, :3] @ np.diag(f["C"]) @ vh[:3] + u[:, 3:] @ np.diag(s[3:]) @ vh[3:]  # W_r + W_e

    adapter, start, w = check(SVFit(rank=3), shape, weight, 3)
    near(start["C"], triplets(w, 3)[1])
    assert rank_of(adapter.delta("layer").numpy()) == 3


@every_shape
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rank", [None, 4])
def test_svfit_rank_from_energy(shape: Shape, energy: float, rank: int | None):
    model, w, _ = linear(shape)
    adapter = attach(model, SVFit(rank=rank, energy=energy))
    square = triplets(w)[1] ** 2
    wanted = next(r for r in range(1, len(square) + 1) if square[:r].sum() / square.sum() >= energy - 1e-12)
    assert adapter.trainable_count == min(wanted, rank or len(square))
    assert adapter.sites["layer"].method.energy == energy


def test_svfit_takes_a_rank_that_is_enough_for_every_matrix():
    torch.manual_seed(0)
    layer = nn.Conv1d(6, 8, 3, groups=2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[:4] = torch.ones(4, 3, 3)  # rank 1; the other group needs more
    adapter = attach(nn.ModuleDict({"layer": layer}), SVFit(energy=0.99), targets="all")
    square = triplets(layer.weight.detach().numpy()[4:].reshape(4, 9))[1] ** 2
    wanted = next(r for r in range(1, 5) if square[:r].sum() / square.sum() >= 0.99)
    assert wanted > 1
    assert adapter.trainable_count == 2 * wanted
    raises("energy 0.0 is outside", lambda: SVFit(energy=0.0))


# -- LoRA-XS -------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize(
    ("options", "scale"), [({}, 1.0), ({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rs": True}, 6 / math.sqrt(3))]
)
@pytest.mark.parametrize("std", [1e-5, 0.0])
def test_lora_xs(shape: Shape, options: dict[str, Any], scale: float, std: float):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w, 3)
        return w + scale * u @ f["C"] @ np.diag(s) @ vh

    method = LoRAXS(rank=3, std=std, **options)
    _, start, w = check(method, shape, weight, 9)
    assert method.exact_start == (std == 0)
    assert (start["C"] == 0).all() == (std == 0)
    near(start["L"], triplets(w, 3)[0])
    near(start["A"], np.diag(triplets(w, 3)[1]) @ triplets(w, 3)[2])


def test_lora_xs_core_is_normal_and_from_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(90, 80, dtype=torch.float64)})
        drawn.append(tensors(attach(model, LoRAXS(rank=64), seed=seed))["C"])
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).all()
    assert abs(drawn[0].std() / 1e-5 - 1) < 0.05
    assert abs(drawn[0].mean()) < 1e-6
    raises("std -1.0 is outside", lambda: LoRAXS(std=-1.0))


def test_lora_xs_learns_from_a_core_of_zeros():
    model, w, x = linear((6, 9))
    adapter = attach(model, LoRAXS(rank=3, std=0.0))
    (model["layer"](torch.from_numpy(x)) * 2).sum().backward()
    u, s, vh = triplets(w, 3)
    near(adapter.sites["layer"].factors.C.grad, u.T @ (2 * np.ones((6, 4)) @ x) @ (np.diag(s) @ vh).T)


# -- SSVD ----------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("rotation_", ["cayley", "first-order", "free"])
def test_ssvd(shape: Shape, rotation_: Any):
    """U (Σ + ΔΣ) G Vᵀ with the paper's G = (I − K)(I + K)⁻¹, whose K is minus the library's Q."""

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        k = -lower(f["Q"], 3) if "Q" in f else np.zeros((3, 3))
        g = np.eye(len(s))
        g[:3, :3] = {
            "cayley": (np.eye(3) - k) @ np.linalg.inv(np.eye(3) + k),
            "first-order": np.eye(3) - 2 * k,
            "free": np.eye(3) + f.get("G", 0),
        }[rotation_]
        s[:3] += f["C"]
        return u @ np.diag(s) @ g @ vh

    check(SSVD(rank=3, rotation=rotation_), shape, weight, 12 if rotation_ == "free" else 6)


def test_ssvd_turns_the_input_side_alone():
    """Without ΔΣ the singular values and the output's vectors stay, and the input's are turned among each other."""
    model, w, _ = linear((6, 9))
    adapter = attach(model, SSVD(rank=4))
    with torch.no_grad():
        adapter.sites["layer"].factors.Q.normal_()
    new = w + adapter.delta("layer").numpy()
    near(new @ new.T, w @ w.T)  # U Σ² Uᵀ
    assert np.abs(new.T @ new - w.T @ w).max() > 0.01


@every_shape
@pytest.mark.parametrize("rotation_", ["cayley", "first-order"])
def test_ssvd_of_espnet(shape: Shape, rotation_: Any):
    """Its code: the SVD of Wᵀ for a wide W, A = I − 2K on the rows of v, σ + s · sigmoid(gate)."""

    def weight(f: dict[str, Array], w: Array) -> Array:
        wide = w.shape[0] < w.shape[1]
        u, sigma, vh = triplets(w)
        u, v = (vh.T, u.T) if wide else (u, vh)  # of Wᵀ, or of W
        k = -lower(f["Q"], 3)
        a = np.eye(3) - 2 * k if rotation_ == "first-order" else (np.eye(3) - k) @ np.linalg.inv(np.eye(3) + k)
        sigma[:3] += f["C"] / (1 + np.exp(-f["gate"]))
        v[:3] = a @ v[:3]
        new = u @ np.diag(sigma) @ v
        return new.T if wide else new

    method = SSVD(rank=3, rotation=rotation_, side="smaller", reference_init=True)
    _, start, _ = check(method, shape, weight, 3 + 3 + 1)
    assert not method.exact_start
    assert (start["gate"] == 0).all()
    assert (start["Q"] == 0).all()
    assert (start["C"] != 0).all()


def test_ssvd_of_espnet_draws_its_shift_as_kaiming_uniform():
    model = nn.ModuleDict({"layer": nn.Linear(500, 400)})
    c = tensors(attach(model, SSVD(rank=400, reference_init=True)))["C"] / math.sqrt(6 / 400)
    assert np.abs(c).max() <= 1
    assert np.abs(c).max() > 0.97
    assert abs(c.mean()) < 0.1
    assert abs(c.std() - 1 / math.sqrt(3)) < 0.04


def test_ssvd_rank_as_a_fraction():
    for ratio, k in ((0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)):
        model, _, _ = linear((8, 9))
        assert attach(model, SSVD(rank=None, ratio=ratio)).trainable_count == k * (k + 1) // 2
    for wrong in ({"ratio": 0.0}, {"rotation": "givens"}, {"side": "left"}):
        raises(next(iter(wrong)), lambda wrong=wrong: SSVD(**wrong))


# -- PSOFT ---------------------------------------------------------------------------------------------------


def turned(f: dict[str, Array], r: int, options: dict[str, Any]) -> Array:
    q = lower(f["Q"], r)
    if options.get("bound") and np.linalg.norm(q) > options["bound"]:
        q = q * options["bound"] / np.linalg.norm(q)
    if options.get("rotation") != "neumann":
        return rotation(q)
    terms = options.get("terms", 5)
    return (np.eye(r) + q) @ sum(np.linalg.matrix_power(q, k) for k in range(terms + 1))


@every_shape
@pytest.mark.parametrize("vectors", ["both", "input", "output", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotation": "neumann"}, {"rotation": "neumann", "terms": 2}, {"bound": 0.3}, {"bound": 50.0}],
    ids=str,
)
def test_psoft(shape: Shape, vectors: Any, options: dict[str, Any]):
    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w)
        core = turned(f, 4, options)
        core = np.diag(f.get("beta_vec", np.ones(4))) @ core @ np.diag(f.get("alpha_vec", np.ones(4)))
        tail = u[:, 4:] @ np.diag(s[4:]) @ vh[4:]
        return tail + u[:, :4] @ np.diag(s[:4]) @ core @ vh[:4]

    count = 6 + 4 * {"both": 2, "none": 0}.get(vectors, 1)
    _, start, w = check(PSOFT(rank=4, vectors=vectors, **options), shape, weight, count)
    u, s, vh = triplets(w, 4)
    near(start["L"], u * s)
    near(start["A"], vh)
    assert (start["Q"] == 0).all()
    assert all((start[name] == 1).all() for name in ("alpha_vec", "beta_vec") if name in start)


def test_psoft_without_vectors_keeps_the_principal_singular_values():
    model, w, _ = linear((9, 6))
    adapter = attach(model, PSOFT(rank=4, vectors="none"))
    perturb(adapter)
    u, s, vh = triplets(w)
    new = w + adapter.delta("layer").numpy()
    near(np.linalg.svd(new, compute_uv=False), s)
    near(u[:, 4:].T @ new, np.diag(s[4:]) @ vh[4:])  # and the rest of the weight


@pytest.mark.parametrize("bound", [None, 0.9])
def test_psoft_has_a_gradient_at_the_start(bound: float | None):
    """The norm of Q = 0 has none of its own; the rotation's is that of I + 2Q."""
    model, w, x = linear((6, 9))
    adapter = attach(model, PSOFT(rank=3, bound=bound))
    model["layer"](torch.from_numpy(x)).sum().backward()
    f = adapter.sites["layer"].factors
    u, s, vh = triplets(w, 3)
    g = (u * s).T @ np.ones((6, 4)) @ x @ vh.T  # ∂/∂C
    i, j = np.tril_indices(3, -1)
    near(f.Q.grad, 2 * (g - g.T)[i, j])
    near(f.alpha_vec.grad, np.diag(g))
    near(f.beta_vec.grad, np.diag(g))


def test_psoft_of_rank_one():
    model, _, _ = linear((6, 9))
    raises("rank 1 at layer .6x9.: a rotation of one", lambda: attach(model, PSOFT(rank=1, vectors="none")))

    def weight(f: dict[str, Array], w: Array) -> Array:
        u, s, vh = triplets(w, 1)
        return w + (f["alpha_vec"] * f["beta_vec"] - 1) * (u * s) @ vh

    check(PSOFT(rank=1), (6, 9), weight, 2)
    for wrong in ({"rotation": "givens"}, {"vectors": "left"}, {"terms": 0}, {"bound": 0.0}):
        raises(next(iter(wrong)), lambda wrong=wrong: PSOFT(**wrong))


# -- AntiPaSTO -----------------------------------------------------------------------------------------------


def clamped(values: Array, size: int, angle: float) -> Array:
    limit = 2 * math.tan(angle / 2)
    x = lower(values, size)
    return limit * np.tanh(x / limit) if angle < math.pi else x


def steered(f: dict[str, Array], w: Array, r: int, alpha: float, angle: float, block: int | None = None) -> Array:
    """W'(α) of the paper; U turns by (I − αX/2)⁻¹(I + αX/2), as the official code has it."""
    u, s, vh = triplets(w)
    size = block or r
    rot_v, rot_u, per_block = np.eye(r), np.eye(r), size * (size - 1) // 2
    for b in range(r // size):
        part, values = slice(b * size, (b + 1) * size), slice(b * per_block, (b + 1) * per_block)
        if "Q" in f:
            x = alpha * clamped(f["Q"][values], size, angle) / 2
            rot_v[part, part] = (np.eye(size) - x) @ np.linalg.inv(np.eye(size) + x)
        if "P" in f:
            x = alpha * clamped(f["P"][values], size, angle) / 2
            rot_u[part, part] = np.linalg.inv(np.eye(size) - x) @ (np.eye(size) + x)
    tail = u[:, r:] @ np.diag(s[r:]) @ vh[r:]
    return tail + u[:, :r] @ rot_u @ np.diag(s[:r] + alpha * f["C"]) @ rot_v @ vh[:r]


@every_shape
@pytest.mark.parametrize("rotates", ["V", "U", "both", "none"])
@pytest.mark.parametrize(("block", "angle"), [(None, math.pi / 3), (2, 0.5), (None, math.pi)])
@pytest.mark.parametrize("alpha", [1.0, -0.6])
def test_antipasto(shape: Shape, rotates: Any, block: int | None, angle: float, alpha: float):
    method = AntiPaSTO(rank=4, rotates=rotates, block=block, max_angle=angle, coefficient=alpha)
    count = 4 + (6 if block is None else 2) * {"both": 2, "none": 0}.get(rotates, 1)
    _, start, _ = check(method, shape, lambda f, w: steered(f, w, 4, alpha, angle, block), count, size=0.7)
    assert (start["C"] == 0).all()
    assert all((start[name] == 0).all() for name in ("Q", "P") if name in start)
    assert ("Q" in start, "P" in start) == (rotates in ("V", "both"), rotates in ("U", "both"))


@every_shape
def test_antipasto_of_the_official_code(shape: Shape):
    """Rows V R with R = (I − X)⁻¹(I + X), X = α A/2, and S + α ΔS; it starts off the base."""
    model, w, x = linear(shape)
    adapter = attach(model, AntiPaSTO(rank=4, reference_init=True))
    assert not AntiPaSTO(reference_init=True).exact_start
    for _ in range(2):
        f = tensors(adapter)
        u, s, vh = triplets(w, 4)
        half = clamped(f["Q"], 4, math.pi / 3) / 2
        v_rot = vh.T @ np.linalg.solve(np.eye(4) - half, np.eye(4) + half)
        residual = w - (u * s) @ vh
        near(output(model, x), ((x @ v_rot) * (s + f["C"])) @ u.T + x @ residual.T)
        perturb(adapter)


def test_antipasto_official_start_has_its_size():
    model = nn.ModuleDict({"layer": nn.Linear(500, 400)})
    f = tensors(attach(model, AntiPaSTO(rank=300, reference_init=True, rotates="both")))
    assert abs(f["C"].mean() - 4e-4) < 1e-4
    assert abs(f["C"].std() - 4e-4) < 1e-4
    for name in ("Q", "P"):  # x ~ N(0, 0.003²), X = (x − xᵀ) − (x − xᵀ)ᵀ
        assert abs(f[name].mean()) < 1e-4
        assert abs(f[name].std() - 2 * math.sqrt(2) * 0.003) < 1e-4
    assert np.abs(f["Q"] - f["P"]).max() > 0.01


def test_antipasto_of_lora_lite():
    """The port's R Vᵀ with R = (I − X)⁻¹(I + X) block by block: the other sense of the same angles."""
    model, w, x = linear((9, 8))
    adapter = attach(model, AntiPaSTO(rank=8, block=4, max_angle=0.5))
    perturb(adapter)
    f = tensors(adapter)
    u, s, vh = triplets(w)
    limit, r = 2 * math.tan(0.25), np.zeros((8, 8))
    for b in range(2):
        a = -lower(f["Q"][6 * b : 6 * b + 6], 4)  # their sense
        half = limit * np.tanh(a / limit) / 2
        r[4 * b : 4 * b + 4, 4 * b : 4 * b + 4] = np.linalg.solve(np.eye(4) - half, np.eye(4) + half)
    near(output(model, x), ((x @ (r @ vh).T) * (s + f["C"])) @ u.T)


def test_antipasto_turns_no_further_than_its_angle():
    """Two dimensions, an entry that is driven far out: the angle tends to θ_max and stays below."""
    for angle in (0.5, math.pi / 3, 2.0):
        model, w, _ = linear((6, 9))
        adapter = attach(model, AntiPaSTO(rank=2, max_angle=angle))
        with torch.no_grad():
            adapter.sites["layer"].factors.Q.fill_(100.0)
        u, s, vh = triplets(w, 2)
        turn = (u / s).T @ (w + adapter.delta("layer").numpy()) @ vh.T
        assert abs(math.acos(turn[0, 0]) - angle) < 1e-9


def test_antipasto_blocks_and_ranks():
    model, _, _ = linear((7, 7))
    raises("rank 6 at layer .7x7. is not a multiple of block=4", lambda: attach(model, AntiPaSTO(rank=6, block=4)))
    adapter = attach(model, AntiPaSTO(rank=128, block=4), clip_rank=True)
    assert adapter.sites["layer"].method.rank == 4
    assert adapter.trainable_count == 4 + 6
    small, _, _ = linear((3, 9))
    adapter = attach(small, AntiPaSTO(rank=128, block=4), clip_rank=True)
    assert adapter.sites["layer"].method.rank == 3
    assert adapter.trainable_count == 3 + 3
    for wrong in ({"rotates": "W"}, {"max_angle": 0.0}, {"max_angle": 4.0}, {"coefficient": math.inf}, {"block": 1}):
        raises(next(iter(wrong)), lambda wrong=wrong: AntiPaSTO(**wrong))


# -- all of them ---------------------------------------------------------------------------------------------

FULL = [
    SVF(),
    SVDiff(),
    SVFTransformer2(),
    SVFTransformer2(reference_init=True),
    SVFit(),
    SSVD(rank=None, ratio=1.0),
    PSOFT(rank=None),
    PSOFT(rank=None, vectors="none"),
    AntiPaSTO(rank=None),
]


@pytest.mark.parametrize("method", FULL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_folded_layer_of_full_rank_is_computed_from_its_factors(method: Factored, shape: Shape):
    model, _, x = linear(shape)
    adapter = attach(model, method)
    perturb(adapter)
    expected = model["layer"](torch.from_numpy(x))
    adapter.fold()
    assert adapter.sites["layer"].skips
    close(model["layer"](torch.from_numpy(x)), expected)


@pytest.mark.parametrize("method", [*FULL, LoRAXS(rank=5)], ids=str)
def test_each_matrix_of_a_batch_has_its_own_factors(method: Factored):
    """A grouped convolution is what its groups are apart."""
    torch.manual_seed(0)
    layer = nn.Conv1d(10, 10, 3, groups=2, dtype=torch.float64)
    adapter = attach(nn.ModuleDict({"layer": layer}), method, targets="all")
    perturb(adapter)
    together = adapter.delta("layer").reshape(2, 5, 15)
    for g in range(2):
        one = nn.Linear(15, 5, bias=False, dtype=torch.float64)
        with torch.no_grad():
            one.weight.copy_(layer._parameters["weight"].reshape(2, 5, 15)[g])
        alone = attach(nn.ModuleDict({"layer": one}), method)
        with torch.no_grad():
            for name, p in alone.sites["layer"].factors.named_parameters():
                if p.requires_grad:
                    p.copy_(getattr(adapter.sites["layer"].factors, name)[g])
        close(alone.delta("layer"), together[g])
