"""What a program around us may have switched on, and what nothing that we make depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def ordinary() -> Iterator[None]:
    """Within the block new tensors are ordinary ones on the CPU where nobody says otherwise.

    Under ``with torch.device("meta")``, ``set_default_device`` or ``inference_mode`` an adapter would else be made of
    tensors without values, on another device than its layer, or of such as cannot train. Generators of random starts
    are the CPU's, so that a seed means the same everywhere.
    """
    elsewhere = torch.empty(0).device.type != "cpu"  # else no block: within one every call goes through Python
    with torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
        yield
