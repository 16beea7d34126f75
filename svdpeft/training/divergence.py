"""A training that has diverged: found at the first gradient that is not finite, before the optimizer spreads it."""

from __future__ import annotations

import torch
from torch.nn.utils import get_total_norm

from svdpeft.adapter.adapter import Adapter
from svdpeft.sites.shards import gathered

# A scaler for float16 halves its factor at every overflow, from 65,536: after so many in a row it is 2^-16, and it is
# not the factor that overflows.
MOST_SKIPPED = 32


class Diverged(ArithmeticError):
    """A loss, a gradient or a value is no longer finite; the adapter holds what the last good step left."""


@torch.no_grad()
def check_gradients(adapter: Adapter, step: int) -> None:
    """Look at the gradients before the optimizer does; costs one norm over all of them, and waits for the device.

    Args:
        adapter: whose parameters' gradients are complete.
        step: that they are of, for the message.

    Raises:
        Diverged: a gradient is not finite; the message names its site.
    """
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    if torch.isfinite(gathered(get_total_norm(gradients.values()))):  # the same answer in all processes
        return
    bad = [name for name, gradient in gradients.items() if not torch.isfinite(gathered(gradient)).all()]
    if bad:  # and not only their norm, which may overflow where no gradient does
        others = f" and of {len(bad) - 1} others" if len(bad) > 1 else ""
        raise Diverged(
            f"step {step}: the gradient of {bad[0]}{others} is not finite; adapter {adapter.name!r} holds the values "
            f"of step {step - 1}. A smaller learning rate, a longer warm-up or clipping may help; a loss that is not "
            "finite from the start comes from the data or from the model's dtype"
        )


def check_skipped(skipped: int) -> None:
    """Raise ``Diverged`` where a scaler of float16 has skipped too many steps in a row."""
    if skipped >= MOST_SKIPPED:
        raise Diverged(
            f"the last {skipped} steps were skipped, as gradients in float16 were not finite: train in bfloat16 or "
            "float32, or with a smaller learning rate"
        )
