"""LoRA+ and Riemannian preconditioning against Hugging Face PEFT's optimizers, on the same factors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

import svdpeft

peft = pytest.importorskip("peft", reason="peft is not installed")
riemannian = pytest.importorskip("peft.optimizers.riemannian", reason="this peft has no such optimizer")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

STEPS, LR, RATIO = 5, 1e-2, 16.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(4)]


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def both() -> tuple[nn.Module, nn.Module, svdpeft.Adapter]:
    """Our model and theirs, with equal factors off their start."""
    torch.manual_seed(0)
    base = Net()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["a", "b"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, svdpeft.DoRA(svdpeft.LoRA(rank=2, alpha=4.0)), ["a", "b"])
    for name, site in adapter.sites.items():
        layer = getattr(theirs.base_model.model, name)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=0.3)
            site.factors.L.copy_(layer.lora_B["default"].weight)
            site.factors.A.copy_(layer.lora_A["default"].weight)
    return base, theirs, adapter


def same(theirs: nn.Module, adapter: svdpeft.Adapter, start: dict[str, Tensor]) -> None:
    for name, site in adapter.sites.items():
        layer = theirs.base_model.model.get_submodule(name)  # type: ignore[union-attr]
        for mine, other in (
            (site.factors.L, layer.lora_B["default"].weight),
            (site.factors.A, layer.lora_A["default"].weight),
            (site.factors.mag, layer.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert (site.factors.L - start[f"{name}/L"]).abs().max() > 1e-2


def test_riemannian_preconditioning():
    """Known difference: their damping is 1e-2 where the published code, and ours, has 1e-6."""
    base, theirs, adapter = both()
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    mine = torch.optim.AdamW(adapter.parameters(), lr=LR)
    other = riemannian.create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=LR, reg=1e-2)
    batch = collate(rows())
    for _ in range(STEPS):
        for model, optimizer in ((base, mine), (theirs, other)):
            optimizer.zero_grad()
            F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            if optimizer is mine:
                adapter.before_step(LR, gradients=svdpeft.Riemannian(delta=1e-2))
            optimizer.step()
    same(theirs, adapter, start)


def test_loraplus(tmp_path: Path):
    """Known difference: theirs gives every vector the rate of B, DoRA's magnitudes too; here ``role_lr`` says so."""
    base, theirs, adapter = both()
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    other = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    batch = collate(rows())
    theirs.train()
    for _ in range(STEPS):
        other.zero_grad()
        F.cross_entropy(theirs(batch["x"]), batch["labels"]).backward()
        other.step()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    svdpeft.Trainer(
        base, adapter, args, {"mag": RATIO * LR}, loraplus_ratio=RATIO, train_dataset=rows(), data_collator=collate
    ).train()
    same(theirs, adapter, start)
