"""One budget for all: the rank or pattern with which a method comes closest to a number of values, from below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from svdpeft.adapter.building import given
from svdpeft.methods.base import Given, PerSite
from svdpeft.targets.select import select


def sites_of(
    model: nn.Module, method: PerSite, targets: Sequence[str], exclude: Sequence[str], head: Sequence[str] = ()
) -> list[Given]:
    """Return the sites that ``attach`` would adapt: names and shapes; ``head`` names modules that are trained whole."""
    whole = [name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in head)]
    choices = select(model, [(pattern, method) for pattern in targets], exclude, whole).choices
    return [given(choice, 0, {}, position=i) for i, choice in enumerate(choices)]


def parse(budget: str | int, base: int) -> int:
    """Return a budget as a count.

    Args:
        budget: a count, or a share of the base's parameters such as ``"0.5%"``.
        base: number of the base's parameters.

    Example:
        >>> parse("0.5%", 1000), parse("1e3", 5), parse(70, 5)
        (5, 1000, 70)
    """
    text = str(budget).strip().replace(",", "").replace("_", "")
    try:
        value = float(text.removesuffix("%"))
    except ValueError as error:
        raise ValueError(f"budget {budget!r} is neither a count nor a share such as '0.5%'") from error
    value = value / 100 * base if text.endswith("%") else value
    if not 1 <= value < math.inf:
        raise ValueError(f"budget {budget!r} is {value:g} values of {base:,}: at least one is needed")
    return int(value)


def fit(method: PerSite, budget: int, sites: Sequence[Given]) -> PerSite:
    """Turn the method's knob as far as the budget allows.

    Args:
        method: its knob (``rank``, or ``off_diagonals``) is replaced.
        budget: number of values.
        sites: what it will adapt.

    Returns:
        The method with the largest knob whose count is at most ``budget``.

    Raises:
        ValueError: even the smallest is over the budget; its count is named.
    """
    values = method.knob_values(sites)

    def turned(position: int) -> PerSite:
        return method.turned(values[position])

    least = turned(0).total(sites)
    if least > budget:
        raise ValueError(
            f"{method} has at least {least:,} values on {len(sites)} sites ({method.knob}={values[0]}), "
            f"over the budget of {budget:,}"
        )
    low, high = 0, len(values) - 1  # counts grow with the position: low fits, the answer is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if turned(middle).total(sites) <= budget else (low, middle - 1)
    return turned(low)
