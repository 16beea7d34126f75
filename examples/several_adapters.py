"""Several adapters on one base: switched, mixed in one batch, made into one.

    python examples/several_adapters.py --out runs/several

A small vision transformer of timm with random weights learns the colour of a picture, and then whether it is bright.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import svdpeft


def train(adapter: svdpeft.Adapter, pictures: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), 3e-3)
    for _ in range(30):
        loss = F.cross_entropy(adapter.model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        adapter.before_step(3e-3)
        optimizer.step()
        adapter.after_step()


def main(out: Path) -> None:
    torch.manual_seed(0)
    colour, bright = torch.arange(24) % 3, torch.arange(24) % 2
    pictures = 0.3 * torch.rand(24, 3, 32, 32) + F.one_hot(colour, 3)[:, :, None, None]
    pictures += bright[:, None, None, None]
    tasks = {"colour": (svdpeft.SORSA(rank=4), colour), "bright": (svdpeft.PiSSA(rank=4), bright)}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=3)

    for name, (method, labels) in tasks.items():
        adapter = svdpeft.attach(model, method, name=name)  # train=["head"]: with a head of its own
        train(adapter, pictures, labels)
        adapter.save(out / name)
        adapter.disable()  # the next one starts from the base

    model.eval()
    with torch.no_grad():
        for name, (_, labels) in tasks.items():
            with svdpeft.only(model, name):
                right = (model(pictures).argmax(-1) == labels).float().mean()
            print(f"{name}: accuracy {float(right):.2f}")
        svdpeft.only(model, *tasks)  # both on
        with svdpeft.adapters(model)["colour"].per_example(["colour", "bright", None] * 8):
            mixed = model(pictures)
        for i, name in enumerate(tasks):
            with svdpeft.only(model, name):
                torch.testing.assert_close(mixed[i::3], model(pictures)[i::3], rtol=1e-4, atol=1e-5)
        print("one batch, rows of either and of the base: as each alone")

    both = svdpeft.combine([(svdpeft.adapters(model)[name], 0.5) for name in tasks], name="both")
    print(both)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/several"))
    main(parser.parse_args().out)
