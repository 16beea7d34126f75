"""DoRA, OFT and BOFT against Hugging Face PEFT, where it is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import differs, perturb
from torch import Tensor, nn
from torch.nn import functional as F

import svdpeft
from svdpeft.adapter.adapter import Adapter

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

LORA = {"name": "lora", "rank": 3, "alpha": 6.0}


def pair(layer: nn.Module, config: Any, method: Any) -> tuple[nn.Module, nn.Module, Any, Adapter]:
    """Our model and theirs around equal layers; their adapter layer, our adapter."""
    base = nn.Sequential(layer.double())
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    return base, theirs, theirs.base_model.model[0], svdpeft.attach(base, method, ["0"])


def copy_lora(adapter: Adapter, layer: Any) -> None:
    """Off the start, and the same numbers in both."""
    perturb(adapter)
    f = adapter.sites["0"].factors
    with torch.no_grad():
        if isinstance(layer.get_base_layer(), nn.Embedding):  # their A is over tokens, our L
            layer.lora_embedding_A["default"].copy_(f.L.mT)
            layer.lora_embedding_B["default"].copy_(f.A.mT)
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(f.A.reshape(a.shape))
            b.copy_(f.L.reshape(b.shape))
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(f.mag.reshape(magnitude.shape))


DORA = [
    (lambda: nn.Linear(9, 6), "rows", lambda: torch.randn(4, 9)),
    (lambda: nn.Linear(9, 6, bias=False), "rows", lambda: torch.randn(4, 9)),
    (lambda: nn.Conv2d(3, 10, (3, 2), stride=2, padding=1), "rows", lambda: torch.randn(2, 3, 8, 9)),
    # The first known difference: on an embedding PEFT's magnitude is one per feature, a column of (tokens, features).
    (lambda: nn.Embedding(11, 5), "columns", lambda: torch.tensor([[1, 3], [10, 0]])),
]


@pytest.mark.parametrize(("layer", "magnitude", "x"), DORA, ids=["linear", "no-bias", "conv", "embedding"])
def test_dora(layer: Any, magnitude: Any, x: Any):
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"])
    ours, theirs, their_layer, adapter = pair(layer(), config, svdpeft.DoRA(LORA, magnitude=magnitude))
    x = x() if magnitude == "columns" else x().double()
    theirs_at_start = their_layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(adapter.sites["0"].factors.mag.flatten(), theirs_at_start.flatten())
    torch.testing.assert_close(theirs(x), ours(x))
    before = ours(x).detach()
    copy_lora(adapter, their_layer)
    assert differs(ours(x), before)
    torch.testing.assert_close(theirs(x), ours(x))
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()  # the norm is a constant in both
    f = adapter.sites["0"].factors
    found = their_layer.lora_magnitude_vector["default"].weight.grad
    torch.testing.assert_close(f.mag.grad.flatten(), found.flatten())
    if magnitude == "rows":
        for factor, other in ((f.A, their_layer.lora_A), (f.L, their_layer.lora_B)):
            torch.testing.assert_close(factor.grad.flatten(), other["default"].weight.grad.flatten())


def test_dora_of_an_embedding_has_a_magnitude_per_token_by_default():
    adapter = svdpeft.attach(nn.Sequential(nn.Embedding(11, 5)), svdpeft.DoRA(LORA), ["0"])
    assert adapter.sites["0"].factors.mag.shape == (11,)


def test_dora_with_dropout_differs_as_named():
    """The second known difference: PEFT drops the input of the base's share too, we that of the inner update alone."""
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.5, use_dora=True, target_modules=["0"])
    method = svdpeft.DoRA({**LORA, "dropout": 0.5})
    ours, theirs, layer, adapter = pair(nn.Linear(9, 6, bias=False), config, method)
    copy_lora(adapter, layer)
    x = torch.randn(4, 9).double()
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
    site = adapter.sites["0"]
    w, f = ours[0]._parameters["weight"], site.factors
    new = w + 2 * f.L @ f.A
    gain = f.mag / torch.linalg.vector_norm(new, dim=1)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        results.append(model.train()(x))
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(results[0], gain * (x @ w.T + dropped @ (2 * f.L @ f.A).T))
    torch.testing.assert_close(
        results[1], x @ w.T + (gain - 1) * (dropped @ w.T) + gain * (dropped @ (2 * f.L @ f.A).T)
    )


def upper(values: Tensor, b: int) -> Tensor:
    """Our values, the rows of a lower triangle, as PEFT's: of an upper one with the same skew matrix."""
    q = values.new_zeros(*values.shape[:-1], b, b)
    i, j = torch.tril_indices(b, b, -1)
    q[..., i, j] = values
    q = q - q.mT
    i, j = torch.triu_indices(b, b, 1)
    return q[..., i, j]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("neumann", [None, 3])
def test_oft(share: bool, neumann: int | None):
    config = peft.OFTConfig(
        r=0,
        oft_block_size=3,
        block_share=share,
        use_cayley_neumann=neumann is not None,
        num_cayley_neumann_terms=5,  # by PEFT's count: I + 2Q + 2Q² + 2Q³ + Q⁴
        target_modules=["0"],
    )
    method = svdpeft.OFT(block_size=3, block_share=share, neumann=neumann)
    ours, theirs, layer, adapter = pair(nn.Linear(9, 6), config, method)
    x = torch.randn(4, 9).double()
    torch.testing.assert_close(theirs(x), ours(x))
    perturb(adapter)
    values = upper(adapter.sites["0"].factors.Q.detach(), 3)
    with torch.no_grad():
        # Known difference: PEFT's series turns the other way round than its exact rotation.
        layer.oft_R["default"].weight.copy_(values if neumann is None else -values)
    torch.testing.assert_close(theirs(x), ours(x))
    if neumann is not None:
        with torch.no_grad():
            layer.oft_R["default"].weight.copy_(values)
        assert differs(theirs(x), ours(x))


def test_coft_projects_as_peft_does():
    config = peft.OFTConfig(r=0, oft_block_size=3, coft=True, eps=0.2, use_cayley_neumann=False, target_modules=["0"])
    ours, theirs, layer, adapter = pair(nn.Linear(9, 6), config, svdpeft.OFT(block_size=3, eps=0.2))
    perturb(adapter)
    with torch.no_grad():
        layer.oft_R["default"].weight.copy_(upper(adapter.sites["0"].factors.Q, 3))
    adapter.after_step()  # ours after the step, theirs in the next forward
    x = torch.randn(4, 9).double()
    torch.testing.assert_close(theirs(x), ours(x))


def test_oft_of_a_convolution_differs_as_named():
    """Known difference: PEFT rotates patches of stride 1 and adds them up; its merged layer, and ours, is W0 R."""
    config = peft.OFTConfig(r=0, oft_block_size=3, use_cayley_neumann=False, target_modules=["0"])
    ours, theirs, layer, adapter = pair(nn.Conv2d(3, 5, 3), config, svdpeft.OFT(block_size=3))
    perturb(adapter)
    with torch.no_grad():
        layer.oft_R["default"].weight.copy_(upper(adapter.sites["0"].factors.Q[0], 3))
    x = torch.randn(2, 3, 6, 7).double()
    assert differs(theirs(x), ours(x))
    torch.testing.assert_close(theirs.merge_and_unload()(x), ours(x))


def test_boft():
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    ours, theirs, layer, adapter = pair(nn.Linear(8, 6), config, svdpeft.BOFT(block_size=4))
    x = torch.randn(4, 8).double()
    torch.testing.assert_close(theirs(x), ours(x))
    perturb(adapter)
    give_boft(adapter, layer, 4)
    torch.testing.assert_close(theirs(x), ours(x))
    # PEFT stores whole blocks, of which the skew part acts: N n b + m values for our N n (b − 1)/2 + m.
    assert layer.boft_R["default"].numel() == 8 * 4
    assert adapter.trainable_count == 8 * 3 // 2 + 6


def give_boft(adapter: Adapter, layer: Any, b: int) -> None:
    f = adapter.sites["0"].factors
    i, j = torch.tril_indices(b, b, -1)
    with torch.no_grad():
        q = torch.zeros(*f.Q.shape[:-1], b, b, dtype=torch.float64)
        q[..., i, j] = f.Q
        layer.boft_R["default"].copy_(q - q.mT)
        layer.boft_s["default"].copy_(f.s.unsqueeze(-1))


@pytest.mark.parametrize(("n", "factors"), [(8, 2), (16, 2), (16, 3), (32, 4)])
def test_butterflies(n: int, factors: int):
    """PEFT's permutations and their order. It uses them with its CUDA extension alone: without it N is 1."""
    from peft.tuners.boft.layer import BOFTLayer

    b = 4
    base, rotation = nn.Sequential(nn.Linear(n, 6, bias=False)).double(), torch.eye(n, dtype=torch.float64)
    w = base[0].weight.detach().clone()
    adapter = svdpeft.attach(base, svdpeft.BOFT(block_size=b, butterflies=factors))
    perturb(adapter)
    f = adapter.sites["0"].factors
    i, j = torch.tril_indices(b, b, -1)
    for k in range(factors):
        q = torch.zeros(n // b, b, b, dtype=torch.float64)
        q[:, i, j] = f.Q[k].detach()
        blocks = BOFTLayer.cayley_batch(None, 2 * q)  # of ½(X − Xᵀ)
        perm = BOFTLayer.block_butterfly_perm(None, n, n // b // 2**k, b // 2, factors - 1)
        p = torch.eye(n, dtype=torch.float64)[perm.long()]
        rotation = p @ torch.block_diag(*blocks) @ p.T @ rotation  # as BOFTLayer.get_delta_weight composes them
    theirs = (rotation @ w.T).T * f.s.detach().unsqueeze(-1)
    ours = w + adapter.delta("0")
    torch.testing.assert_close(ours, theirs)
