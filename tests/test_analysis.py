"""Spectra and their drift: closed forms, and the plain formula with plain SVDs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from svdpeft.analysis import (
    assign,
    condition_number,
    drift,
    effective_rank,
    energy,
    energy_rank,
    intruders,
    stable_rank,
    subspace_drift,
    update_overlap,
)
from svdpeft.analysis.measures import change_of, principal_rank, spectrum_of
from svdpeft.analysis.spectra import decompose
from svdpeft.decomposition import SVD


def svd(w):
    return decompose(torch.as_tensor(w, dtype=torch.float64), "the weight")


def moved(a, b):
    """ΔΣ, ΔD, ΔΣ and ΔD assigned, as numbers."""
    return [float(x) for x in drift(svd(a), svd(b))]


def orthogonal(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q


def rotation(size, i, j, angle):
    turn = torch.eye(size, dtype=torch.float64)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def diagonal(*values, rows=None):
    w = torch.diag(torch.tensor(values, dtype=torch.float64))
    return w if rows is None else torch.nn.functional.pad(w, (0, 0, 0, rows - len(values)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- one spectrum -------------------------------------------------------------------------------------------------


def test_spectrum_of_a_known_one():
    s = torch.tensor([[4.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    p = np.array([0.5, 0.25, 0.25])
    assert float(effective_rank(s)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert float(stable_rank(s)) == 24 / 16
    assert float(condition_number(s, 3)) == 2
    assert float(condition_number(s)) == float("inf")
    assert energy(s).tolist() == [[16 / 24, 20 / 24, 1.0, 1.0]]
    assert [int(energy_rank(s, share)) for share in (0.5, 16 / 24, 0.7, 0.9, 1.0)] == [1, 1, 2, 3, 3]


def test_spectrum_of_equal_and_of_single_values():
    equal, single = torch.ones(7, dtype=torch.float64), diagonal(3.0, 0.0, 0.0).diagonal()
    assert float(effective_rank(equal)) == pytest.approx(7)
    assert float(stable_rank(equal)) == 7
    assert int(energy_rank(equal)) == 7
    assert float(effective_rank(single)) == float(stable_rank(single)) == int(energy_rank(single)) == 1


def test_a_matrix_of_zeros_has_rank_zero():
    values = {name: value.tolist() for name, value in spectrum_of(torch.zeros(1, 3), 0.9).items()}
    assert values["effective_rank"] == values["stable_rank"] == values["energy_rank"] == values["sigma_max"] == [0.0]
    assert np.isnan(values["condition"])


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_an_energy_that_makes_no_sense_is_refused(share):
    with pytest.raises(ValueError, match=rf"{share} is outside \(0, 1\]"):
        energy_rank(torch.ones(2), share)


def test_every_share_of_energy_is_reached_whatever_the_rounding():
    s = torch.rand(500, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    assert int(energy_rank(s, 1.0)) <= 500
    exact = s.double().square().cumsum(0) / s.double().square().sum()
    for share in (0.1, 0.5, 0.9, 0.99):
        assert int(energy_rank(s, share)) == int((exact < share).sum()) + 1
    equal = torch.full((10,), 0.1, dtype=torch.float64)  # each is a tenth, and none of the sums is r/10
    assert [int(energy_rank(equal, r / 10)) for r in range(1, 11)] == list(range(1, 11))


# -- ΔΣ and ΔD ----------------------------------------------------------------------------------------------------


def test_nothing_moves_where_nothing_changes():
    w = random(7, 5)
    assert moved(w, w) == pytest.approx([0, 0, 0, 0], abs=1e-14)


def test_scaling_changes_values_and_no_vector():
    w = random(5, 8)
    size = float(svd(w).s.mean())
    assert moved(w, 1.3 * w) == pytest.approx([0.3 * size, 0, 0.3 * size, 0], abs=1e-12)
    assert moved(w, -w) == pytest.approx([0, 0, 0, 0], abs=1e-12)  # signs do not count


@pytest.mark.parametrize("angle", [0.1, 0.7])
def test_a_rotation_of_the_left_vectors_by_a_known_angle(angle):
    """Of 3 left vectors two turn by the angle: ΔD = ½ · ⅔ (1 − cos)."""
    w = diagonal(5.0, 3.0, 1.0)
    expected = (1 - np.cos(angle)) / 3
    assert moved(w, rotation(3, 0, 1, angle) @ w) == pytest.approx([0, expected, 0, expected], abs=1e-12)
    assert moved(w, w @ rotation(3, 0, 2, angle)) == pytest.approx([0, expected, 0, expected], abs=1e-12)
    both = rotation(3, 0, 1, angle) @ w @ rotation(3, 1, 2, angle)
    assert moved(w, both)[1] == pytest.approx(2 * expected, abs=1e-12)


def test_a_rotation_by_a_right_angle_is_as_far_as_it_gets():
    w = torch.zeros(4, 2, dtype=torch.float64)
    w[0, 0], w[1, 1] = 3, 2
    other = torch.zeros(4, 2, dtype=torch.float64)
    other[2, 0], other[3, 1] = 3, 2  # both left vectors leave, the right ones stay
    assert moved(w, other) == pytest.approx([0, 0.5, 0, 0.5])


def test_crossing_values_jump_by_index_and_not_by_assignment():
    u, v = orthogonal(5, 1), orthogonal(5, 2)
    before = u @ diagonal(5.0, 3.1, 3.0, 2.0, 1.0) @ v
    after = u @ diagonal(5.0, 3.0, 3.1, 2.0, 1.0) @ v
    sigma, by_index, sigma_assigned, assigned = moved(before, after)
    assert sigma == pytest.approx(0, abs=1e-12)
    assert by_index == pytest.approx(2 / 5)
    assert sigma_assigned == pytest.approx(0.2 / 5)
    assert assigned == pytest.approx(0, abs=1e-12)


def test_a_path_through_a_crossing_is_continuous_by_assignment():
    u, v = orthogonal(6, 1), orthogonal(4, 2)
    start = u[:, :4] @ diagonal(4.0, 3.0, 2.0, 1.0) @ v
    found = []
    for t in torch.linspace(0, 1, 41, dtype=torch.float64):
        turned = rotation(6, 4, 5, float(t)) @ u
        found.append(moved(start, turned[:, :4] @ diagonal(4.0, 3.0 - 1.5 * t, 2.0 + 0.6 * t, 1.0) @ v))
    jump = np.abs(np.diff(np.array(found), axis=0)).max(0)
    assert jump[1] > 0.4  # by index
    assert jump[3] < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_the_values_is_found_again(seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(9, generator=g)
    values = torch.linspace(1, 9, 9, dtype=torch.float64).flip(0)
    u, v = orthogonal(9, seed), orthogonal(11, seed + 10)[:9]
    before, after = svd(u @ torch.diag(values) @ v), svd(u @ torch.diag(values[order]) @ v)
    found = drift(before, after)
    assert float(found.delta_d_assigned) == pytest.approx(0, abs=1e-12)
    assert float(found.delta_sigma_assigned) == pytest.approx(float((values - values[order]).abs().mean()))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (3, 8, 5), (2, 2, 4, 7), (4, 1, 9)])
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_the_plain_formula(shape, size):
    a, b = random(*shape), random(*shape) + size * random(*shape, seed=1)
    found = drift(svd(a), svd(b))
    flat = [x.reshape(-1) for x in found]
    for i, (w, w1) in enumerate(
        zip(a.reshape(-1, *shape[-2:]).numpy(), b.reshape(-1, *shape[-2:]).numpy(), strict=True)
    ):
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        u1, s1, vh1 = np.linalg.svd(w1, full_matrices=False)
        left, right = np.abs(u.T @ u1), np.abs(vh @ vh1.T)
        rows, columns = linear_sum_assignment(left * right, maximize=True)
        expected = (
            np.abs(s - s1).mean(),
            1 - (np.diag(left).mean() + np.diag(right).mean()) / 2,
            np.abs(s - s1[columns]).mean(),
            1 - (left[rows, columns].mean() + right[rows, columns].mean()) / 2,
        )
        assert [float(x[i]) for x in flat] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("size", [0.0, 0.02, 0.1, 0.5, 5.0])
def test_the_short_cut_of_the_assignment_is_optimal(size):
    """From pairs that are all sure to none that is."""
    a = random(40, 40)
    left = svd(a).u.mT @ svd(a + size * random(40, 40, seed=1)).u
    right = orthogonal(40).mT @ (torch.linalg.matrix_exp(size * (left - left.mT) / 9) @ orthogonal(40))
    overlap = (left * right).abs()
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    order = assign(overlap)
    assert sorted(order.tolist()) == list(range(40))
    assert float(overlap[torch.arange(40), order].sum()) == pytest.approx(overlap.numpy()[rows, columns].sum())


# -- what equal singular values leave open ------------------------------------------------------------------------


def test_equal_values_have_no_vectors_of_their_own():
    """W0 = Q and W' = Q (I + E): any basis is a singular basis of W0, and the assignment takes the nearest."""
    q = orthogonal(6)
    spread = q @ torch.diag(1 + 0.1 * torch.arange(6, dtype=torch.float64))
    turned = orthogonal(6, 3)
    other = q @ turned @ torch.diag(1 + 0.1 * torch.arange(6, dtype=torch.float64)) @ turned.mT
    for after in (spread, other):
        assert moved(q, after)[3] == pytest.approx(0, abs=1e-10)
        assert moved(after, q)[3] == pytest.approx(0, abs=1e-10)
        start, now = svd(q), svd(after)  # by index the vectors are those that the SVD happened to give
        cosines = [(start.u * now.u).sum(0).abs().mean(), (start.vh * now.vh).sum(1).abs().mean()]
        assert moved(q, after)[1] == pytest.approx(1 - float(sum(cosines)) / 2)
        assert moved(q, after)[1] > 0.2


def test_a_cluster_that_changes_its_place_is_followed():
    """The pair of equal values falls below the next one, and splits along other vectors."""
    u, v, turn = orthogonal(5, 1), orthogonal(5, 2), rotation(5, 1, 2, 0.6)
    before = u @ diagonal(3.0, 2.0, 2.0, 1.0, 0.5) @ v
    after = u @ turn @ diagonal(3.0, 0.9, 0.8, 1.0, 0.5) @ turn.mT @ v
    assert moved(before, after)[3] == pytest.approx(0, abs=1e-10)
    assert moved(before, after)[1] > 0.4


def test_null_vectors_are_any_that_are_orthogonal_to_the_rest():
    u, v = orthogonal(7, 1), orthogonal(5, 2)
    before = u[:, :3] @ diagonal(3.0, 2.0, 1.0) @ v[:3]
    after = before + u[:, 3:5] @ diagonal(0.4, 0.2) @ v[3:]  # along a null space that is larger on the left
    assert moved(before, after)[3] == pytest.approx(0, abs=1e-5)
    assert moved(after, before)[3] == pytest.approx(0, abs=1e-5)
    leaves = before + u[:, :1] @ v[4:] * 0.5  # and this is a real turn
    assert moved(before, leaves)[3] > 1e-3


def test_a_single_null_vector_is_open_too():
    u, v = orthogonal(7, 1), orthogonal(4, 2)
    before = u[:, :4] @ diagonal(3.0, 2.0, 1.0, 0.0) @ v
    after = u[:, [0, 1, 2, 6]] @ diagonal(3.0, 2.0, 1.0, 0.3) @ v  # another one of the four on the left
    assert moved(before, after)[3] == pytest.approx(0, abs=1e-5)


def test_a_weight_of_zeros_has_no_direction_to_lose():
    w = random(6, 4)
    sigma, _, _, assigned = moved(torch.zeros(6, 4), w)
    assert sigma == pytest.approx(float(svd(w).s.mean()))
    assert assigned == pytest.approx(0, abs=1e-5)


def test_turning_equal_values_leaves_a_valid_basis():
    """ΔD stays within [0, 1] and never above what the index says, whatever is degenerate."""
    for seed in range(5):
        u, v = orthogonal(8, seed), orthogonal(6, seed + 9)
        w = u[:, :6] @ diagonal(2.0, 2.0, 1.0, 1.0, 0.0, 0.0) @ v
        after = w + 0.2 * random(8, 6, seed=seed)
        _, index, _, assigned = moved(w, after)
        assert 0 <= assigned <= index + 1e-12


def test_a_turn_within_the_leading_subspace_is_no_drift_of_it():
    w = diagonal(3.0, 2.9, 1.0, 0.5)
    turned = rotation(4, 0, 1, 0.7) @ w
    assert float(subspace_drift(svd(w), svd(turned), 2)) == pytest.approx(0, abs=1e-12)
    assert float(subspace_drift(svd(w), svd(turned), 1)) == pytest.approx((1 - np.cos(0.7) ** 2) / 2, abs=1e-9)
    gone = rotation(4, 1, 2, 0.3) @ w
    assert float(subspace_drift(svd(w), svd(gone), 2)) == pytest.approx(np.sin(0.3) ** 2 / 4, abs=1e-9)


# -- what entered, and where --------------------------------------------------------------------------------------


def test_intruders_are_counted_among_the_leading_vectors():
    w = diagonal(*torch.linspace(2, 1, 12).tolist())
    new = torch.ones(12, 1, dtype=torch.float64) / np.sqrt(12)
    plus = w + 40 * new @ random(1, 12, seed=3) / 12
    assert int(intruders(svd(w), svd(w))) == 0
    turned = svd(w)
    assert int(intruders(svd(w), SVD(-turned.u, turned.s, -turned.vh))) == 0, "a sign is no direction"
    assert int(intruders(svd(w), svd(plus))) >= 1
    assert int(intruders(svd(w), svd(plus), epsilon=0.0)) == 0
    u, u1 = np.linalg.svd(w.numpy())[0], np.linalg.svd(plus.numpy())[0]
    for k in (1, 4, 10):
        for epsilon in (0.3, 0.5, 0.8):
            expected = sum(np.abs(u.T @ u1[:, j]).max() < epsilon for j in range(k))
            assert int(intruders(svd(w), svd(plus), k, epsilon)) == expected


def test_overlap_of_an_update_along_and_across():
    w = diagonal(4.0, 3.0, 2.0, 1.0)
    along, across = diagonal(1.0, 0.5, 0.0, 0.0), diagonal(0.0, 0.0, 0.5, 0.1)
    assert [float(x) for x in update_overlap(svd(w), along, 2)] == pytest.approx([1, 1, np.sqrt(1.25) / np.hypot(4, 3)])
    assert [float(x) for x in update_overlap(svd(w), across, 2)] == pytest.approx(
        [0, 0, np.sqrt(0.26) / np.hypot(2, 1)], abs=1e-9
    )
    one = update_overlap(svd(w), across @ rotation(4, 0, 2, np.pi / 2), 1)
    assert [float(one.left), float(one.right)] == pytest.approx([0, 1], abs=1e-9)


def test_overlap_counts_no_direction_that_the_update_does_not_have():
    """ΔW of rank 1 asked for 3: the noise beyond its rank is left out."""
    w, update = random(9, 7), 0.01 * random(9, 1, seed=1) @ random(1, 7, seed=2)
    found, asked = update_overlap(svd(w), update, 3), update_overlap(svd(w), update, 1)
    for a, b in zip(found, asked, strict=True):
        torch.testing.assert_close(a, b)
    assert all(np.isnan(float(x)) for x in update_overlap(svd(w), 0 * update, 3))


def test_overlap_is_the_papers_formula():
    w, update = random(3, 12, 9), random(3, 12, 9, seed=1)
    found = update_overlap(svd(w), update, 4)
    for i in range(3):
        u, _, vh = np.linalg.svd(w[i].numpy(), full_matrices=False)
        u1, _, vh1 = np.linalg.svd(update[i].numpy(), full_matrices=False)
        u1, vh1 = u1[:, :4], vh1[:4]
        expected = (
            np.linalg.norm(u[:, :4].T @ u1) ** 2 / 4,
            np.linalg.norm(vh[:4] @ vh1.T) ** 2 / 4,
            np.linalg.norm(update[i]) / np.linalg.norm(u1.T @ w[i].numpy() @ vh1.T),
        )
        assert [float(x[i]) for x in found] == pytest.approx(expected, rel=1e-6)


def test_all_columns_of_one_change():
    w, update = random(8, 6), 0.1 * random(8, 6, seed=1)
    values = {k: float(v) for k, v in change_of(svd(w), svd(w + update), update, 2).items()}
    s = np.linalg.svd((w + update).numpy(), compute_uv=False)
    assert values["distance"] == pytest.approx(float(update.norm() / w.norm()))
    assert values["condition_principal"] == pytest.approx(s[0] / s[1])
    assert values["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2)
    assert values["energy"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())


def test_the_rank_of_the_principal_part():
    s = torch.tensor([[3.0, 1.0, 1.0, 0.1]])
    assert principal_rank(2, s) == 2
    assert principal_rank(4, s) == principal_rank(None, s) == 2  # of 11.01, 9 and 10 of them


def test_single_precision_sees_no_drift_in_rounding():
    w = random(60, 48).float()
    start, other = decompose(w, "w"), decompose(w.mT.contiguous(), "w")  # the same matrix by another way
    found = drift(start, SVD(other.vh.mT, other.s, other.u.mT))
    assert max(float(found.delta_d), float(found.delta_d_assigned)) < 1e-6
    assert float(found.delta_sigma) < 1e-6 * float(start.s[0])
