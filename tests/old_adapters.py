"""Small adapters as earlier revisions wrote them: how they are made, for ``test_old_adapters.py``.

    python tests/old_adapters.py FOLDER

writes those of formats 3 and 4 with the revision that is checked out; of formats 1 and 2, which none reads any more, a
LoRA of each lies beside them. Values come from a formula, so that no random generator of a later
release can change the base.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import svdpeft

FIXTURES = Path(__file__).parent / "fixtures" / "adapters"


class Convolutions(nn.Module):
    """A small image network with running statistics, a parameter without a layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.spectral = nn.Parameter(torch.empty(6, 5, 2))  # (in, out, mode)
        self.fc = nn.Linear(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).tanh().flatten(2)[..., :2]  # (batch, in, mode)
        x = torch.einsum("bim,iom->bom", x, self.spectral).flatten(1)
        return self.head(self.fc(x).tanh())


class Attentions(nn.Module):
    """Query, key and value in one parameter, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(self.fc(self.attention(x, x, x, need_weights=False)[0]))


class Heads(nn.Module):
    """Attention whose query and key are multiplied head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 3
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 6) for _ in range(3))
        self.o_proj = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))


def fill(named: Any, size: float) -> None:
    """Give every tensor values of its own, without a random generator."""
    with torch.no_grad():
        for i, (_, p) in enumerate(named):
            steps = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((size * torch.sin(0.37 * steps**2 + 1.7 * (i + 1) * steps + 0.3 * i)).view(p.shape))


def convolutions() -> tuple[nn.Module, Tensor]:
    model = Convolutions().double()
    fill(model.named_parameters(), 0.5)
    return model.eval(), torch.linspace(-1, 1, 2 * 4 * 5 * 5, dtype=torch.float64).view(2, 4, 5, 5)


def attentions() -> tuple[nn.Module, Tensor]:
    model = Attentions().double()
    fill(model.named_parameters(), 0.5)
    return model.eval(), torch.tensor([[0, 3, 8, 1], [5, 2, 2, 7]])


def heads() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(Heads()).double()
    fill(model.named_parameters(), 0.5)
    return model.eval(), torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float64).view(2, 5, 8)


def left_out() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    fill(model.named_parameters(), 0.5)
    return model.eval(), torch.linspace(-1, 1, 3 * 9, dtype=torch.float64).view(3, 9)


def attach_convolutions(model: nn.Module) -> svdpeft.Adapter:
    targets = {
        "conv": svdpeft.SORSA(rank=2, gamma={"target": 0.1}),
        "spectral[in,out,mode]": svdpeft.PiSSA(rank={"spectral": 2, ".*": 1}, alpha=3.0),
        "fc": svdpeft.DoRA(svdpeft.LoRA(rank=2)),
    }
    return svdpeft.attach(model, targets=targets, train=["head"], name="first")


def attach_attentions(model: nn.Module) -> svdpeft.Adapter:
    targets = {
        "in_proj_weight[q,v]": svdpeft.VeRA(rank=3),
        "fc": svdpeft.SVFT(pattern="random", off_diagonals=1),
        "embed": (tied := svdpeft.LoRA(rank=2, dropout=0.0)),
        "out": tied,
    }
    return svdpeft.attach(model, targets=targets, seed=3)


def attach_heads(model: nn.Module) -> svdpeft.Adapter:
    return svdpeft.attach(model, svdpeft.CLOVER())


def attach_left_out(model: nn.Module) -> svdpeft.Adapter:
    return svdpeft.attach(model, targets={"0": svdpeft.SVFT(pattern="banded", off_diagonals=1), "2": svdpeft.PiSSA(2)})


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], Callable[[nn.Module], svdpeft.Adapter]]] = {
    "convolutions": (convolutions, attach_convolutions),
    "attentions": (attentions, attach_attentions),
    "heads": (heads, attach_heads),
    "left-out": (left_out, attach_left_out),
}


def bases_in(name: str) -> Any:
    """How ``save`` is asked for the frozen bases: without them the file is of format 4."""
    return "derived" if name == "left-out" else "stored"


def write(folder: Path) -> None:
    """Write each adapter, moved off its start, and what its model then gives."""
    for name, (build, attach) in CASES.items():
        model, x = build()
        adapter = attach(model)
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.add_(0.1 * torch.cos(torch.arange(p.numel(), dtype=torch.float64) + i).view(p.shape))
        model.train()(x)  # moves the running statistics
        out = model.eval()(x).detach()
        adapter.save(folder / name, bases=bases_in(name))
        save_file({"out": out}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
