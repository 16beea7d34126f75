"""What a site keeps for the backward, by saved-tensor hooks, is what the table of docs/architecture.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import perturb
from torch import Tensor, nn

from svdpeft import OFT, SORSA, SVFT, DoRA, LoRA, PiSSA, attach
from svdpeft.methods.base import Method

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
METHODS: dict[str, Method] = {
    "LoRA": LoRA(rank=3),
    "PiSSA": PiSSA(rank=3),
    "SORSA": SORSA(rank=3),
    "SVFT plain": SVFT(),
    "SVFT banded": SVFT(pattern="banded", off_diagonals=2),
    "DoRA(LoRA)": DoRA(LoRA(rank=3)),
    "OFT": OFT(block_size=4),
}
ROWS = re.findall(r"^\| (.+?) \| (T·.+?) \| ?(.*?) ?\|$", PAGE.read_text(encoding="utf-8"), re.M)


def kept(method: Method, batch: tuple[int, ...], m: int, n: int, fold: bool) -> int:
    """Floating-point values that the forward of one layer leaves for its backward, parameters aside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    adapter = attach(model, method)
    perturb(adapter)
    if fold:
        adapter.fold()
    adapter.sites["0"].dense = False  # such small matrices are otherwise built
    x = torch.randn(*batch, n, requires_grad=True)
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    out.sum().backward()
    return sum(t.numel() for at, t in found.items() if at not in own and t.is_floating_point())


def test_the_table_has_these_methods():
    assert [name for name, _, _ in ROWS] == list(METHODS)


@pytest.mark.parametrize(("m", "n"), [(20, 24), (28, 16)])
@pytest.mark.parametrize(
    ("name", "formula", "fold"),
    [(name, text, fold) for name, *both in ROWS for fold, text in enumerate(both) if text],
)
def test_what_is_kept(name: str, formula: str, fold: int, m: int, n: int):
    for batch in ((2, 31), (50,)):
        sizes = {"T": torch.Size(batch).numel(), "m": m, "n": n, "k": min(m, n), "r": 3, "d": 2, "b": 4}
        assert kept(METHODS[name], batch, m, n, bool(fold)) == eval(formula.replace("·", "*"), sizes)
