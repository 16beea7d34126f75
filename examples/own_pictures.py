"""Pictures of one's own: timm's augmentation, an average of the weights, and the adapter of that average.

    python examples/own_pictures.py --pictures FOLDER --model dinov2-vits14 --out my-adapter

FOLDER has one folder per class. Without it three classes of plain colours are drawn, and a small random model learns
them. ``svdpeft train --model … --data FOLDER`` does the same without augmentation and average.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.datasets import ImageFolder
from transformers import TrainerCallback, TrainingArguments

import svdpeft


def draw(folder: Path) -> Path:
    """Red, green and blue pictures with noise."""
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(16):
            pixels = torch.randint(0, 120, (32, 32, 3), generator=generator, dtype=torch.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


class Average(TrainerCallback):
    """Keep a moving average of an adapted model: a deep copy, whose adapter is found by its name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ema.update(model, step=state.global_step)


def main(pictures: Path | None, name: str | None, out: Path, epochs: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = draw(Path(temporary) / "pictures") if pictures is None else pictures
        classes = len(ImageFolder(str(folder)).classes)
        if name is None:
            model: Any = timm.create_model("resnet10t", pretrained=False, num_classes=classes)
            head, config = "fc", {**resolve_model_data_config(model), "input_size": (3, 32, 32), "crop_pct": 1.0}
        else:
            loaded = svdpeft.models.load(name, num_classes=classes)
            model, head, config = loaded.model, str(loaded.head), loaded.processor
        keys = ("input_size", "interpolation", "mean", "std")
        known = {key: config[key] for key in keys}
        augmented = create_transform(**known, is_training=True, hflip=0.5, color_jitter=None, scale=(0.6, 1.0))
        plain = create_transform(**known, crop_pct=config["crop_pct"])

        adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=4), train=[head], clip_rank=True)
        print(adapter)
        average = Average(model, decay=0.9)
        trainer = svdpeft.Trainer(
            model,
            adapter,
            TrainingArguments(
                output_dir=str(Path(temporary) / "training"),
                num_train_epochs=epochs,
                per_device_train_batch_size=16,
                learning_rate=5e-3,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1000,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=ImageFolder(str(folder), augmented),
            callbacks=[average],
        )
        trainer.train()
        best = average.ema.module.eval()
        svdpeft.adapters(best)["default"].save(out)
        held = ImageFolder(str(folder), plain)
        with torch.no_grad():
            x, y = torch.stack([held[i][0] for i in range(len(held))]), torch.tensor(held.targets)
            right = (best(x.to(next(best.parameters()).device)).argmax(-1).cpu() == y).float().mean()
        print(f"accuracy of the average on the pictures that it has seen: {float(right):.2f}; adapter in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--model", help="such as dinov2-vits14; a small random one unless said")
    parser.add_argument("--out", type=Path, default=Path("my-adapter"))
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    main(given.pictures, given.model, given.out, given.epochs)
