"""Sizes of blocks: the common divisors of the two sides of a weight."""

from __future__ import annotations


def common(size: int, m: int, n: int, site: str, clip: bool, word: str = "block_size", narrowest: int = 1) -> int:
    """Return a common divisor of a site's sides, the size or the number of its blocks.

    Args:
        size: that is asked for.
        m: rows.
        n: columns.
        site: its name.
        clip: take the nearest divisor below.
        word: what the size is called.
        narrowest: at least so often the divisor is in the shorter side, or it is 1.

    Example:
        >>> common(4, 9, 6, "fc", clip=True)
        3
    """
    divisors = [d for d in range(1, max(min(m, n) // narrowest, 1) + 1) if m % d == n % d == 0]
    if size in divisors:
        return size
    below, above = [d for d in divisors if d < size], [d for d in divisors if d > size]
    if clip:
        return below[-1]
    near = " and ".join(str(d) for d in [*below[-1:], *above[:1]])
    raise ValueError(
        f"{word} {size} does not divide both sides of {site} ({m}x{n}): {near} would; clip_rank=True chooses one"
    )
