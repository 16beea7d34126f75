"""Small matrices in their own precision, whatever the autocast around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Within the block nothing on q's device is computed in half precision, as autocast would r×r matrices.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.eye(2)):
        ...     (torch.eye(2) @ torch.eye(2)).dtype
        torch.float32
    """
    return nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)  # where it is not known
