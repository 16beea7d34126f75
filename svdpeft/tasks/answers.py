"""Where the answer stands in a text: the number, or the expression, that a solution ends with.

Source: the markers and "the last one counts" are those of GSM-8K (Cobbe et al. 2021, arXiv:2110.14168) and of the
evaluations of MetaMath (Yu et al. 2024, arXiv:2309.12284), PiSSA and SORSA.
"""

from __future__ import annotations

import re

ANSWER = "The answer is:"
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
FRACTION = re.compile(r"(?<![\d.])\\[dt]?frac\{(\d+)\}\{(\d+)\}")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*")


def final_number(text: str) -> float | None:
    """The first number on the line that follows the last ``The answer is:`` or ``####``, or None.

    The public code of PiSSA and SORSA reads 1,234,567 as 1,234 and rounds 17.6 to 18; here a number is all of it.

    Example:
        >>> final_number("72/2 = <<72/2=36>>36\\n#### 1,036 clips"), final_number("36")
        (1036.0, None)
        >>> final_number("#### 7\\nThe answer is: $17.60"), final_number("The answer is: 3/4.")
        (17.6, 0.75)
    """
    at = max(((text.rfind(mark), len(mark)) for mark in (ANSWER, "####")), key=lambda found: found[0])
    if at[0] < 0:
        return None
    line = FRACTION.sub(r"\1/\2", text[at[0] + at[1] :].strip().partition("\n")[0])
    number = NUMBER.search(line)
    if number is None:
        return None
    above, _, below = number.group().replace(",", "").partition("/")
    if below and float(below) == 0:
        return None
    return float(above) / float(below or 1)


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` or ``\fbox{…}`` holds, braces matched; None if there is none or it is not closed.

    Example:
        >>> boxed(r"so $x = \boxed{\frac{1}{2}}$."), boxed(r"$\boxed 7$"), boxed("x")
        ('\\frac{1}{2}', '7', None)
    """
    found = list(BOXED.finditer(text))
    if not found:
        return None
    rest, depth = text[found[-1].end() :], 0
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip() or None
    for i, sign in enumerate(rest):
        escaped = i > 0 and rest[i - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(sign, 0) if not escaped else 0
        if depth == 0:
            return rest[1:i].strip()
    return None


def final_answer(text: str) -> str | None:
    r"""The expression after the last ``The answer is:``, else what the last ``\boxed`` holds, or None.

    It ends at the first full stop before a line break, or at the end of the text; dollar signs around it are dropped.

    Example:
        >>> final_answer("The answer is: $\\frac{1}{2}$.\nNext"), final_answer(r"Thus \boxed{3}")
        ('\\frac{1}{2}', '3')
    """
    _, mark, tail = text.rpartition(ANSWER)
    if not mark:
        return boxed(text)
    answer = tail.strip().split(".\n")[0].strip().removesuffix(".").strip()
    return answer.strip("$").strip() or None
