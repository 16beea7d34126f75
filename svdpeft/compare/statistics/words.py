"""What the differences show, in plain English."""

from __future__ import annotations

import math
from collections.abc import Sequence

from svdpeft.compare.statistics.paired import Difference


def sentences(found: Sequence[Difference], metric: str, percent: bool = True) -> list[str]:
    """Return what each comparison shows, in plain English.

    Args:
        found: what ``differences`` returned.
        metric: its name; of losses, which are told in nats, less is better.
        percent: whether any other metric is a share, told in percentage points, or as it is.

    Example:
        >>> print(*sentences([Difference("B", "A", 0.003, -0.011, 0.017, 0.5, 0.5, 1, 0.95, 3, 900)], "accuracy"))
        B and A cannot be told apart: B came out 0.3 points better (95 % CI −1.1 to 1.7, p = 0.50).
    """
    return [_sentence(each, metric, percent) for each in found]


def _sentence(each: Difference, metric: str, percent: bool) -> str:
    label, baseline = each.label, each.baseline
    if not each.seeds:
        return f"{label} and {baseline} cannot be compared: {each.note}."
    mean, low, high, unit = _amounts(each, metric, percent)
    after = f" after Holm over {each.comparisons} comparisons" if each.comparisons > 1 else ""
    digits = 3 if each.p_corrected < 0.1 else 2
    p = f"p = {each.p_corrected:.{digits}f}" if each.p_corrected >= 0.001 else "p < 0.001"
    bounds = f"({100 * each.confidence:g} % CI {low} to {high}, {p}{after})"
    word = "better" if _better(each, metric) else "worse"
    if each.real:
        text = f"{label} is {word} than {baseline} by {mean} {unit} {bounds}"
    else:
        came = f"{label} came out {mean} {unit} {word}" if each.mean else "no difference was seen"
        seen = "the runs agree on every item" if each.same else f"{came} {bounds}"
        text = f"{label} and {baseline} cannot be told apart: {seen}"
        if not (each.same or math.isnan(each.within)):
            bound = _at_most(each.within * (100 if unit == "points" else 1))
            text += f"; a difference of more than {bound} {unit} is ruled out"
        if each.items_needed:
            text += (
                f"; with these {each.items:,} test items no number of seeds would settle a difference of this size, "
            )
            text += f"about {_about(each.items_needed)} items with {_about(each.seeds_needed)} seeds would"
        elif each.seeds_needed:
            text += f"; about {_about(each.seeds_needed)} seeds would settle a difference of this size"
        elif each.found:
            text = f"The one {label} that was trained is {word} than the one {baseline} by {mean} {unit} {bounds}"
        if each.seeds == 1:
            text += "; seeds were not sampled, so this says nothing about other seeds"
    return f"{text}; {each.note}." if each.note else f"{text}."


def conclusion(found: Sequence[Difference], metric: str) -> str:
    """Return what the comparisons with the baseline show together, and how many seeds would settle the open ones.

    Example:
        >>> b = Difference("B", "A", 0.1, 0.05, 0.15, 0.001, 0.002, 2, 0.95, 3, 900)
        >>> c = Difference("C", "A", 0.01, -0.01, 0.03, 0.2, 0.2, 2, 0.95, 3, 900, seeds_needed=14)
        >>> print(conclusion([b, c], "accuracy"))
        With 3 seeds and 900 test items, B is better than A. Not told apart from A: C. To settle a difference of the \
size seen takes about 14 seeds for C.
    """
    if not found:
        return "There is one method alone: nothing to compare."
    baseline, tested = found[0].baseline, [each for each in found if each.seeds]
    said = _sides([each for each in tested if each.real], metric)
    seeds, items = sorted({each.seeds for each in tested}), sorted({each.items for each in tested})
    text = []
    if tested:
        size = f"{_span(seeds)} seed{'' if seeds == [1] else 's'} and {_span(items)} test items"
        text.append(f"With {size}, {said or f'no difference from {baseline} is real'}.")
    if 1 in seeds:
        text.append("Where there is one seed, seeds were not sampled: nothing is said about other seeds.")
    if once := [each.label for each in tested if each.found and not each.real]:
        text.append(f"Different from {baseline} in this one run: {_listed(once)}.")
    if apart := [each.label for each in tested if not each.found]:
        text.append(f"Not told apart from {baseline}: {_listed(apart)}.")
    if alone := [each for each in tested if not each.found and each.seeds > 1 and each.p <= 1 - each.confidence]:
        count = alone[0].comparisons
        text.append(
            f"Had it been the only comparison, each of these would count: {_sides(alone, metric)}. Of {count} "
            f"comparisons up to {(1 - alone[0].confidence) * count:.1f} come out so by chance."
        )
    needed: dict[str, list[str]] = {}
    for each in sorted(tested, key=lambda each: each.seeds_needed or 0):
        if each.seeds_needed and not each.items_needed:
            needed.setdefault(_about(each.seeds_needed), []).append(each.label)
    if more := [f"{seeds} seeds for {_listed(labels)}" for seeds, labels in needed.items()]:
        text.append(f"To settle a difference of the size seen takes about {_listed(more)}.")
    more = [
        f"{e.label} (about {_about(e.items_needed)} with {_about(e.seeds_needed)} seeds)"
        for e in tested
        if e.items_needed
    ]
    if more:
        text.append(f"No number of seeds would do without more test items for {_listed(more)}.")
    if without := [each.label for each in found if not each.seeds]:
        text.append(f"Could not be compared: {_listed(without)}.")
    return " ".join(text)


def _sides(found: Sequence[Difference], metric: str) -> str:
    """Which are better than the baseline, and which are worse."""
    said = []
    for word in ("better", "worse"):
        if names := [each.label for each in found if _better(each, metric) == (word == "better")]:
            said.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {word} than {found[0].baseline}")
    return "; ".join(said)


def _better(each: Difference, metric: str) -> bool:
    from svdpeft.tasks.base import higher_is_better

    return (each.mean > 0) == higher_is_better(metric)


def _amounts(each: Difference, metric: str, percent: bool) -> tuple[str, str, str, str]:
    """The size of a difference, the bounds in the same direction, and their unit."""
    values = [each.mean, each.low, each.high] if each.mean >= 0 else [-each.mean, -each.high, -each.low]
    unit = "nats" if metric.endswith("loss") else "points" if percent else metric
    if unit != "points":
        shown = [f"{value:.3g}" for value in values]
    else:
        values = [100 * value for value in values]
        # as many decimals as it takes to see on which side of 0 a bound lies
        digits = next((n for n in (1, 2, 3) if all(round(value, n) for value in values if value)), 3)
        shown = [f"{value:.{digits}f}" for value in values]
    mean, low, high = (text.replace("-", "−") for text in shown)
    return mean, low, high, unit


def _at_most(value: float) -> str:
    """A bound with two digits, rounded up: it still is one."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1) if value else 1.0
    return f"{math.ceil(value / unit - 1e-9) * unit:.2g}"


def _about(count: int | None) -> str:
    """A count with two digits that mean something."""
    return f"{round(count or 0, min(0, 2 - len(str(count)))):,}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
