"""Lightning: an adapter in a ``LightningModule``; its checkpoints hold what trains, and no base.

    python examples/trainers/lightning_loop.py --out runs/lightning

A small vision transformer of timm with random weights learns red, green and blue.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import svdpeft


class Adapted(lightning.LightningModule):
    """Trains one adapter of a model."""

    def __init__(self, adapter: svdpeft.Adapter, peak: float) -> None:
        super().__init__()
        self.model, self.adapter, self.peak = adapter.model, adapter, peak

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.adapter.parameters(), self.peak)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        pictures, labels = batch
        loss = F.cross_entropy(self.model(pictures), labels)
        self.log("loss", loss)
        penalty = self.adapter.penalty()
        return loss if penalty is None else loss + penalty / self.trainer.accumulate_grad_batches

    def configure_gradient_clipping(self, optimizer: Any, *clipping: Any, **how: Any) -> None:
        super().configure_gradient_clipping(optimizer, *clipping, **how)
        self.adapter.before_step(self.peak, int(self.trainer.estimated_stepping_batches))  # after clipping

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.adapter.after_step(optimizer.param_groups[0]["lr"] / self.peak)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.adapter.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.adapter.load_state_dict(checkpoint["state_dict"])
        checkpoint["state_dict"] = self.state_dict()  # the base is there already


def adapted() -> Adapted:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=3)
    return Adapted(svdpeft.attach(model, svdpeft.SORSA(rank=4), train=["head"]), peak=3e-3)


def trainer(out: Path) -> lightning.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saving = ModelCheckpoint(out, "last", enable_version_counter=False)
    return lightning.Trainer(max_epochs=8, devices=1, gradient_clip_val=1.0, callbacks=[saving], **quiet)


def main(out: Path) -> None:
    module = adapted()
    print(module.adapter)
    labels = torch.arange(24) % 3
    pictures = torch.rand(24, 3, 32, 32) + F.one_hot(labels, 3)[:, :, None, None]
    batches = DataLoader(TensorDataset(pictures, labels), batch_size=8, shuffle=True)
    fitted = trainer(out)
    fitted.fit(module, batches)

    again = adapted()
    trainer(out).fit(again, batches, ckpt_path=out / "last.ckpt")  # goes on from there; here nothing is left to do
    with torch.no_grad():
        found, resumed = (m.model.cpu().eval()(pictures) for m in (module, again))
    assert torch.equal(found, resumed)
    right = (found.argmax(-1) == labels).float().mean()
    print(f"loss {float(fitted.callback_metrics['loss']):.3f}, accuracy {float(right):.2f}")
    saved, whole = (out / "last.ckpt").stat().st_size, 4 * sum(p.numel() for p in module.model.parameters())
    print(f"last.ckpt: {saved // 1024:,} KiB with the optimizer's averages; the model: {whole // 1024:,} KiB")
    module.adapter.save(out / "adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    main(parser.parse_args().out)
