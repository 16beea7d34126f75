"""From an adapter to a plain model: merged weights, a strict state dict, torch.compile, torch.export and ONNX.

    python examples/ship.py --out shipped

A timm model with random weights is adapted, and what is shipped is held against it. ONNX needs the package onnxscript.
"""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

import svdpeft


def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    name, options = "vit_tiny_patch16_224", {"img_size": 32, "num_classes": 5, "depth": 2}
    model = timm.create_model(name, pretrained=False, **options).eval()
    x = torch.randn(2, 3, 32, 32)

    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=4), train=["head"])
    with torch.no_grad():  # the training
        for parameter in adapter.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        adapted = model(x)

    def tell(what: str, y: torch.Tensor) -> None:
        torch.testing.assert_close(y, adapted, rtol=1e-4, atol=1e-5)
        print(f"{what}: largest difference {float((y - adapted).abs().max()):.1e}")

    # A state dict of the plain model, without touching the adapted one.
    torch.save(adapter.merged_state_dict(), out / "model.pth")
    plain = timm.create_model(name, pretrained=False, **options).eval()
    plain.load_state_dict(torch.load(out / "model.pth", weights_only=True), strict=True)
    with torch.no_grad():
        tell("timm's strict state dict", plain(x))

    # The model itself, for good: no factor, hook or class of svdpeft is left in it.
    merged = copy.deepcopy(model)
    print(svdpeft.adapters(merged)["default"].merge(permanent=True))
    with torch.no_grad():
        tell("merged", merged(x))
        tell("torch.compile", torch.compile(merged, backend="eager", fullgraph=True)(x))
        program = torch.export.export(merged, (x,))
        torch.export.save(program, out / "model.pt2")
        tell("torch.export, from the file", torch.export.load(out / "model.pt2").module()(x))
    if find_spec("onnxscript") is None:
        print("ONNX: left out, pip install onnxscript")
    else:
        torch.onnx.export(merged, (x,), out / "model.onnx", dynamo=True)
        print(f"ONNX: {out / 'model.onnx'}")

    # An adapted model can be exported as it is, too: the update is in the program.
    with torch.no_grad():
        tell("torch.export of the adapted model", torch.export.export(model, (x,)).module()(x))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shipped"))
    main(parser.parse_args().out)
