"""timm's own training loop: its optimizer, its schedule per update, mixup, and the average of the weights.

    python examples/trainers/timm_loop.py --out runs/timm

A small ResNet of timm with random weights learns red, green and blue; convolutions are adapted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch.nn import functional as F

import svdpeft

EPOCHS, UPDATES, PEAK = 14, 3, 5e-3


def main(out: Path) -> None:
    torch.manual_seed(0)
    labels = torch.arange(24) % 3
    pictures = torch.rand(24, 3, 32, 32) + F.one_hot(labels, 3)[:, :, None, None]
    model: Any = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=4), train=["fc"], clip_rank=True)
    print(adapter)

    # Parameters, not the model: timm would group and decay everything that the base has.
    optimizer = create_optimizer_v2(list(adapter.parameters()), opt="adamw", lr=PEAK, weight_decay=0.0)
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=UPDATES
    )
    mixup, criterion = Mixup(mixup_alpha=0.2, num_classes=3), SoftTargetCrossEntropy()
    average = ModelEmaV3(model, decay=0.9, use_warmup=True)
    updates = 0
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for rows in torch.randperm(24).view(UPDATES, 8):
            x, y = mixup(pictures[rows], labels[rows])
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            if (penalty := adapter.penalty()) is not None:
                loss = loss + penalty
            loss.backward()
            adapter.before_step(PEAK, epochs * UPDATES)
            optimizer.step()
            adapter.after_step(optimizer.param_groups[0]["lr"] / PEAK)
            updates += 1
            average.update(model, step=updates)
            schedule.step_update(num_updates=updates)
            losses.update(loss.item(), len(rows))
        schedule.step(epoch + 1)
        if epoch in (0, epochs - 1):
            print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, lr {optimizer.param_groups[0]['lr']:.1e}")

    with torch.no_grad():
        right = (average.module(pictures).argmax(-1) == labels).float().mean()
    print(f"accuracy of the average {float(right):.2f}")
    svdpeft.adapters(average.module)["default"].save(out)  # the average's own adapter: a copy has copies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/timm"))
    main(parser.parse_args().out)
