"""A Fourier neural operator, written by hand, moves to another viscosity: 32 exact solutions and few parameters.

    python examples/scientific_computing.py --plot burgers.png --json burgers.json

The network learns u(x, 0) -> u(x, 1) of the viscous Burgers equation

    ∂u/∂t + u ∂u/∂x = ν ∂²u/∂x²        x periodic in [0, 2π),  u(x, 0) = Σ_k a_k cos kx + b_k sin kx,  k = 1 … 4

where diffusion is strong, ν in [0.05, 0.1], and is adapted to ν in [0.01, 0.02], where shocks form. The solutions are
exact (Cole 1951, Hopf 1950): with ψ' = u(x, 0), u is the average of (x − y)/t over y with weight
exp(−ψ(y)/2ν − (x − y)²/4νt). All weights are positive, so rounding does no harm however small ν is.

Every method gets the same 32 solutions, steps, batches and schedule. Its learning rate is the best of three on
validation solutions, found with training solutions of their own. The network follows Li et al., Fourier Neural Operator
for Parametric Partial Differential Equations, ICLR 2021, arXiv:2010.08895.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import svdpeft

Data = tuple[Tensor, Tensor]  # inputs (n, points, 2) and exact solutions (n, points)

OLD, NEW = (0.05, 0.1), (0.01, 0.02)  # ranges of ν
POINTS, HARMONICS, TIME = 128, 4, 1.0
BATCH, FEW = 16, 32
K = torch.arange(1, HARMONICS + 1, dtype=torch.float64)
X = torch.arange(POINTS, dtype=torch.float64) * (2 * math.pi / POINTS)

# The spectral weight is a raw parameter: one matrix for each Fourier mode, and for its real and imaginary part.
TARGETS = ["spectral[part,in,out,mode]", "skip", "project.0"]
METHODS = {  # method, and the learning rates to choose from
    "SORSA": (svdpeft.SORSA(rank=2), (3e-3, 1e-2, 3e-2)),
    "PiSSA": (svdpeft.PiSSA(rank=2), (3e-3, 1e-2, 3e-2)),
    "LoRA": (svdpeft.LoRA(rank=2), (1e-2, 3e-2, 1e-1)),
    # A band of 5 diagonals on 27 of 32 triplets has 129 entries; rank 2 has 128 to 130.
    "SVFT": (svdpeft.SVFT(rank=27, pattern="banded"), (1e-2, 3e-2, 1e-1)),
    "full": (svdpeft.Full(), (1e-3, 3e-3, 1e-2)),
}


@dataclass(frozen=True)
class Size:
    """How much is computed; ``rates`` is the number of learning rates that are tried, 1 is the middle one."""

    pretrain_functions: int = 1024
    pretrain_steps: int = 2000
    adapt_steps: int = 200
    test_functions: int = 200
    rates: int = 3
    seeds: int = 3


QUICK = Size(pretrain_functions=128, pretrain_steps=200, adapt_steps=40, test_functions=32, rates=1, seeds=1)


# -- the equation ------------------------------------------------------------------------------------------------------


def cole_hopf(a: Tensor, b: Tensor, nu: Tensor) -> Tensor:
    """Return u(x, t) at the grid points, (n, points), for coefficients (n, harmonics) and viscosities (n,)."""
    # The trapezoid rule converges exponentially. At s = y − x = ±2π the weight is below 1e-30.
    s = torch.linspace(-2 * math.pi, 2 * math.pi, 513, dtype=torch.float64)
    phase = K[:, None] * (X[:, None] + s).reshape(-1)
    u = []
    for a_i, b_i, nu_i in zip(a, b, nu, strict=True):
        psi = (a_i / K @ phase.sin() - b_i / K @ phase.cos()).reshape(POINTS, -1)
        u.append(torch.softmax(-(psi + s**2 / (2 * TIME)) / (2 * nu_i), dim=-1) @ (-s / TIME))
    return torch.stack(u)


def pseudo_spectral(u: Tensor, nu: Tensor, steps: int = 1000) -> Tensor:
    """The same by a second way: Fourier modes in x, Runge-Kutta 4 with the diffusion integrated exactly."""
    k = torch.arange(u.shape[-1] // 2 + 1, dtype=torch.float64)
    advect = -0.5j * k * (k < u.shape[-1] / 3)  # two thirds of the modes: none is aliased
    dt = TIME / steps
    half = torch.exp(-nu[:, None] * k**2 * dt / 2)

    def slope(v: Tensor) -> Tensor:
        return dt * advect * torch.fft.rfft(torch.fft.irfft(v) ** 2)

    v = torch.fft.rfft(u)
    for _ in range(steps):
        p = slope(v)
        q = slope(half * (v + p / 2))
        r = slope(half * v + q / 2)
        s = slope(half**2 * v + half * r)
        v = half**2 * v + (half**2 * p + 2 * half * (q + r) + s) / 6
    return torch.fft.irfft(v)


def initial(a: Tensor, b: Tensor, x: Tensor = X) -> Tensor:
    """Return u(x, 0), (n, points)."""
    return a @ torch.cos(K[:, None] * x) + b @ torch.sin(K[:, None] * x)


def draw(count: int, viscosities: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw coefficients a, b of standard deviation 0.6/k and viscosities, uniform in their logarithm."""
    generator = torch.Generator().manual_seed(seed)
    a, b = 0.6 / K * torch.randn(2, count, HARMONICS, generator=generator, dtype=torch.float64)
    low, high = viscosities
    return a, b, low * (high / low) ** torch.rand(count, generator=generator, dtype=torch.float64)


def solutions(count: int, viscosities: tuple[float, float], seed: int) -> Data:
    """Return inputs, u(x, 0) and log(ν/0.07) at the grid points, and exact solutions u(x, 1)."""
    a, b, nu = draw(count, viscosities, seed)
    log_nu = (nu / 0.07).log()[:, None].expand(-1, POINTS)
    return torch.stack([initial(a, b), log_nu], dim=-1).float(), cole_hopf(a, b, nu).float()


def check_reference() -> dict[str, float]:
    """Return the largest difference between the two ways to solve the equation, for both ranges."""
    differences = {}
    for name, viscosities in (("old", OLD), ("new", NEW)):
        a, b, nu = draw(1, viscosities, seed=0)
        fine = torch.arange(16 * POINTS, dtype=torch.float64) * (2 * math.pi / (16 * POINTS))  # resolves the shocks
        difference = pseudo_spectral(initial(a, b, fine), nu)[:, ::16] - cole_hopf(a, b, nu)
        differences[name] = difference.abs().max().item()
    return differences


# -- the network -------------------------------------------------------------------------------------------------------


class FourierLayer(nn.Module):
    """A linear map of the lowest Fourier modes, one matrix for each, plus a linear map at each point."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.spectral = nn.Parameter(0.5 / width * torch.randn(2, width, width, modes))  # real and imaginary part
        self.skip = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:  # (n, points, width)
        low = torch.fft.rfft(h, dim=1)[:, : self.modes]
        low = torch.einsum("nmi,iom->nmo", low, torch.complex(*self.spectral))
        return torch.fft.irfft(low, h.shape[1], dim=1) + self.skip(h)


class FNO(nn.Module):
    """Lift to many channels, four Fourier layers with GELU between them, project to one value at each point."""

    def __init__(self, width: int = 32, modes: int = 16) -> None:
        super().__init__()
        self.lift = nn.Linear(2, width)
        self.layers = nn.ModuleList(FourierLayer(width, modes) for _ in range(4))
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, x: Tensor) -> Tensor:  # (n, points, 2) -> (n, points)
        h = self.layers[0](self.lift(x))
        for layer in self.layers[1:]:
            h = layer(F.gelu(h))
        return self.project(h).squeeze(-1)


def relative_error(u: Tensor, exact: Tensor) -> Tensor:
    """‖u − exact‖ / ‖exact‖ in L², averaged over the functions."""
    return ((u - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()


@torch.no_grad()
def test(network: nn.Module, data: Data) -> float:
    """Return the relative error in per cent."""
    inputs, exact = data
    return 100 * relative_error(network(inputs), exact).item()


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One method: its learning rate and its errors in per cent, one for each seed."""

    method: str
    trainable: int
    lr: float | None
    old: list[float]
    new: list[float]


def train(
    network: nn.Module, data: Data, lr: float, steps: int, seed: int, adapter: svdpeft.Adapter | None = None
) -> None:
    """Adam with a short warm-up and a cosine; with an adapter, its three calls stand where they belong."""
    inputs, exact = data
    optimizer = torch.optim.Adam((adapter or network).parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    warm_up = steps // 10
    for step in tqdm(range(1, steps + 1), desc="pretraining", disable=None if adapter is None else True):
        scale = min(1, step / warm_up) * (1 + math.cos(math.pi * step / (steps + 1))) / 2
        optimizer.param_groups[0]["lr"] = scale * lr
        batch = torch.randint(len(inputs), (BATCH,), generator=generator)
        loss = relative_error(network(inputs[batch]), exact[batch])
        if adapter and (penalty := adapter.penalty()) is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        loss.backward()
        if adapter:
            adapter.before_step(peak_lr=lr)
        optimizer.step()
        if adapter:
            adapter.after_step(lr_scale=scale)


def adapt(network: nn.Module, name: str, lr: float, steps: int, seed: int) -> svdpeft.Adapter:
    """Attach a method and train it on the few solutions of the new range that belong to this seed."""
    # The lift has two inputs: too small for a low rank, so it trains whole under every method.
    adapter = svdpeft.attach(network, METHODS[name][0], targets=TARGETS, train=["lift"], seed=seed)
    train(network, solutions(FEW, NEW, seed=100 + seed), lr, steps, seed, adapter)
    return adapter


def compare(network: nn.Module, size: Size, old: Data, new: Data) -> list[Row]:
    """Return what each method reaches on both ranges, first of all the pretrained network."""
    rows = [Row("pretrained", 0, None, [test(network, old)], [test(network, new)])]
    validation = solutions(FEW, NEW, seed=3)
    tried = size.rates if size.rates > 1 else 0
    progress = tqdm(total=len(METHODS) * (tried + size.seeds), disable=None)
    for name, (_, rates) in METHODS.items():
        progress.set_description(name)
        scores = {}
        for lr in rates[:tried]:
            adapter = adapt(network, name, lr, size.adapt_steps, seed=size.seeds)  # a seed that is not compared
            scores[test(network, validation)] = lr
            adapter.detach()
            progress.update()
        row = Row(name, 0, scores[min(scores)] if scores else rates[1], [], [])
        for seed in range(size.seeds):
            adapter = adapt(network, name, row.lr, size.adapt_steps, seed)
            row.trainable = adapter.trainable_count
            row.old.append(test(network, old))
            row.new.append(test(network, new))
            adapter.detach()  # the pretrained network is back, for the next run
            progress.update()
        rows.append(row)
    progress.close()
    return rows


def table(rows: list[Row], parameters: int) -> str:
    """Return the comparison as text."""

    def spread(errors: list[float]) -> str:
        deviation = f" ± {statistics.stdev(errors):.1f}" if len(errors) > 1 else ""
        return f"{statistics.fmean(errors):.1f}{deviation}"

    lines = [f"{'method':<11}{'trainable':>10}{'share %':>9}{'rate':>8}{'error % old ν':>16}{'error % new ν':>16}"]
    for row in rows:
        rate = "" if row.lr is None else f"{row.lr:g}"
        share = 100 * row.trainable / parameters
        lines.append(
            f"{row.method:<11}{row.trainable:>10,}{share:>9.1f}{rate:>8}{spread(row.old):>16}{spread(row.new):>16}"
        )
    return "\n".join(lines)


# -- what else an adapter promises -------------------------------------------------------------------------------------


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dictionaries agree in every name and every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def promises(network: nn.Module, adapter: svdpeft.Adapter, pretrained: dict[str, Tensor], inputs: Tensor) -> dict:
    """Save, detach, load and merge the adapter; the network is given back pretrained."""
    kept = {}
    adapted = network(inputs)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        adapter.detach()
        kept["detached"] = equal(network.state_dict(), pretrained)
        adapter = svdpeft.load(network, folder)
        kept["loaded"] = torch.equal(network(inputs), adapted)
    network.double()
    adapted = network(inputs.double())
    adapter.merge()
    kept["merge_difference"] = (network(inputs.double()) - adapted).abs().max().item()
    adapter.detach()
    network.float()
    kept["detached"] &= equal(network.state_dict(), pretrained)
    return kept


# -- output ------------------------------------------------------------------------------------------------------------


def draw_picture(path: Path, data: Data, predictions: dict[str, Tensor]) -> None:
    """Draw one test function: exact, pretrained, adapted."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    inputs, exact = data
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(X, inputs[0, :, 0], color="0.75", label="u(x, 0)")
    axes.plot(X, exact[0], color="black", linewidth=3, alpha=0.4, label="exact u(x, 1)")
    for (name, u), style in zip(predictions.items(), ("C3--", "C0"), strict=True):
        axes.plot(X, u[0], style, label=f"{name}: {100 * relative_error(u[:1], exact[:1]):.0f} % error")
    nu = 0.07 * math.exp(inputs[0, 0, 1])
    axes.set(xlabel="x", ylabel="u", xlim=(0, 2 * math.pi), title=f"Burgers equation, test function at ν = {nu:.3f}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def write_json(path: Path, record: dict) -> None:
    """Write the numbers, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run of some seconds: the numbers mean little")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw one test function")
    options = parser.parse_args()
    for path in (options.json, options.plot):
        if path and not path.parent.is_dir():  # said now and not after the computation
            parser.error(f"{path}: there is no folder {path.parent}")
    size = QUICK if options.quick else Size()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings

    reference = check_reference()
    print("Cole–Hopf against a pseudo-spectral solver: " + ", ".join(f"{d:.0e} ({n} ν)" for n, d in reference.items()))

    torch.manual_seed(0)
    network = FNO()
    old, new = solutions(size.test_functions, OLD, seed=1), solutions(size.test_functions, NEW, seed=2)
    train(network, solutions(size.pretrain_functions, OLD, seed=0), 3e-3, size.pretrain_steps, seed=0)
    pretrained = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = sum(p.numel() for p in network.parameters())

    rows = compare(network, size, old, new)
    print(f"\n{parameters:,} parameters; error in L² on {size.test_functions} test functions; {size.seeds} seed(s)")
    print(table(rows, parameters))

    before = network(new[0]).detach()
    adapter = adapt(network, "SORSA", rows[1].lr, size.adapt_steps, seed=0)
    after = network(new[0]).detach()
    if options.plot:
        draw_picture(options.plot, new, {"pretrained": before, "adapted (SORSA)": after})
    kept = promises(network, adapter, pretrained, new[0])
    print(f"\nmerged = adapted, largest difference in float64: {kept['merge_difference']:.0e}")
    print(f"detached = pretrained, bit for bit: {kept['detached']}")
    print(f"loaded = saved, bit for bit: {kept['loaded']}")
    if options.json:
        record = {"size": asdict(size), "parameters": parameters, "reference": reference, "promises": kept}
        write_json(options.json, {**record, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
