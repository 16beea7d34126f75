"""Cost against size: how time grows with width, rank, tokens, sites and adapters, as fitted exponents.

    python -m benchmarks.scale [--threads 2] [--rounds 3] [--only steps] [--small]

    seconds ≈ c · size^e

Every round runs all sizes of a sweep, in another order each time; e is fitted within a round by least squares of the
logarithms, over the upper half of the sizes, since below fixed costs count. The table has the median over the rounds
and the quartiles, and what counting operations lets one expect. Nothing may grow faster than that. A second table has
the layers of Llama-2-7B, one at a time: 13.5 GB of them are not needed to time one.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import svdpeft
from benchmarks.speed.rounds import Candidate, interleaved, ratios, spread

RESULT = Path(__file__).parent / "results" / "scale.md"
WIDTHS, RANKS = (512, 1024, 2048, 4096, 8192), (8, 16, 32, 64, 128, 256, 512)
TOKENS, SITES, ADAPTERS = (64, 256, 1024, 4096, 16384), (1, 3, 10, 30, 100, 300), (1, 2, 4, 8, 16, 32, 64)
LLAMA = {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}  # of the 7B: (out, in)
METHODS = {
    "LoRA": lambda rank: svdpeft.LoRA(rank=rank),
    "PiSSA": lambda rank: svdpeft.PiSSA(rank=rank),
    "SORSA": lambda rank: svdpeft.SORSA(rank=rank),
    "SVFT banded": lambda rank: svdpeft.SVFT(pattern="banded"),
}


@dataclass(frozen=True)
class Sweep:
    """What is timed at several sizes.

    Args:
        what: is done.
        by: what grows.
        sizes: of that.
        candidate: makes ready and runs it at a size.
        expected: the exponent that counting operations gives for large sizes.
    """

    what: str
    by: str
    sizes: Sequence[int]
    candidate: Callable[[int], Candidate]
    expected: float


def layers(width: int, count: int = 1) -> nn.Sequential:
    """Linear layers with the values of a fresh model."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def attaching(name: str, width: int, rank: int = 16, sites: int = 1) -> Candidate:
    model, method = layers(width, sites), METHODS[name](rank)

    def run(_: Any) -> None:
        svdpeft.attach(model, method, "all").detach()

    return lambda: None, run


def step(name: str, width: int = 1024, rank: int = 16, tokens: int = 512, sites: int = 1) -> Candidate:
    model = layers(width, sites)
    adapter = svdpeft.attach(model, METHODS[name](rank), "all")
    x = torch.randn(tokens, width)

    def run(_: Any) -> None:
        model(x).square().mean().backward()
        penalty = adapter.penalty()
        if penalty is not None:
            penalty.backward()

    def prepare() -> None:
        for parameter in adapter.parameters():
            parameter.grad = None

    return prepare, run


def saving(sites: int) -> Candidate:
    adapter = svdpeft.attach(layers(128, sites), svdpeft.PiSSA(rank=16), "all")
    folder = Path(tempfile.mkdtemp())
    return lambda: None, lambda _: adapter.save(folder / "adapter")


def merging(sites: int) -> Candidate:
    adapter = svdpeft.attach(layers(128, sites), svdpeft.PiSSA(rank=16), "all")

    def run(_: Any) -> None:
        adapter.merge()
        adapter.unmerge()

    return lambda: None, run


def beside_others(count: int, run_all: bool) -> Candidate:
    """A forward with one adapter on, or all, of several that are attached."""
    model = layers(256, 4)
    adapters = [svdpeft.attach(model, svdpeft.LoRA(rank=8), "all", name=f"a{i}") for i in range(count)]
    if not run_all:
        for adapter in adapters[1:]:
            adapter.disable()
    x = torch.randn(64, 256)

    def run(_: Any) -> None:
        with torch.no_grad():
            for _ in range(10):
                model(x)

    return lambda: None, run


def one_more(count: int) -> Candidate:
    """Attaching one more adapter to a base that has several."""
    model = layers(256, 4)
    for i in range(count - 1):
        svdpeft.attach(model, svdpeft.LoRA(rank=8), "all", name=f"a{i}").disable()

    def run(_: Any) -> None:
        svdpeft.attach(model, svdpeft.LoRA(rank=8), "all", name="more").detach()

    return lambda: None, run


def sweeps() -> Iterator[Sweep]:
    """All of them, the shortest names of what grows first."""
    for name in ("LoRA", "PiSSA"):
        yield Sweep(f"attach {name}", "width", WIDTHS, partial(attaching, name), 2)
    yield Sweep("attach SVFT banded", "width", WIDTHS[:3], partial(attaching, "SVFT banded"), 3)
    yield Sweep("attach PiSSA, width 2048", "rank", RANKS, lambda rank: attaching("PiSSA", 2048, rank), 1)
    yield Sweep("attach PiSSA, width 128", "sites", SITES, lambda sites: attaching("PiSSA", 128, sites=sites), 1)
    for name in METHODS:
        widths = WIDTHS if name != "SVFT banded" else WIDTHS[:3]
        yield Sweep(f"step {name}, 512 tokens", "width", widths, partial(step, name), 2)
        yield Sweep(f"step {name}, width 1024", "tokens", TOKENS, lambda t, name=name: step(name, tokens=t), 1)
    for name in ("LoRA", "SORSA"):
        yield Sweep(f"step {name}, width 2048", "rank", RANKS, lambda r, name=name: step(name, 2048, r), 1)
    yield Sweep("step SORSA, width 128", "sites", SITES, lambda s: step("SORSA", 128, 16, 64, s), 1)
    yield Sweep("save PiSSA, width 128", "sites", SITES, saving, 1)
    yield Sweep("merge and unmerge PiSSA, width 128", "sites", SITES, merging, 1)
    yield Sweep("attach one more LoRA", "adapters", ADAPTERS, one_more, 0)
    yield Sweep("forward, one of them on", "adapters", ADAPTERS, partial(beside_others, run_all=False), 0)
    yield Sweep("forward, all of them on", "adapters", ADAPTERS, partial(beside_others, run_all=True), 1)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares, over the upper half of the sizes.

    Example:
        >>> round(exponent([1, 2, 4, 8], [9.0, 2.0, 8.0, 32.0]), 6)
        2.0
    """
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    x, y = ([math.log(value) for value in values[half:]] for values in (sizes, times))
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def row(sweep: Sweep, rounds: int) -> str:
    """A line of the table."""
    candidates = {str(size): sweep.candidate(size) for size in sweep.sizes}
    found = interleaved(candidates, rounds, f"{sweep.what}, {sweep.by}")
    fitted = [exponent(sweep.sizes, times) for times in zip(*found.values(), strict=True)]
    middle, low, high = spread(fitted)
    first, last = (spread(found[str(size)])[0] for size in (sweep.sizes[0], sweep.sizes[-1]))
    return (
        f"| {sweep.what} | {sweep.by} {sweep.sizes[0]} … {sweep.sizes[-1]} | {1e3 * first:.3g} | {1e3 * last:.4g} "
        f"| {middle:.2f} ({low:.2f} … {high:.2f}) | {sweep.expected:g} |"
    )


def llama(rounds: int, small: bool) -> Iterator[str]:
    """Lines of the table of Llama-2-7B's layers: a step of the layer alone, and what an adapter does beside it."""
    for name, (m, n) in LLAMA.items():
        m, n = (m // 16, n // 16) if small else (m, n)
        torch.manual_seed(0)
        layer = nn.Linear(n, m, bias=False).requires_grad_(False)
        # A fresh weight has no leading directions at all, which no trained one is like, and no driver finds them there.
        left, right = (torch.linalg.qr(torch.randn(size, 64)).Q for size in (m, n))
        layer.weight += left * torch.linspace(8, 1.5, 64) @ right.mT
        bare = nn.Sequential(layer)
        x = torch.randn(512, n, requires_grad=True)
        candidates: dict[str, Candidate] = {"step, no adapter": _forth_and_back(bare, x)}
        for method in ("LoRA", "PiSSA", "SORSA"):
            model = copy.deepcopy(bare)
            adapter = svdpeft.attach(model, METHODS[method](16), "all")
            candidates[f"step, {method}"] = _forth_and_back(model, x)
            if method != "SORSA":
                ready = partial(copy.deepcopy, bare)
                candidates[f"attach {method}"] = ready, partial(_attach, METHODS[method](16))
                candidates[f"merge and unmerge {method}"] = _nothing, partial(_there_and_back, adapter)
        found = interleaved(candidates, rounds, f"Llama-2-7B, {name}")
        for what, (ratio, low, high) in ratios(found, "step, no adapter").items():
            ms = 1e3 * spread(found[what])[0]
            yield f"| {name} | {m}×{n} | {what} | {ms:.4g} | {ratio:.2f} ({low:.2f} … {high:.2f}) |"


def _nothing() -> None: ...


def _forth_and_back(model: nn.Module, x: Tensor) -> Candidate:
    return _nothing, lambda _: model(x).square().mean().backward()


def _attach(method: svdpeft.Method, model: nn.Module) -> svdpeft.Adapter:
    return svdpeft.attach(model, method, "all")


def _there_and_back(adapter: svdpeft.Adapter, _: None) -> None:
    adapter.merge()
    adapter.unmerge()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="sweeps whose name has this, or Llama-2-7B")
    parser.add_argument("--small", action="store_true", help="the three smallest sizes of each: whether all of it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Cost against size",
        "",
        f"`python -m benchmarks.scale` on {date.today()}; {options.threads} threads of a shared {platform.machine()} "
        f"machine, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, float32; "
        f"{options.rounds} interleaved rounds. Exponents e of seconds ≈ c · size^e over the upper half of the sizes.",
        "",
        "| what | from … to | first, ms | last, ms | e, median (quartiles) | by counting |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for sweep in sweeps():
        if options.only and options.only not in sweep.what:
            continue
        if options.small:
            sweep = Sweep(sweep.what, sweep.by, sweep.sizes[:3], sweep.candidate, sweep.expected)
        lines.append(row(sweep, options.rounds))
        print(lines[-1], flush=True)
    if not options.only or options.only in "Llama-2-7B":
        lines += [
            "",
            "## The layers of Llama-2-7B, one at a time",
            "",
            "Random values with 64 larger directions, rank 16, 512 tokens; a step gives the gradient of x, too.",
            "",
            "| layer | shape | what | ms | against the step without an adapter (quartiles) |",
            "| --- | --- | --- | ---: | ---: |",
        ]
        for line in llama(options.rounds, options.small):
            lines.append(line)
            print(line, flush=True)
    if not options.only and not options.small:
        RESULT.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
