"""The plan of the first comparison: its page says what the committed results give, and its numbers are right."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import power as planned
from svdpeft.compare.statistics import Components, power
from svdpeft.compare.statistics.two_way import POWER

PAGE = Path(__file__).parent.parent / "benchmarks" / "questions.md"


def test_the_page_quotes_what_the_program_prints():
    text = PAGE.read_text(encoding="utf-8")
    for table in (planned.pilots(), planned.plan()):
        assert "\n".join(table) in text


@pytest.mark.parametrize("sd", [(0.02, 0.0, 0.0), (0.005, 0.1, 0.4), (0.0, 0.2, 0.5)])
def test_what_ten_seeds_show_is_found_with_80_percent_power(sd):
    components = Components(*np.square(sd).tolist())
    shown = planned.detectable(components, 10, 200, 0.01)
    assert power(shown, components, 10, 200, 0.01) == pytest.approx(POWER, abs=1e-3)


def test_the_seeds_of_a_question_are_the_fewest_with_80_percent_power():
    components = Components(0.02**2, 0.05**2, 0.4**2)
    seeds, more = planned.seeds_for(0.03, components, 1000, 0.0125)
    assert more is None
    assert power(0.03, components, seeds, 1000, 0.0125) >= POWER > power(0.03, components, seeds - 1, 1000, 0.0125)
    _, more = planned.seeds_for(0.005, Components(0.0, 0.2**2, 0.1), 1000, 0.0125)  # items alone leave too much
    assert more > 1000


def test_variances_of_a_number_of_a_run_are_those_of_its_paired_differences():
    pilot = planned.Pilot(planned.WORDS, "forgetting", "PiSSA", "SORSA")
    (found,) = planned.variances(pilot)
    results = planned.read(planned.Store(planned.RESULTS / planned.WORDS))
    rows = {row.label: row for row in results.rows}
    ours, theirs = (
        np.array([run["forgetting"]["after"] - run["forgetting"]["before"] for run in rows[label].runs])
        for label in ("SORSA", "PiSSA")
    )
    assert found.seed == pytest.approx((ours - theirs).var(ddof=1))
    assert found.item == found.residual == 0


def test_the_loss_at_a_share_of_the_steps_is_the_mean_of_the_tenth_that_ends_there():
    run = {"loss": [[step, float(step)] for step in range(1, 41)]}
    assert planned.number("loss at 10 %")(run) == np.mean([1, 2, 3, 4])
    assert planned.number("loss at 100 %")(run) == np.mean([37, 38, 39, 40])
    assert math.isclose(planned.number("loss at 30 %")(run), np.mean([9, 10, 11, 12]))
