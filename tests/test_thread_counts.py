"""One seed on another number of threads: a bound for each driver, and for what starts from data.

``python -m benchmarks.threads`` has every method, which takes minutes where cores are shared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import factors_of
from torch import Tensor, nn

from svdpeft import EVA, CorDA, GoRA, LoRAGA, LoRANull, SCLoRA, attach
from svdpeft.decomposition import truncated_svd
from svdpeft.methods.base import Statistics

EPS = torch.finfo(torch.float32).eps
ROUNDING = 8 * EPS  # what a few layers make of it
RANK = 8


def off(one: Tensor, two: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((one - two).abs().max() / one.abs().max())


@pytest.mark.parametrize(("driver", "bound"), [("exact", EPS), ("randomized", 1e-3)])
def test_a_driver_on_two_threads(driver: Any, bound: float):
    """Of a random matrix, whose singular values are as close to each other as they come."""
    w, found = torch.randn(384, 256, generator=torch.Generator().manual_seed(0)), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(truncated_svd(w, RANK, driver))
    assert max(off(one, two) for one, two in zip(*found, strict=True)) <= bound


def seen(tokens: int, rounding: float) -> Statistics:
    """What so many tokens tell of a layer, rounded a little otherwise, as on another number of threads."""
    draws, errors = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    x, y = torch.randn(tokens, 70, generator=draws), torch.randn(tokens, 90, generator=draws)
    error = torch.randn(90, 70, generator=errors) * rounding
    second = (x.mT @ x) * (1 + error[:70] + error[:70].mT)
    return Statistics(tokens, second, x.sum(0), (y.mT @ x) * (1 + error))


def started(method: Any, tokens: int, rounding: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 90))
    adapter = attach(model, method, ["0"], calibration={"0": seen(tokens, rounding)}, seed=3)
    return factors_of(adapter)["0"]


@pytest.mark.parametrize(
    ("method", "tokens", "bound"),
    [
        *((method, 500, 1e-4) for method in (EVA(RANK), LoRAGA(RANK), LoRANull(RANK), CorDA(RANK))),
        *((method, 500, 1e-4) for method in (SCLoRA(RANK, beta=0.0), GoRA(RANK))),
        (LoRAGA(RANK), 12, 1e-4),  # fewer than 2r directions
        (LoRANull(RANK), 3, 1e-4),  # a null space larger than r
        (CorDA(RANK), 3, 0.05),  # of what no token has reached its inverse covariance makes much
    ],
    ids=str,
)
def test_what_starts_from_data_that_was_rounded_otherwise(method: Any, tokens: int, bound: float):
    one, two = started(method, tokens, 0), started(method, tokens, ROUNDING)
    assert max(off(one[role], two[role]) for role in ("L", "A") if one[role].any()) <= bound


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            EVA(RANK),
            "EVA of rank 8 starts from directions of the inputs of 0, of which there are 7: calibrate ",
        ),
        (EVA(RANK - 1, centred=True), "EVA of rank 7 starts from"),
        (
            LoRAGA(RANK),
            r"the gradient of 0 \(90x70\) has 7 singular values above rounding, and LoRAGA of rank 8",
        ),
    ],
    ids=str,
)
def test_fewer_examples_than_the_rank(method: Any, words: str):
    with pytest.raises(ValueError, match=words + ".*a rank of at most [67] there"):
        started(method, 7, ROUNDING)
    assert not started(type(method)(rank=6), 7, ROUNDING)["A"].isnan().any()
