"""LoRA+: the factor on the side of the output learns at a multiple of the rate of the other.

    η_L = ratio · η_A

LoRA starts L at zero and A at random numbers of variance 1/n; as a layer gets wider, no single rate is right for both,
and that of L has to be the larger one. Where another start gives both factors their size, it is a rate like any other.

S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient Low Rank Adaptation of Large Models. ICML 2024, arXiv:2402.12354.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from svdpeft.methods.base import Method, PerSite


def check_ratio(ratio: object) -> None:
    """Raise ``ValueError`` where a ratio of two rates is no number above 0."""
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"loraplus_ratio {ratio!r} is not a finite number above 0")


def check_roles(ratio: float, methods: Iterable[Method]) -> None:
    """Raise ``ValueError`` where one of the methods does not train both L and A, of which a ratio could be.

    Example:
        >>> check_roles(16, [svdpeft.DoRA(svdpeft.PiSSA(rank=4))])
        >>> check_roles(16, [svdpeft.IA3()])
        Traceback (most recent call last):
        ValueError: loraplus_ratio 16 is that of the rates of L and A, and IA3() trains l: role_lr={'l': …} of the ...
    """
    check_ratio(ratio)
    for method in methods:
        if not isinstance(method, PerSite):
            raise ValueError(f"loraplus_ratio {ratio} is that of the rates of L and A, and {method} has no factors")
        if not {"L", "A"} <= set(method.trains):
            raise ValueError(
                f"loraplus_ratio {ratio} is that of the rates of L and A, and {method} trains "
                f"{', '.join(method.trains)}: role_lr={{{method.trains[0]!r}: …}} of the Trainer gives any role a rate"
            )


def rates(ratio: float, role_lr: Mapping[str, float], lr: float) -> dict[str, float]:
    """Return the rates by role with that of L.

    Args:
        ratio: of the rate of L and that of A.
        role_lr: what is said beside it.
        lr: of everything else.

    Raises:
        ValueError: the rate of L is said twice.

    Example:
        >>> rates(16, {"whole": 0.1}, lr=0.25)
        {'whole': 0.1, 'L': 4.0}
    """
    if "L" in role_lr:
        raise ValueError(f"role_lr says a rate of L, {role_lr['L']}, and loraplus_ratio {ratio} another: leave one out")
    return {**role_lr, "L": ratio * role_lr.get("A", lr)}
