"""The statistics of a comparison are right: coverage, false positives, power, oracles, and what they say."""

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from svdpeft.compare.statistics import (
    Components,
    Difference,
    MeanSquares,
    conclusion,
    differences,
    interval,
    needed,
    power,
    sentences,
)
from svdpeft.compare.statistics.two_way import POWER

HOLM = 0.05 / 8  # the level of the first of eight comparisons

# Standard deviations of seed, item and residual, in the tables that are drawn.
SETTINGS = {
    "seeds": (1.0, 0.05, 0.05),
    "items": (0.0, 1.0, 0.05),
    "residual": (0.0, 0.0, 1.0),
    "all": (0.1, 0.3, 1.0),
    "items and a little of the seeds": (0.05, 0.8, 0.3),
}


def drawn(rng, count, seeds, items, sd, mean=0.0):
    """Tables of differences (count, seeds, items) of the model."""
    normal = rng.standard_normal
    of_seed, of_item = sd[0] * normal((count, seeds, 1)), sd[1] * normal((count, 1, items))
    return mean + of_seed + of_item + sd[2] * normal((count, seeds, items))


def binary(rng, count, seeds, items, accuracy, sd, methods=2):
    """0/1 scores (methods, count, seeds, items) without a true difference: items are hard for all methods alike (sd 2),
    and harder for one than for the other, seeds are better or worse, and single answers flip."""
    normal = rng.standard_normal
    of_seed, of_item = sd[0] * normal((methods, count, seeds, 1)), sd[1] * normal((methods, count, 1, items))
    latent = 2 * normal((count, 1, items)) + of_seed + of_item + sd[2] * normal((methods, count, seeds, items))
    return (latent < stats.norm.ppf(accuracy) * math.sqrt(4 + np.square(sd).sum())).astype(float)


def rejected(squares, alpha):
    return np.abs(squares.mean) > squares.half_width(alpha)


def at_most(rate, alpha, count):
    assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / count)


# -- one method over its seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_over_seeds_covers_as_often_as_it_says(n):
    values = 0.9 + 0.02 * np.random.default_rng(n).standard_normal((4000, n))
    found = [interval(row.tolist(), 0.9) for row in values[:50]]
    low, high = stats.t.interval(0.9, n - 1, values.mean(1), stats.sem(values, axis=1))
    np.testing.assert_allclose([(f.low, f.high) for f in found], np.c_[low, high][:50], rtol=1e-9)
    np.testing.assert_allclose([f.std for f in found], values.std(1, ddof=1)[:50])
    covered = ((low <= 0.9) & (high >= 0.9)).mean()
    assert abs(covered - 0.9) < 4 * math.sqrt(0.09 / 4000)


def test_one_seed_has_no_interval():
    one = interval([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert all(math.isnan(value) for value in (one.std, one.low, one.high))
    with pytest.raises(ValueError, match="no value"):
        interval([])
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence {confidence} is outside"):
            interval([0.1, 0.2], confidence)


def test_a_diverged_run_gives_no_number():
    for value in (math.nan, math.inf):
        assert math.isnan(interval([0.5, value, 0.6]).mean)


# -- against the baseline: oracles ------------------------------------------------------------------------------------


def test_mean_squares_are_those_of_an_analysis_of_variance():
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    d = drawn(np.random.default_rng(0), 1, 4, 7, (1.0, 0.7, 0.5), 0.3)[0]
    long = pandas.DataFrame([(s, i, d[s, i]) for s, i in np.ndindex(d.shape)], columns=["s", "i", "d"])
    expected = anova_lm(ols("d ~ C(s) + C(i)", long).fit())["mean_sq"]
    found = MeanSquares.of(d)
    np.testing.assert_allclose([found.seed, found.item, found.residual], expected[["C(s)", "C(i)", "Residual"]])


def test_components_and_standard_error_are_those_of_a_mixed_model():
    """In a balanced layout with positive estimates, REML is the analysis of variance."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    d = drawn(np.random.default_rng(1), 1, 6, 9, (1.0, 0.8, 0.5), 0.3)[0]
    long = pandas.DataFrame([(s, i, d[s, i], 0) for s, i in np.ndindex(d.shape)], columns=["s", "i", "d", "all"])
    crossed = {"seed": "0 + C(s)", "item": "0 + C(i)"}
    fit = MixedLM.from_formula("d ~ 1", long, groups="all", vc_formula=crossed, re_formula="0").fit(reml=True)
    by_name = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))
    squares = MeanSquares.of(d)
    found = squares.components
    np.testing.assert_allclose(
        [found.seed, found.item, found.residual], [by_name["seed"], by_name["item"], fit.scale], rtol=1e-3
    )
    variance = (squares.seed + squares.item - squares.residual) / d.size
    assert math.isclose(math.sqrt(variance), fit.bse_fe.iloc[0], rel_tol=1e-3)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 8])
def test_half_the_interval_is_the_formula(alpha):
    rng = np.random.default_rng(0)
    d = 0.1 * rng.normal(size=(4, 1)) + rng.normal(size=30) + rng.normal(size=(4, 30))
    found = MeanSquares.of(d)

    def t2(freedom):
        return stats.t.ppf(1 - alpha / 2, freedom) ** 2

    of_seeds = max(t2(3) * found.seed, t2(3 * 29) * found.residual)
    of_items = t2(29) * max(0, found.item - found.residual)
    assert found.item > found.residual
    assert found.half_width(alpha) == pytest.approx(math.sqrt((of_seeds + of_items) / (4 * 30)), rel=1e-9)


def test_the_standard_error_is_that_of_a_bootstrap_over_seeds_and_items():
    rng = np.random.default_rng(2)
    d = drawn(rng, 1, 40, 60, (0.3, 0.5, 0.3))[0]
    pick_seeds, pick_items = rng.integers(40, size=(4000, 40)), rng.integers(60, size=(4000, 60))
    weights_seeds = np.stack([np.bincount(row, minlength=40) for row in pick_seeds]) / 40
    weights_items = np.stack([np.bincount(row, minlength=60) for row in pick_items]) / 60
    means = np.einsum("bs,si,bi->b", weights_seeds, d, weights_items)
    squares = MeanSquares.of(d)
    # many seeds and items: every quantile is the normal one
    assert math.isclose(squares.half_width(0.05) / 2, means.std(), rel_tol=0.06)


def test_where_only_seeds_or_only_items_vary_it_is_the_paired_t_test():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(size=(2, 5))
    scores = {
        "B": {s: [theirs[s]] * 20 for s in range(5)},
        "M": {s: [ours[s]] * 20 for s in range(5)},
    }
    found, expected = differences(scores, "B")[0], stats.ttest_rel(ours, theirs)
    assert math.isclose(found.p, expected.pvalue, rel_tol=1e-6)
    np.testing.assert_allclose((found.low, found.high), expected.confidence_interval(), rtol=1e-6)

    ours, theirs = rng.normal(size=(2, 30))
    expected = stats.ttest_rel(ours, theirs)
    for seeds in (1, 4):  # one seed, or seeds that change nothing
        scores = {"B": dict.fromkeys(range(seeds), theirs), "M": dict.fromkeys(range(seeds), ours)}
        found = differences(scores, "B")[0]
        assert math.isclose(found.p, expected.pvalue, rel_tol=1e-6)
        np.testing.assert_allclose((found.low, found.high), expected.confidence_interval(), rtol=1e-6)


def test_p_is_the_level_at_which_the_interval_touches_zero():
    rng = np.random.default_rng(4)
    for sd, seeds in itertools.product(SETTINGS.values(), (2, 3, 8)):
        squares = MeanSquares.of(drawn(rng, 1, seeds, 25, sd, 0.2)[0])
        assert math.isclose(squares.half_width(squares.p()), abs(squares.mean), rel_tol=1e-6)


# -- against the baseline: how often it is wrong, and how often right -------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("items", [10, 100])
@pytest.mark.parametrize("setting", SETTINGS)
def test_coverage_and_false_positives(setting, seeds, items):
    """A known difference is inside the interval, and 0 where there is none, at least as often as they should be."""
    count = 3000
    squares = MeanSquares.of(drawn(np.random.default_rng(5), count, seeds, items, SETTINGS[setting], 0.7))
    none = dataclasses.replace(squares, mean=squares.mean - 0.7)
    for alpha in (0.05, HOLM):
        missed = rejected(none, alpha).mean()
        covered = (np.abs(squares.mean - 0.7) <= squares.half_width(alpha)).mean()
        assert math.isclose(covered, 1 - missed)
        at_most(missed, alpha, count)
        if setting in ("seeds", "items"):  # one source of variance: exact, not only safe
            assert missed >= alpha - 4 * math.sqrt(alpha / count) - 0.25 * alpha


@pytest.mark.parametrize(("accuracy", "items"), [(0.5, 60), (0.95, 60), (0.95, 200), (0.99, 60)])
@pytest.mark.parametrize("sd", [(0.0, 0.5, 1.0), (0.5, 0.5, 1.0), (0.1, 2.0, 0.3)], ids=str)
def test_false_positives_with_answers_that_are_right_or_wrong(accuracy, items, sd):
    count = 1500
    for seeds in (3, 5):
        ours, theirs = binary(np.random.default_rng(6), count, seeds, items, accuracy, sd)
        squares = MeanSquares.of(ours - theirs)
        for alpha in (0.05, HOLM):
            at_most(rejected(squares, alpha).mean(), alpha, count)


def test_the_usual_approximations_are_not_safe_with_three_seeds():
    """Why it is not quasi-F or min F' with Satterthwaite's degrees of freedom: what docs/statistics.md says of them."""
    rng, count = np.random.default_rng(7), 20_000
    few, many = 3, 10

    def satterthwaite(m, subtract):
        weights = (1, 1, -1 if subtract else 0)
        parts = np.stack([w * x for w, x in zip(weights, (m.seed, m.item, m.residual), strict=True)])
        freedom = np.array([few - 1, many - 1, (few - 1) * (many - 1)])[:, None]
        variance = np.maximum(parts.sum(0), 1e-300)
        t = np.abs(m.mean) / np.sqrt(variance / (few * many))
        return 2 * stats.t.sf(t, np.maximum(variance**2 / (parts**2 / freedom).sum(0), 1e-3))

    squares = MeanSquares.of(drawn(rng, count, few, many, (1.0, 0.3, 0.3)))
    for subtract in (True, False):  # quasi-F, min F'
        p = satterthwaite(squares, subtract)
        assert (p <= 0.05).mean() > 1.2 * 0.05
        assert (p <= HOLM).mean() > 2.5 * HOLM
    for alpha in (0.05, HOLM):
        at_most(rejected(squares, alpha).mean(), alpha, count)


def test_a_family_without_differences_is_called_so():
    """Eight methods share the baseline, and so its luck."""
    rng, count, seeds, items = np.random.default_rng(8), 1500, 3, 50
    for sd in ((0.5, 0.0, 0.1), (0.0, 1.0, 0.1), (0.1, 0.5, 1.0)):
        runs = np.stack([drawn(rng, count, seeds, items, sd) for _ in range(9)])
        squares = MeanSquares.of(runs[1:] - runs[0])
        uncorrected, corrected = (rejected(squares, alpha).any(0) for alpha in (0.05, HOLM))
        at_most(corrected.mean(), 0.05, count)
        assert uncorrected.mean() > corrected.mean()
        # and that is what `differences` does
        for k in [*np.flatnonzero(corrected)[:2], *np.flatnonzero(uncorrected & ~corrected)[:2]]:
            scores = {f"m{m}": dict(enumerate(runs[m, k])) for m in range(9)}
            assert any(each.real for each in differences(scores, "m0")) == corrected[k]


def families():
    """Families of seven methods of which some differ from the baseline."""
    rng = np.random.default_rng(9)
    for k in range(9):
        theirs = drawn(rng, 1, 4, 40, (0.1, 0.5, 0.5))[0]
        sd = SETTINGS["all" if k % 2 else "items"]
        ours = [theirs + drawn(rng, 1, 4, 40, sd, 0.35 * m * (k % 3))[0] for m in range(6)]
        yield differences({f"m{m}": dict(enumerate(d)) for m, d in enumerate([theirs, *ours])}, "m0")


def test_the_correction_is_holms_and_the_interval_never_contradicts_it():
    verdicts = set()
    for found in families():
        plain, corrected = [each.p for each in found], [each.p_corrected for each in found]
        np.testing.assert_allclose(corrected, multipletests(plain, 0.05, "holm")[1], rtol=1e-12)
        for each in found:
            assert each.comparisons == 6
            assert each.real == (each.p_corrected <= 0.05) == (not each.low <= 0 <= each.high)
            assert (each.seeds_needed is None) == each.real
        verdicts.add(sum(each.real for each in found))
    assert {0} < verdicts  # none, and some
    assert any(0 < count < 6 for count in verdicts)


def test_where_holm_stops_the_rest_fails_with_it():
    """The second p would pass at 5 %, were it not that the first fails at 2.5 %."""
    spread = np.random.default_rng(16).normal(size=40)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * math.sqrt(40)
    means = stats.t.isf(np.array([0.03, 0.04]) / 2, 39)
    runs = {"B": np.zeros(40), "M": spread + means[0], "N": spread + means[1]}
    found = differences({label: {0: row, 1: row, 2: row} for label, row in runs.items()}, "B")
    np.testing.assert_allclose([each.p for each in found], [0.03, 0.04])
    np.testing.assert_allclose([each.p_corrected for each in found], [0.06, 0.06])
    for each in found:
        assert not each.real
        assert each.low < 0 < each.high


def test_power_grows_with_seeds_and_is_what_a_simulation_finds():
    rng, count, items = np.random.default_rng(10), 3000, 60
    for sd in SETTINGS.values():
        components = Components(*np.square(sd).tolist())
        mean = 3 * math.sqrt(components.seed / 5 + components.item / items + components.residual / items / 5)
        for alpha in (0.05, HOLM):
            predicted = [power(mean, components, seeds, items, alpha) for seeds in (3, 5, 9, 20)]
            assert predicted == sorted(predicted)
            for seeds, expected in zip((3, 5, 9), predicted, strict=False):
                squares = MeanSquares.of(drawn(rng, count, seeds, items, sd, mean))
                assert abs(rejected(squares, alpha).mean() - expected) < 0.04


def expected_squares(sd, mean, seeds, items):
    """A table whose mean squares are just what the model expects."""
    seed, item, residual = np.square(sd).tolist()
    return MeanSquares(mean, items * seed + residual, seeds * item + residual, residual, seeds, items)


@pytest.mark.parametrize(
    ("sd", "mean", "alpha"),
    [
        ((0.3, 0.1, 0.3), 0.25, 0.05),
        ((0.0, 0.0, 1.0), 0.12, 0.05),
        ((0.1, 0.3, 1.0), 0.2, 0.05),
        ((0.1, 0.3, 1.0), 0.25, HOLM),
        ((0.02, 1.0, 0.5), 0.2, 0.05),  # more seeds alone would not do
    ],
)
def test_the_predicted_number_of_seeds_gives_80_percent_power(sd, mean, alpha):
    rng, count = np.random.default_rng(11), 3000
    seeds, more_items = needed(expected_squares(sd, mean, 3, 60), alpha)
    items = more_items or 60
    assert (more_items is not None) == (sd[1] == 1.0)
    found = [rejected(MeanSquares.of(drawn(rng, count, s, items, sd, mean)), alpha).mean() for s in (seeds, seeds - 1)]
    assert found[0] > POWER - 0.03
    if more_items is None:
        assert seeds > 3
        assert found[1] < POWER + 0.03
        assert found[0] < 0.93
    else:
        components = Components(*np.square(sd).tolist())
        for many in (100, 1000):  # with the items that there were
            assert power(mean, components, many, 60, alpha) < POWER
        assert math.isclose(power(mean, components, 10**7, items // 2, alpha), POWER, abs_tol=0.02)  # half are too few


def test_the_number_of_seeds_is_that_of_statsmodels_where_only_seeds_vary():
    from statsmodels.stats.power import TTestPower

    for effect, alpha in itertools.product((0.4, 0.9, 1.3), (0.05, HOLM)):
        expected = math.ceil(TTestPower().solve_power(effect, power=POWER, alpha=alpha))
        assert needed(expected_squares((1.0, 0.0, 0.0), effect, 3, 50), alpha) == (max(expected, 4), None)


def test_what_was_not_found_takes_more_seeds_than_there_are():
    """Also where the components, which chance may make too small, say that a few would have done."""
    assert needed(expected_squares((0.1, 0.0, 0.0), 5.0, 3, 50), 0.05) == (4, None)


def test_more_seeds_than_anybody_has_are_still_a_number():
    assert needed(expected_squares((1.0, 0.0, 1.0), 1e-6, 3, 50), 0.05)[0] > 10**12
    seeds, items = needed(expected_squares((0.1, 1.0, 1.0), 1e-5, 3, 50), 0.05)
    assert items > 10**10
    assert seeds > 10**6


# -- what stays the same ----------------------------------------------------------------------------------------------


def numbers(each):
    return (each.mean, each.low, each.high, each.p, each.p_corrected)


@pytest.mark.parametrize("shape", [(1, 30), (3, 30), (6, 12)])
def test_invariance(shape):
    rng = np.random.default_rng(12)
    b, m = drawn(rng, 2, *shape, (0.2, 1.0, 0.5))
    m = m + 0.4

    def compare(m, b, baseline="B"):
        return differences({"B": dict(enumerate(b)), "M": dict(enumerate(m))}, baseline)[0]

    plain = compare(m, b)
    items, seeds = rng.permutation(shape[1]), rng.permutation(shape[0])
    for same in (compare(m + 5, b + 5), compare(m[:, items], b[:, items]), compare(m[seeds], b[seeds])):
        np.testing.assert_allclose(numbers(same), numbers(plain), rtol=1e-6)
    scaled = compare(10 * m, 10 * b)
    np.testing.assert_allclose(numbers(scaled), [10 * plain.mean, 10 * plain.low, 10 * plain.high, plain.p, plain.p])
    swapped = compare(m, b, "M")
    np.testing.assert_allclose(numbers(swapped), [-plain.mean, -plain.high, -plain.low, plain.p, plain.p])
    assert (swapped.label, swapped.baseline, swapped.seeds_needed) == ("B", "M", plain.seeds_needed)


# -- edges ------------------------------------------------------------------------------------------------------------


def runs(*rows):
    return dict(enumerate(rows))


def test_nothing_differs():
    right = runs([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1])
    (found,) = differences({"A": right, "B": right}, "A")
    assert numbers(found) == (0, 0, 0, 1, 1)
    assert not found.real
    assert found.seeds_needed is found.items_needed is None
    assert sentences([found], "accuracy") == ["B and A cannot be told apart: the runs agree on every item."]
    (one,) = differences({"A": {0: [1, 0]}, "B": {0: [1, 0]}}, "A")
    assert sentences([one], "loss")[0].startswith(
        "B and A cannot be told apart: the runs agree on every item; seeds were"
    )


def test_a_mean_of_zero_is_not_agreement():
    (found,) = differences({"A": runs([1, 0, 1, 0], [0, 1, 1, 0]), "B": runs([0, 1, 0, 1], [1, 0, 1, 0])}, "A")
    assert found.mean == 0
    assert not found.same
    assert "no difference was seen (95 % CI −" in sentences([found], "accuracy")[0]


def test_every_difference_is_the_same():
    """No variance at all: a shift of every score is real, be it large or small."""
    (found,) = differences({"A": runs(*[[0] * 9] * 3), "B": runs(*[[1] * 9] * 3)}, "A")
    assert numbers(found) == (1, 1, 1, 0, 0)
    assert found.real


def test_seeds_that_tie_by_chance_do_not_make_a_difference_certain():
    """Each of three seeds has two right answers more, each time other ones: the seeds' mean square is 0."""
    ours = np.zeros((3, 60))
    for seed in range(3):
        ours[seed, [2 * seed, 2 * seed + 1]] = 1
    found = MeanSquares.of(ours)
    assert found.seed < 1e-30
    assert found.residual > 0.03
    assert 0.01 < found.p() < 0.05


def test_one_seed_says_nothing_about_others():
    rng = np.random.default_rng(13)
    b = rng.random(200)
    found = differences({"B": {0: b}, "far": {0: b + 0.1 + 0.01 * rng.random(200)}, "near": {0: rng.random(200)}}, "B")
    assert found[0].p_corrected < 0.001
    assert not any(each.real for each in found)
    assert found[0].found
    assert not found[1].found
    assert all(each.seeds_needed is None and math.isnan(each.components.seed) for each in found)
    far, near = sentences(found, "loss")
    assert far.startswith("The one far that was trained is worse than the one B by 0.105 nats (95 % CI 0.1")
    assert near.startswith("near and B cannot be told apart: near came out ")
    for text in (far, near):
        assert "seeds were not sampled, so this says nothing about other seeds" in text
    assert "With 1 seed and 200 test items, no difference from B is real." in conclusion(found, "loss")
    assert "nothing is said about other seeds" in conclusion(found, "loss")


def test_runs_are_paired_by_their_seed_in_whatever_order_they_come():
    rng = np.random.default_rng(0)
    a, b = ({seed: rng.normal(size=40) + seed for seed in (0, 1, 2)} for _ in range(2))
    mixed = {seed: b[seed] for seed in (2, 0, 1)}
    (found,), (expected,) = (differences({"A": a, "B": each}, "A") for each in (mixed, b))
    assert (found.mean, found.low, found.p) == pytest.approx((expected.mean, expected.low, expected.p), rel=1e-9)


def test_only_common_seeds_count():
    rng = np.random.default_rng(14)
    b, m = rng.random((2, 4, 30))
    (found,) = differences({"B": {0: b[0], 1: b[1], 2: b[2]}, "M": {3: m[3], 1: m[1], 2: m[2]}}, "B")
    (expected,) = differences({"B": {1: b[1], 2: b[2]}, "M": {1: m[1], 2: m[2]}}, "B")
    assert numbers(found) == numbers(expected)
    assert found.seeds == 2
    assert sentences([found], "accuracy")[0].endswith("; left out: seed 3 (only M has it), seed 0 (only B has it).")


def test_a_diverged_run_and_no_common_seed_are_named_and_not_counted():
    rng = np.random.default_rng(15)
    scores = {name: runs(*rng.random((3, 20))) for name in ("B", "C", "D")}
    scores["C"][2][5] = math.nan
    scores["E"] = {7: rng.random(20)}
    c, d, e = differences(scores, "B")
    assert d.comparisons == 1
    assert all(math.isnan(value) for each in (c, e) for value in numbers(each))
    assert not c.real
    assert sentences([c, e], "loss") == [
        "C and B cannot be compared: not all scores of C with seed 2 are finite.",
        "E and B cannot be compared: they have no seed in common.",
    ]
    assert conclusion([c, d, e], "loss").endswith("Could not be compared: C and E.")
    assert conclusion([c, e], "loss") == "Could not be compared: C and E."


def test_bad_input_is_named():
    rows = runs([1, 0, 1], [1, 1, 1])
    with pytest.raises(ValueError, match="no runs of the baseline 'sorza': did you mean 'SORSA'"):
        differences({"SORSA": rows}, "sorza")
    with pytest.raises(ValueError, match="M has 2 test items with seed 1, but B has 3 with seed 0"):
        differences({"B": rows, "M": runs([1, 0, 1], [1, 1])}, "B")
    with pytest.raises(ValueError, match="at least 2 test items, and M and B have 1"):
        differences({"B": runs([1]), "M": runs([0])}, "B")
    with pytest.raises(ValueError, match=r"confidence 95 is outside \(0, 1\)"):
        differences({"B": rows}, "B", confidence=95)


def test_the_baseline_alone():
    assert differences({"B": runs([1, 0], [1, 1])}, "B") == []
    assert conclusion([], "accuracy") == "There is one method alone: nothing to compare."


# -- words ------------------------------------------------------------------------------------------------------------

REAL = Difference("SORSA", "LoRA", 0.018, 0.004, 0.032, 0.0015, 0.012, 8, 0.95, 5, 1319)
WORSE = dataclasses.replace(REAL, label="OFT", mean=-0.0213, low=-0.0379, high=-0.00471, p_corrected=0.0004)
OPEN = dataclasses.replace(
    REAL, label="PiSSA", mean=0.003, low=-0.011, high=0.017, p=0.4, p_corrected=0.8, seeds_needed=14
)
ITEMS = dataclasses.replace(OPEN, label="SVFT", mean=-0.003, low=-0.02, high=0.014, seeds_needed=7, items_needed=6141)


def test_sentences():
    assert sentences([REAL, WORSE, OPEN, ITEMS], "accuracy") == [
        "SORSA is better than LoRA by 1.8 points (95 % CI 0.4 to 3.2, p = 0.012 after Holm over 8 comparisons).",
        "OFT is worse than LoRA by 2.1 points (95 % CI 0.5 to 3.8, p < 0.001 after Holm over 8 comparisons).",
        "PiSSA and LoRA cannot be told apart: PiSSA came out 0.3 points better (95 % CI −1.1 to 1.7, p = 0.80 after "
        "Holm over 8 comparisons); about 14 seeds would settle a difference of this size.",
        "SVFT and LoRA cannot be told apart: SVFT came out 0.3 points worse (95 % CI −1.4 to 2.0, p = 0.80 after "
        "Holm over 8 comparisons); with these 1,319 test items no number of seeds would settle a difference of this "
        "size, about 6,100 items with 7 seeds would.",
    ]


def test_of_a_loss_less_is_better():
    assert sentences([REAL, WORSE], "loss") == [
        "SORSA is worse than LoRA by 0.018 nats (95 % CI 0.004 to 0.032, p = 0.012 after Holm over 8 comparisons).",
        "OFT is better than LoRA by 0.0213 nats (95 % CI 0.00471 to 0.0379, p < 0.001 after Holm over 8 comparisons).",
    ]
    assert "OFT is better than LoRA; SORSA is worse than LoRA" in conclusion([REAL, WORSE], "validation_loss")


def test_a_metric_that_is_no_share_is_told_as_it_is():
    assert sentences([REAL], "bleu", percent=False)[0].startswith(
        "SORSA is better than LoRA by 0.018 bleu (95 % CI 0.004"
    )


def test_a_bound_is_never_rounded_onto_zero():
    alone = dataclasses.replace(REAL, low=0.0003, comparisons=1)
    assert sentences([alone], "accuracy") == [
        "SORSA is better than LoRA by 1.80 points (95 % CI 0.03 to 3.20, p = 0.012)."
    ]


def test_conclusion():
    assert conclusion([REAL, WORSE, OPEN, ITEMS], "accuracy") == (
        "With 5 seeds and 1,319 test items, SORSA is better than LoRA; OFT is worse than LoRA. Not told apart from "
        "LoRA: PiSSA and SVFT. To settle a difference of the size seen takes about 14 seeds for PiSSA. No number of "
        "seeds would do without more test items for SVFT (about 6,100 with 7 seeds)."
    )
    assert conclusion([REAL, dataclasses.replace(REAL, label="DoRA", seeds=3)], "accuracy") == (
        "With 3 to 5 seeds and 1,319 test items, SORSA and DoRA are better than LoRA."
    )


def test_the_conclusion_names_what_only_the_correction_leaves_open():
    alone = [
        dataclasses.replace(OPEN, label=label, mean=mean, p=0.01, p_corrected=0.08, seeds_needed=seeds)
        for label, mean, seeds in (("SVF", 0.2, 6), ("OFT", -0.2, 31), ("KaSA", 0.2, 6))
    ]
    assert conclusion([OPEN, *alone], "accuracy") == (
        "With 5 seeds and 1,319 test items, no difference from LoRA is real. Not told apart from LoRA: PiSSA, SVF, OFT "
        "and KaSA. Had it been the only comparison, each of these would count: SVF and KaSA are better than LoRA; OFT "
        "is worse than LoRA. Of 8 comparisons up to 0.4 come out so by chance. To settle a difference of the size seen "
        "takes about 6 seeds for SVF and KaSA, 14 seeds for PiSSA and 31 seeds for OFT."
    )


def test_importing_is_light():
    code = "import sys, svdpeft.compare.statistics; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"scipy", "statsmodels", "pandas", "transformers"} & set(loaded)


def test_a_difference_within_one_run_is_not_called_none():
    found = Difference("B", "A", 0.3, 0.2, 0.4, 1e-9, 1e-9, 2, 0.95, 1, 900)
    open_ = Difference("C", "A", 0.01, -0.02, 0.04, 0.5, 0.5, 2, 0.95, 1, 900)
    assert conclusion([found, open_], "accuracy") == (
        "With 1 seed and 900 test items, no difference from A is real. Where there is one seed, seeds were not "
        "sampled: nothing is said about other seeds. Different from A in this one run: B. Not told apart from A: C."
    )
