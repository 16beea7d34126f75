"""AdaLoRA against Hugging Face PEFT: forward, scale, penalty, schedule, importance and masks, step by step."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import svdpeft
from svdpeft import AdaLoRA, Budget

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

ROLES = {"L": "lora_B", "C": "lora_E", "A": "lora_A"}  # ours and theirs; their E is a column


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 6, dtype=torch.float64), nn.Linear(6, 7, dtype=torch.float64)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def both(total: int, tinit: int = 0, tfinal: int = 0, interval: int = 1, alpha: float = 5.0, **ours):
    """One base, their adapter and ours with the same factors."""
    torch.manual_seed(0)
    base = Net()
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=interval,
        beta1=0.8,
        beta2=0.7,
        lora_alpha=alpha,
        total_step=total,
        target_modules=["a", "b"],
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    fields = {"target_rank": 2, "t_initial": tinit, "t_final": tfinal, "interval": interval, "beta1": 0.8, "beta2": 0.7}
    ours = {"scaling": "code", "gamma": 0.0, **ours}
    adapter = svdpeft.attach(base, AdaLoRA(rank=4, alpha=alpha, allocate=Budget(**fields, importance="code"), **ours))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, site in adapter.sites.items():
            layer = getattr(theirs.base_model.model, name)
            for role, other in ROLES.items():
                p = getattr(site.factors, role)
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                there = getattr(layer, other)["default"]
                there.data = p.detach().clone().reshape(there.shape)  # PEFT casts its own to float32
    return base, adapter, theirs


def factors(theirs, name: str):
    layer = getattr(theirs.base_model.model, name)
    return {role: getattr(layer, other)["default"] for role, other in ROLES.items()}


def test_start_and_forward_and_scale():
    base, adapter, theirs = both(total=10)
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), base(x), rtol=1e-6, atol=1e-7)  # PEFT keeps r + 1e-5 in float32
    # Difference: the paper divides α by r, PEFT by r + 1e-5.
    assert AdaLoRA(rank=4, alpha=5).scale == 5 / 4
    assert adapter.sites["a"].method.scale == 5 / (4 + 1e-5)
    # The starts are drawn from the same distributions, and λ is zero in both.
    torch.manual_seed(0)
    fresh = peft.get_peft_model(Net(), peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["a", "b"]))
    ours = svdpeft.attach(Net(), AdaLoRA(rank=4)).sites["a"].factors
    there = factors(fresh, "a")
    for role in ("L", "A"):
        assert 0.012 < float(there[role].std()) < 0.028
        assert 0.012 < float(getattr(ours, role).std()) < 0.028
    assert not there["C"].any()
    assert not ours.C.any()


def test_the_penalty_of_the_code():
    """PEFT adds it to a loss that the model returns; here it is taken from there."""
    _, adapter, theirs = both(total=10, gamma=0.5, regulariser="code")

    theirs.base_model.model.forward = lambda x: SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    found = theirs.base_model(torch.zeros(1)).loss
    torch.testing.assert_close(adapter.penalty().detach(), found.detach())
    # Difference: the paper's is the sum of squares.
    assert AdaLoRA().regulariser == "paper"


@pytest.mark.parametrize(("tinit", "tfinal", "interval"), [(0, 0, 1), (2, 3, 1), (1, 4, 2), (3, 0, 3)])
def test_budget_importance_and_masks_of_every_step(tinit: int, tfinal: int, interval: int):
    total = 12
    _, adapter, theirs = both(total, tinit, tfinal, interval)
    budget = adapter.sites["a"].method.allocate
    allocator = theirs.base_model.rankallocator
    generator = torch.Generator().manual_seed(2)
    lr = 0.05
    for t in range(1, total + 1):
        assert budget.triplets(t, total, first=8, last=4) == allocator.budget_schedule(t)[0]
        with torch.no_grad():
            for name, site in adapter.sites.items():
                there = factors(theirs, name)
                for role in ROLES:
                    p = getattr(site.factors, role)
                    p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    there[role].grad = p.grad.clone().reshape(there[role].shape)
                    there[role].sub_(lr * there[role].grad)
        adapter.before_step(lr, total)
        with torch.no_grad():
            for p in adapter.parameters():
                p.sub_(lr * p.grad)
        adapter.after_step()
        theirs.base_model.update_and_allocate(t)
        for name, site in adapter.sites.items():
            there = factors(theirs, name)
            for role in ROLES:
                p = getattr(site.factors, role)
                assert torch.equal(p.detach(), there[role].detach().reshape(p.shape)), f"step {t}: {name}.{role}"
            if t < total - tfinal:
                key = next(k for k in allocator.exp_avg_ipt if k.startswith(f"{name}.lora_B"))
                assert torch.equal(site.factors.memory["importance.L"], allocator.exp_avg_ipt[key])
                assert torch.equal(site.factors.memory["uncertainty.L"], allocator.exp_avg_unc[key])
    assert sum(int((site.factors.C == 0).sum()) for site in adapter.sites.values()) == 4
    for name, site in adapter.sites.items():
        pattern = next(v for k, v in theirs.peft_config["default"].rank_pattern.items() if k.startswith(f"{name}."))
        assert site.factors.memory["kept"].tolist() == pattern


def test_what_is_different_on_purpose():
    # 1. The weight: the paper multiplies weight and gradient of one step, PEFT the weight after the step.
    assert Budget().importance == "paper"
    # 2. A target equal to the rank: PEFT asks for the 0-th smallest score and fails, here nothing is left out.
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=4, target_r=4, total_step=5, target_modules=["a", "b"])
    theirs = peft.get_peft_model(Net(), config)
    for p in theirs.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, IndexError)):
        theirs.base_model.update_and_allocate(1)
    # 3. Equal scores: PEFT leaves out every triplet at the threshold, here the budget is met and the first stay.
    base, adapter, theirs = both(total=4)
    for p in [*adapter.parameters(), *theirs.parameters()]:
        p.grad = torch.zeros_like(p)
    adapter.before_step(0.1, 4)
    adapter.after_step()
    theirs.base_model.update_and_allocate(1)
    assert sum(int((site.factors.C != 0).sum()) for site in adapter.sites.values()) == 5  # int(4 + 4 · (3/4)³)
    assert sum(int((factors(theirs, name)["C"] != 0).sum()) for name in "ab") == 0
    # 4. Nobody calls the allocator: PEFT trains a plain LoRA without a word, here the second forward raises.
    base, adapter, theirs = both(total=4)
    x = torch.randn(3, 9, dtype=torch.float64)
    for model in (base, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for again in range(2):
            if again and model is base:
                with pytest.raises(RuntimeError, match="has not done its own step"):
                    model(x)
                break
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
