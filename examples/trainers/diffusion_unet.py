"""A diffusion U-Net of diffusers: the noise of one picture, learned in the attention and in the convolutions.

    python examples/trainers/diffusion_unet.py --out runs/diffusion

A small U-Net with random weights; with ``UNet2DConditionModel.from_pretrained(…)`` the loop is the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

import svdpeft

STEPS, PEAK = 80, 1e-2


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def main(out: Path) -> None:
    model, noise = unet(), DDPMScheduler(num_train_timesteps=20)
    picture = torch.linspace(-1, 1, 8).expand(16, 3, 8, 8)  # a grey ramp

    adapter = svdpeft.attach(
        model,
        targets={
            ".*(to_q|to_k|to_v)": svdpeft.SORSA(rank=4),
            ".*(conv1|conv2|conv_in|conv_out)": svdpeft.PiSSA(rank=4),
        },
        clip_rank=True,
    )
    print(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), PEAK)
    losses = []
    for _ in range(STEPS):
        target, times = torch.randn_like(picture), torch.randint(20, (16,))
        loss = F.mse_loss(model(noise.add_noise(picture, target, times), times).sample, target)
        loss.backward()
        adapter.before_step(PEAK, STEPS)
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {sum(losses[:5]) / 5:.3f} at the start, {sum(losses[-5:]) / 5:.3f} at the end")
    adapter.save(out / "adapter")

    adapter.merge(permanent=True)  # a plain U-Net again: a pipeline knows of no adapter
    pipeline = DDPMPipeline(model, noise)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(batch_size=1, num_inference_steps=20, generator=generator, output_type="np").images
    pipeline.save_pretrained(out / "pipeline")
    print(f"drawn: columns from {drawn[0, :, 0].mean():.2f} to {drawn[0, :, -1].mean():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion"))
    main(parser.parse_args().out)
