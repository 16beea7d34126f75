"""The shared SVD core against NumPy: drivers, signs, fall-backs, structured cores, factor algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import close, differs, equal_bits
from hypothesis import given
from hypothesis import strategies as st
from solvers import another_solver
from torch import Tensor

from svdpeft.decomposition import (
    Product,
    band_count,
    band_index,
    canonical_signs,
    check_matrix,
    check_rank,
    difference,
    exact_rank,
    krylov,
    random_index,
    recompress,
    scatter_core,
    svd,
    top_index,
    truncated_svd,
)
from svdpeft.decomposition.full import by_gram
from svdpeft.decomposition.krylov import leading_triplets

F64 = {"dtype": torch.float64}
SHAPES = [(6, 9), (9, 6), (5, 5), (1, 4), (4, 1), (2, 6, 9), (3, 2, 9, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def check_svd(w: Tensor, found: svd.SVD, rank: int, rtol: float = 1e-10) -> None:
    """Orthonormal bases, NumPy's singular values, and the best rank-r approximation."""
    u, s, vh = (t.numpy() for t in found)
    eye = np.eye(rank)
    np.testing.assert_allclose(np.swapaxes(u, -1, -2) @ u, np.broadcast_to(eye, (*u.shape[:-2], rank, rank)), atol=rtol)
    np.testing.assert_allclose(
        vh @ np.swapaxes(vh, -1, -2), np.broadcast_to(eye, (*u.shape[:-2], rank, rank)), atol=rtol
    )
    bu, bs, bvh = np.linalg.svd(w.double().numpy(), full_matrices=False)
    top = bs[..., :1]
    np.testing.assert_allclose(s / top, bs[..., :rank] / top, atol=rtol)
    best = (bu[..., :rank] * bs[..., None, :rank]) @ bvh[..., :rank, :]
    np.testing.assert_allclose(((u * s[..., None, :]) @ vh) / top[..., None], best / top[..., None], atol=rtol)


@every_shape
@pytest.mark.parametrize("driver", ["auto", "exact", "randomized"])
def test_drivers_on_small_matrices(shape: tuple[int, ...], driver: Any):
    """So small that a basis would span everything: all drivers are exact."""
    w = torch.randn(shape, **F64)
    for rank in {1, min(shape[-2:])}:
        found = truncated_svd(w, rank, driver)
        assert found.u.shape == (*shape[:-1], rank)
        assert found.s.shape == (*shape[:-2], rank)
        assert found.vh.shape == (*shape[:-2], rank, shape[-1])
        check_svd(w, found, rank)
    assert truncated_svd(w).s.shape[-1] == min(shape[-2:])


# -- the randomized driver -----------------------------------------------------------------------------------


def spectrum(values: Tensor, m: int, n: int, *batch: int) -> Tensor:
    """A random matrix with these singular values."""
    u, v = (torch.linalg.qr(torch.randn(*batch, size, len(values), **F64)).Q for size in (m, n))
    return u * values @ v.mT


FLAT = torch.linspace(1, 0.5, 200, **F64)
LARGE = {
    "flat": lambda: spectrum(FLAT, 200, 260),
    "flat, tall": lambda: spectrum(FLAT, 260, 200),
    "a batch": lambda: spectrum(FLAT, 200, 260, 2),
    "noise": lambda: torch.randn(300, 400, **F64),
    "decaying": lambda: spectrum(0.8 ** torch.arange(200, **F64), 200, 230),
    "clusters wider than a block": lambda: spectrum(
        torch.tensor([3.0] * 25 + [2.0] * 40 + [1.0] * 200, **F64), 280, 265
    ),
    "orthogonal": lambda: torch.linalg.qr(torch.randn(250, 250, **F64)).Q,
    "of rank three": lambda: spectrum(torch.tensor([3.0, 2.0, 1.0], **F64), 240, 200),
    "a zero beside others": lambda: torch.stack([torch.randn(200, 220, **F64), torch.zeros(200, 220, **F64)]),
    "diagonal": lambda: torch.diag(torch.linspace(1, 0.1, 220, **F64)),
    "one row holds all": lambda: torch.zeros(220, 240, **F64).index_fill_(0, torch.tensor(7), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("name", LARGE)
def test_randomized_beside_lapack(name: str, rank: int, dtype: torch.dtype):
    """Each value to ACCURACY, of bases that are orthonormal, and nearly the best approximation."""
    w = LARGE[name]().to(dtype)
    state = torch.get_rng_state()
    u, s, vh = found = truncated_svd(w, rank, "randomized", seed=3)
    assert all(t.dtype == dtype for t in found)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert all(equal_bits(a, b) for a, b in zip(found, truncated_svd(w, rank, "randomized", seed=3), strict=True))
    exact = torch.linalg.svdvals(w.double())
    rounding = 20 * torch.finfo(dtype).eps
    off = (s - exact[..., :rank]).abs()
    assert bool((off <= krylov.ACCURACY * exact[..., :rank] + rounding * exact[..., :1]).all())
    eye = torch.eye(rank, dtype=dtype)
    for q in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(q, eye.expand_as(q), rtol=0, atol=max(rounding, 1e-12))
    left, best = ((w - u * s.unsqueeze(-2) @ vh).double().square().sum((-2, -1)), exact[..., rank:].square().sum(-1))
    assert bool((left <= (1 + krylov.ACCURACY) * best + (rounding * exact[..., 0]).square() * w.numel()).all())


def test_the_randomized_driver_needs_a_seed_and_few_columns(monkeypatch: pytest.MonkeyPatch):
    w = torch.randn(300, 400, **F64)
    assert not torch.equal(truncated_svd(w, 10, "randomized").u, truncated_svd(w, 10, "randomized", seed=1).u)
    products = []
    normal = krylov._normal
    monkeypatch.setattr(krylov, "_normal", lambda w, x: products.append(x.shape[-2]) or normal(w, x))
    assert leading_triplets(w, 10, 0) is not None
    assert sum(products) < 0.6 * 300
    products.clear()
    assert leading_triplets(w, 120, 0) is None, "a basis that large is no cheaper"
    assert not products
    close(truncated_svd(w, 120, "randomized").s, torch.linalg.svdvals(w)[:120])


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (2, 300, 400)], ids=str)
def test_the_slow_twin_of_the_randomized_driver(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Every block against every other, VᵀAV multiplied out: the same basis, values and vectors."""
    w, bases = torch.randn(*shape, **F64), []
    found = krylov._found
    monkeypatch.setattr(krylov, "_found", lambda w, vt, *rest: bases.append(vt.clone()) or found(w, vt, *rest))
    u, s, vh = leading_triplets(w, 10, 0)  # type: ignore[misc]
    (vt,) = bases
    w = w if w.shape[-2] >= w.shape[-1] else w.mT
    gram = w.mT @ w
    x = gram @ torch.randn(gram.shape[-1], krylov.BLOCK, generator=torch.Generator().manual_seed(0)).double()
    v = torch.linalg.qr(x).Q
    while v.shape[-1] < vt.shape[-2]:
        x = gram @ v[..., -krylov.BLOCK :]
        for _ in range(3):
            x = torch.linalg.qr(x - v @ (v.mT @ x)).Q
        v = torch.cat([v, x], -1)
    close(vt.mT @ vt, v @ v.mT)
    values, turn = torch.linalg.eigh(v.mT @ gram @ v)
    close(s, values[..., -10:].flip(-1).sqrt())
    q = (v @ turn)[..., -10:]
    right = vh if shape[-2] >= shape[-1] else u.mT
    close(right.mT @ right, q @ q.mT)


def test_more_accuracy_takes_more_columns(monkeypatch: pytest.MonkeyPatch):
    """It is the error that stops it, and no count."""
    w, off = LARGE["noise"](), []
    exact = torch.linalg.svdvals(w)[:8]
    for accuracy in (1e-1, 1e-3, 1e-5):
        monkeypatch.setattr(krylov, "ACCURACY", accuracy)
        off.append(float(((exact - truncated_svd(w, 8, "randomized").s) / exact).max()))
        assert off[-1] < accuracy
    assert off[0] > off[1] > off[2]


def test_auto_takes_the_cheap_driver_only_for_few_triplets_of_large_matrices(monkeypatch: pytest.MonkeyPatch):
    called = []
    monkeypatch.setattr(svd, "leading_triplets", lambda w, *_: called.append(tuple(w.shape)))
    w = torch.eye(264)
    truncated_svd(w, 23)
    truncated_svd(w[:255], 1)
    assert not called
    truncated_svd(w, 22)
    assert called == [(264, 264)]
    truncated_svd(w[:8, :8], 1, "randomized")
    truncated_svd(w, 8, "exact")
    assert called == [(264, 264), (8, 8)]


# -- dtypes, signs, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(dtype: torch.dtype):
    w = torch.randn(7, 12).to(dtype)
    found = truncated_svd(w, 4)
    assert {t.dtype for t in found} == {torch.float32}
    assert all(equal_bits(a, b) for a, b in zip(found, truncated_svd(w.float(), 4), strict=True))
    check_svd(w, found, 4, rtol=1e-5)


def test_result_is_contiguous_detached_and_leaves_the_weight_alone():
    w = torch.randn(6, 9, requires_grad=True)
    before = w.detach().clone()
    found = truncated_svd(w, 2)
    assert all(t.is_contiguous() and not t.requires_grad for t in found)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in found)
    assert equal_bits(w, before)


@every_shape
def test_signs_are_canonical(shape: tuple[int, ...]):
    w = torch.randn(shape, **F64)
    u, s, vh = truncated_svd(w)
    assert bool((u.gather(-2, u.abs().argmax(-2, keepdim=True)) > 0).all())
    rank = s.shape[-1]
    flips = torch.tensor([(-1.0) ** i for i in range(rank)], **F64)
    again = canonical_signs(u * flips, vh * flips[:, None])
    assert torch.equal(again[0], u)
    assert torch.equal(again[1], vh)
    negated = truncated_svd(-w)
    close(negated.u, u)
    close(negated.vh, -vh)


@pytest.mark.parametrize(
    ("w", "rank", "words"),
    [
        (torch.ones(3, 4, dtype=torch.int64), 1, "dtype torch.int64: only floating-point weights"),
        (torch.ones(3, 4, dtype=torch.bool), 1, "torch.bool"),
        (torch.ones(3, 4, dtype=torch.complex64), 1, "torch.complex64"),
        (torch.ones(3), 1, r"shape \(3\): a non-empty matrix"),
        (torch.ones(0, 4), 1, r"shape \(0x4\)"),
        (torch.ones(2, 3, 4, device="meta"), 1, r"\(2x3x4\) is on the meta device"),
        (torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]), 1, r"\(2x2\) holds 2 NaN or infinite values of 4"),
        (torch.tensor([[1.0, -float("inf")]]), 1, "holds 1 NaN"),
        (torch.zeros(3, 4), 1, "is all zero"),
        (torch.ones(3, 4), 0, r"rank 0 is outside \[1, 3\]"),
        (torch.ones(3, 4), 4, r"rank 4 is outside \[1, 3\]"),
        (torch.ones(3, 4), -1, "rank -1 is outside"),
        (torch.ones(3, 4), 1.5, "rank 1.5"),
        (torch.ones(3, 4), True, "rank True"),
    ],
    ids=lambda v: None if isinstance(v, Tensor) else str(v)[:20],
)
def test_bad_input_names_the_site(w: Tensor, rank: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        truncated_svd(w, rank, where="blocks.3.attn.proj")
    assert "blocks.3.attn.proj" in str(caught.value)


def test_unknown_driver():
    with pytest.raises(ValueError, match="'fast' is not one of auto, exact, randomized"):
        truncated_svd(torch.eye(3), 1, "fast")  # type: ignore[arg-type]


def test_zero_weight_passes_where_it_is_not_decomposed():
    check_matrix(torch.zeros(3, 4), "here", zero=True)
    with pytest.raises(ValueError, match="NaN"):
        check_matrix(torch.tensor([[float("nan")]]), "here", zero=True)
    assert check_rank(2, 3, 4, "here") == 2


@pytest.mark.parametrize("driver", ["exact", "randomized"])
def test_a_zero_matrix_within_a_batch_is_fine(driver: Any):
    w = torch.randn(3, 5, 8, **F64)
    w[1] = 0
    found = truncated_svd(w, 3, driver)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert bool((found.s[1] == 0).all())
    check = truncated_svd(w[[0, 2]], 3, "exact")
    close(found.u[[0, 2]], check.u)
    eye = torch.eye(3, **F64)
    close(found.u[1].mT @ found.u[1], eye)
    close(found.vh[1] @ found.vh[1].mT, eye)


# -- the solver's choice -------------------------------------------------------------------------------------


def matrix(values: list[float], m: int, n: int, batch: tuple[int, ...] = ()) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(*batch, size, size, **F64)).Q[..., : len(values)] for size in (m, n))
    return u * torch.tensor(values, **F64) @ v.mT


DEGENERATE = {
    "all different": lambda: torch.randn(6, 9, **F64),
    "the identity": lambda: torch.eye(7, **F64),
    "a permutation with signs": lambda: torch.eye(6, **F64)[torch.randperm(6)] * torch.tensor([1, -1, 1, 1, -1, 1]),
    "orthogonal": lambda: torch.linalg.qr(torch.randn(8, 8, **F64)).Q,
    "two clusters": lambda: matrix([3.0, 3.0, 2.0, 1.0, 1.0, 1.0], 8, 6),
    "a wide one": lambda: matrix([3.0, 3.0, 2.0, 1.0, 1.0, 1.0], 6, 9),
    "of rank three, tall": lambda: matrix([3.0, 2.0, 2.0], 9, 6),
    "of rank one": lambda: torch.ones(5, 4, **F64),
    "entries of equal size": lambda: torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [2, 2, -2, -2]], **F64),
    "the same twice": lambda: torch.block_diag(*[torch.randn(1, 3, 4, **F64)[0]] * 2),
    "a batch": lambda: matrix([2.0, 2.0, 1.0, 1.0], 6, 5, (3,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("driver", ["exact", "randomized"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_factors_do_not_depend_on_the_solver(name: str, driver: Any, dtype: torch.dtype, monkeypatch: Any):
    w = DEGENERATE[name]().to(dtype)
    expected = truncated_svd(w, None, driver)
    check_svd(w, expected, min(w.shape[-2:]), rtol=1e-10 if dtype == torch.float64 else 2e-6)
    assert bool((expected.u.gather(-2, expected.u.abs().argmax(-2, keepdim=True)) != 0).all())
    for seed in range(3):
        with monkeypatch.context() as patch:
            another_solver(patch, seed)
            found = truncated_svd(w, None, driver)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-7 if dtype == torch.float32 else 1e-11)


# -- the solvers ---------------------------------------------------------------------------------------------

SPECTRA = {
    "even": torch.linspace(1, 0.1, 12, **F64),
    "over twelve orders": 10.0 ** -torch.arange(12, **F64),
    "small ones beside equal ones": torch.tensor([1.0] * 4 + [1e-3] * 4 + [1e-7] * 4, **F64),
    "of rank five": torch.tensor([1.0, 0.5, 0.1, 1e-3, 1e-5] + [0.0] * 7, **F64),
    "at the split": torch.tensor([1.0, *torch.linspace(0.0101, 0.0099, 11, **F64)], **F64),
}


@pytest.mark.parametrize("driver", ["randomized", "exact"])
@pytest.mark.parametrize("shape", [(512, 512), (600, 300), (300, 600)])
def test_where_a_weight_lies_in_memory_changes_no_bit(shape: tuple[int, int], driver: Any):
    """As a tensor of a file that is mapped does, whose place is no multiple of what products want."""
    w = torch.randn(*shape, dtype=torch.float32)
    expected = truncated_svd(w, 2, driver)
    for shift in (1, 2, 5):
        there = torch.empty(w.numel() + shift)[shift:].view(shape).copy_(w)
        assert there.data_ptr() % 64
        assert all(map(torch.equal, truncated_svd(there, 2, driver), expected))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_gram_matrix_finds_what_lapack_finds(name: str, shape: tuple[int, int]):
    """Absolute errors are those of float64, for small values, too; and so float32 bases are right to the last digit."""
    w = spectrum(SPECTRA[name], *shape)
    u, s, vh = by_gram(w)
    assert bool((s[:-1] >= s[1:]).all())
    torch.testing.assert_close(s, torch.linalg.svdvals(w), rtol=0, atol=2e-14)
    torch.testing.assert_close(u * s @ vh, w, rtol=0, atol=2e-14)
    known = int((SPECTRA[name] > 0).sum())
    for q in (u[:, :known].mT @ u[:, :known], vh[:known] @ vh[:known].mT):
        torch.testing.assert_close(q, torch.eye(known, **F64), rtol=0, atol=1e-10)
    rounded = truncated_svd(w.float())
    for q in (rounded.u.mT @ rounded.u, rounded.vh @ rounded.vh.mT):
        torch.testing.assert_close(q, torch.eye(12), rtol=0, atol=5e-7)
    torch.testing.assert_close(rounded.u * rounded.s @ rounded.vh, w.float(), rtol=0, atol=5e-7)


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.dtype]:
    """One of torch's solvers never converges; returns the dtypes that it was asked for."""
    asked = []

    def solve(w: Tensor, **_: Any) -> Any:
        asked.append(w.dtype)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, name, solve)
    return asked


@every_shape
@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, "eigh"), (torch.float64, "svd")], ids=str)
def test_where_a_solver_fails_the_other_one_is_tried(
    shape: tuple[int, ...], dtype: torch.dtype, first: str, monkeypatch: pytest.MonkeyPatch
):
    w = torch.randn(shape, dtype=dtype)
    asked = failing(monkeypatch, first)
    found = truncated_svd(w)
    assert asked == [torch.float64]
    monkeypatch.undo()
    check_svd(w, found, min(shape[-2:]), rtol=1e-8 if dtype == torch.float64 else 1e-6)
    assert bool((found.s[..., :-1] >= found.s[..., 1:]).all())
    assert bool((found.s >= 0).all())


def test_no_solver_left_names_the_site(monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "eigh", never)
    with pytest.raises(ValueError, match=r"no solver could decompose blocks.1 \(2x3\), largest entry 1"):
        truncated_svd(torch.ones(2, 3), where="blocks.1")


# -- cores ---------------------------------------------------------------------------------------------------


@given(
    rank=st.integers(1, 7),
    count=st.integers(1, 12),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 99),
)
def test_scatter_core_adds_up(rank: int, count: int, batch: list[int], seed: int):
    torch.manual_seed(seed)
    values = torch.randn(*batch, count, **F64)
    for index in (torch.randint(rank * rank, (count,)), torch.randint(rank * rank, (*batch, count))):
        expected = np.zeros((*batch, rank, rank))
        for b in np.ndindex(*batch):
            for k in range(count):
                position = int(index.expand(*batch, count)[b][k])
                expected[(*b, position // rank, position % rank)] += float(values[b][k])
        close(scatter_core(values, index, rank), torch.from_numpy(expected))


def test_scatter_core_is_differentiable():
    values = torch.randn(2, 5, **F64, requires_grad=True)
    index = torch.tensor([0, 3, 3, 7, 8])
    assert torch.autograd.gradcheck(lambda v: scatter_core(v, index, 3), values)


@given(rank=st.integers(1, 30), d=st.integers(0, 40))
def test_band(rank: int, d: int):
    index = band_index(rank, d)
    assert set(index.tolist()) == {i * rank + j for i in range(rank) for j in range(rank) if abs(i - j) <= d}
    assert len(index) == band_count(rank, d) == len(set(index.tolist()))
    assert torch.equal(index, index.sort().values)


@given(rank=st.integers(1, 20), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_random_index(rank: int, seed: int, share: float):
    count = max(1, int(share * rank * rank))
    found = random_index(rank, count, torch.Generator().manual_seed(seed))
    assert len(set(found.tolist())) == count
    assert 0 <= int(found.min()) <= int(found.max()) < rank * rank
    assert torch.equal(found, random_index(rank, count, torch.Generator().manual_seed(seed)))


def test_top_index():
    score = torch.rand(3, 5, 5)
    index = top_index(score, 7)
    for b in range(3):
        assert set(index[b].tolist()) == set(np.argsort(-score[b].numpy().ravel())[:7].tolist())
        assert torch.equal(index[b], index[b].sort().values)


# -- products ------------------------------------------------------------------------------------------------


def core_of(form: str, batch: list[int], r: int) -> Tensor | None:
    shape = {"none": None, "diagonal": (*batch, r), "matrix": (*batch, r, r)}[form]
    return None if shape is None else torch.randn(shape, **F64)


FORMS = st.sampled_from(["none", "diagonal", "matrix"])
BATCH = st.lists(st.integers(1, 2), max_size=2)


@given(m=st.integers(1, 8), n=st.integers(1, 8), r=st.integers(1, 5), form=FORMS, batch=BATCH, seed=st.integers(0, 99))
def test_product_algebra(m: int, n: int, r: int, form: str, batch: list[int], seed: int):
    torch.manual_seed(seed)
    p = Product(torch.randn(*batch, m, r, **F64), core_of(form, batch, r), torch.randn(*batch, r, n, **F64), scale=0.7)
    full = (
        torch.eye(r, **F64).expand(*batch, r, r)
        if p.C is None
        else torch.diag_embed(p.C)
        if form == "diagonal"
        else p.C
    )
    dense = 0.7 * p.L @ full @ p.A
    close(p.dense(), dense)
    assert p.rank == r
    small = recompress(p)
    close(small.dense(), dense)
    ranks = torch.linalg.matrix_rank(dense, rtol=1e-9)
    assert torch.equal(exact_rank(p), ranks)
    assert small.rank == max(1, int(ranks.max())) <= min(m, n, r)
    close(small.L.mT @ small.L, small.A @ small.A.mT)


def test_recompress_drops_what_the_tolerance_says_and_keeps_the_dtype():
    q, k = torch.linalg.qr(torch.randn(9, 4)).Q, torch.linalg.qr(torch.randn(7, 4)).Q.mT
    p = Product(q, torch.tensor([1.0, 0.1, 1e-3, 1e-9]), k)
    assert recompress(p).rank == 3  # 1e-9 is below float32's noise
    assert recompress(p, 1e-2).rank == 2
    assert recompress(p, 0.0).rank == 4
    assert recompress(p).L.dtype == recompress(p).A.dtype == torch.float32
    assert int(exact_rank(p, 1e-2)) == 2
    zero = Product(torch.zeros(3, 2), None, torch.randn(2, 4))
    assert recompress(zero).rank == 1
    assert bool((recompress(zero).dense() == 0).all())
    assert int(exact_rank(zero)) == 0


@given(
    form=FORMS,
    moved=st.sets(st.sampled_from("LCA")),
    batch=BATCH,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_difference(form: str, moved: set[str], batch: list[int], dtype: torch.dtype):
    """Right, of rank r where one outer factor is shared, and bitwise zero where nothing moved."""
    m, n, r = 6, 8, 2
    core = core_of(form, batch, r)
    start = Product(
        torch.randn(*batch, m, r).to(dtype),
        None if core is None else core.to(dtype),
        torch.randn(*batch, r, n).to(dtype),
        scale=1.5,
    )
    copies = {k: t if t is None or k not in moved else t.clone() for k, t in zip("LCA", start[:3], strict=True)}
    still = difference(Product(**copies, scale=1.5), start)
    assert bool((still.dense() == 0).all())
    one_side = "A" not in moved or not moved & {"L", "C"}
    assert still.rank == (r if one_side or (form == "none" and "L" not in moved) else 2 * r)
    now = Product(
        **{k: t if t is None or k not in moved else t + torch.randn(t.shape).to(t) for k, t in copies.items()},
        scale=1.5,
    )
    found, wanted = (
        difference(now, start).to(torch.float64).dense(),
        now.to(torch.float64).dense() - start.to(torch.float64).dense(),
    )
    if dtype == torch.float64:
        close(found, wanted)
    else:
        size = sum(
            Product(*(None if t is None else t.double().abs() for t in p[:3]), 1.5).dense() for p in (now, start)
        )
        assert bool(((found - wanted).abs() <= 8 * torch.finfo(dtype).eps * size).all())


def test_difference_keeps_a_small_step_in_low_precision():
    """One unit in the last place of every entry: [LC | −L₀C₀][A ; A₀] would round it away, this form is exact."""
    start = Product(torch.randn(16, 2).bfloat16(), None, torch.randn(2, 16).bfloat16())
    ulp = 2.0**-8
    now = Product((start.L.float() * (1 + ulp)).bfloat16(), None, (start.A.float() * (1 + ulp)).bfloat16())
    wanted = now.to(torch.float64).dense() - start.to(torch.float64).dense()
    assert differs(wanted, torch.zeros_like(wanted))
    assert torch.linalg.matrix_norm(difference(now, start).to(torch.float64).dense() - wanted) < 1e-12
