"""By how much one seed gives other factors, and other outputs, on another number of threads: every method.

    python -m benchmarks.threads [--rank 8]

One block of attention of width 256 and two layers, one wide and one tall, with random weights, whose singular values
are as close to each other as they come, in float32, on one thread and on two; the calibrations are made on as many. For
the outputs, what trains is moved by the same noise, N(0, 0.02²).

    factors    max |F₁ − F₂| / max |F₁|, the largest of all tensors of all sites
    outputs    max |y₁ − y₂| / max |y₁ − y₀|, where y₀ is the base's
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import timm.layers
import torch
from torch import Tensor, nn

import svdpeft
from svdpeft.methods.base import Method, PerSite
from svdpeft.registry import METHODS

RESULT = Path(__file__).parent / "results" / "threads.md"
WIDTH, HIDDEN, TOKENS = 256, 384, 16
OPTIONS: dict[str, dict[str, Any]] = {  # where it is not the rank alone
    "dora": {"inner": {"name": "pissa"}},
    "flora": {"rank": 1},
    "frod": {},
}


class Block(nn.Module):
    """Query, key and value in one weight, and layers that are square, wide and tall."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = timm.layers.Attention(WIDTH, num_heads=4)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.attn(x))))


class Found(NamedTuple):
    """What one number of threads came to."""

    factors: dict[str, Tensor]
    output: Tensor
    change: float  # of the output, by the adapter


@contextmanager
def on(threads: int) -> Iterator[None]:
    """Within the block torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def block() -> tuple[nn.Module, Tensor]:
    """The model, with weights drawn as N(0, 1/n), and an input."""
    draws = torch.Generator().manual_seed(0)
    model = Block()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) / p.shape[-1] ** 0.5)
    return model.eval(), torch.randn(4, TOKENS, WIDTH, generator=draws)


def seen(model: nn.Module, tokens: int) -> svdpeft.Calibration:
    """What so many tokens tell, in batches of at most 64."""
    draws = torch.Generator().manual_seed(1)
    sizes = [min(64, tokens - start) for start in range(0, tokens, 64)]
    batches = [torch.randn(1, size, WIDTH, generator=draws) for size in sizes]
    return svdpeft.calibrate(model, batches, gradients=True, loss=lambda y, x: (y - x.roll(1, 1)).square().mean())


def found(method: Method, threads: int, tokens: int = 512) -> Found:
    """Attach on so many threads, with what so many tokens tell, and move what trains."""
    with on(threads):
        model, x = block()
        base = model(x).detach()
        calibration = seen(model, tokens) if getattr(method, "needs", "") else None
        adapter = svdpeft.attach(model, method, calibration=calibration, seed=3, clip_rank=True)
        factors = {
            f"{name}/{role}": tensor.clone()
            for name, site in adapter.sites.items()
            for role, tensor in site.factors.tensors().items()
        }
        draws = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=draws))
            y = model(x)
        return Found(factors, y, float((y - base).abs().max()))


def differences(method: Method, tokens: int = 512) -> tuple[float, float]:
    """Of factors and of outputs, between one thread and two."""
    one, two = found(method, 1, tokens), found(method, 2, tokens)
    factors = (_beside(one.factors[name], two.factors[name]) for name in one.factors)
    return max(factors, default=0.0), float((one.output - two.output).abs().max()) / one.change


def _beside(one: Tensor, two: Tensor) -> float:
    if not one.is_floating_point():
        return float(not torch.equal(one, two))
    return float((one.double() - two.double()).abs().max() / one.double().abs().max().clamp(min=1e-30))


def rows(rank: int) -> Iterator[tuple[str, Method, Method | None]]:
    """A method's name, the method, and where it has a choice of drivers, the method with the exact one."""
    for name in METHODS:
        cls: Any = METHODS[name]
        if not issubclass(cls, PerSite):
            continue
        fields = {field.name for field in dataclasses.fields(cls)}
        options = OPTIONS.get(name, {"rank": rank} if "rank" in fields else {})
        yield name, cls(**options), cls(**options, **{"driver": "exact"}) if "driver" in fields else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    rank = parser.parse_args().rank
    lines = [
        "# One seed on another number of threads",
        "",
        f"`python -m benchmarks.threads --rank {rank}` on {date.today()}; {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}, float32: one thread beside two. "
        "The default driver, and the exact one where there is a choice.",
        "",
        "| method | tokens seen | factors | outputs | factors, exact | outputs, exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, default, exact in rows(rank):
        for tokens in (512, rank - 2) if getattr(default, "needs", "") else (0,):
            cells = [cell for each in (default, exact) for cell in _cells(each, tokens)]
            lines.append(f"| {name} | {tokens or ''} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


def _cells(method: Method | None, tokens: int) -> tuple[str, str]:
    if method is None:
        return "", ""
    try:
        factors, outputs = differences(method, tokens)
    except ValueError as error:
        if "calibrate with more" not in str(error):
            raise
        return "refused", "refused"
    return f"{factors:.0e}", f"{outputs:.0e}"


if __name__ == "__main__":
    main()
