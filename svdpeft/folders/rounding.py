"""Rounding that is right on average: up or down with the probability by which the value is nearer."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # values at once, so that a large tensor needs no copies in float64


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, so that the expected value is ``x``.

    With the distance q of the two, x becomes q·⌊x/q + u⌋ for u ~ U[0, 1). What ``dtype`` has itself stays as it is.

    Args:
        x: float32 or wider.
        dtype: bfloat16 or float16; a wider one is rounded to the nearest.
        generator: of u, on the CPU.

    Returns:
        A tensor of ``dtype``.

    Example:
        >>> x = torch.full((10_000,), 1 + 1 / 512)  # a quarter of the way from 1 to the next of bfloat16
        >>> round(float(stochastic(x, torch.bfloat16, torch.Generator().manual_seed(0)).float().mean()), 3)
        1.002
    """
    limits = torch.finfo(dtype)
    if limits.bits > 16:
        return x.to(dtype)
    digits = 2 - torch.frexp(torch.tensor(limits.eps)).exponent  # of the significand, the leading one included
    lowest = torch.frexp(torch.tensor(limits.smallest_normal)).exponent - digits  # exponent of the smallest distance
    out = torch.empty(x.shape, dtype=dtype)
    for part, into in zip(x.flatten().split(CHUNK), out.view(-1).split(CHUNK), strict=True):
        wide = part.double()
        exponent = torch.maximum(torch.frexp(wide).exponent - digits, lowest)
        distance = ((exponent.long() + 1023) << 52).view(torch.float64)  # 2^exponent, exactly
        u = torch.rand(part.shape, generator=generator)  # of 24 bits, so that n + u is exact
        into.copy_(torch.where(part.isfinite(), (wide / distance + u).floor() * distance, wide))
    return out
