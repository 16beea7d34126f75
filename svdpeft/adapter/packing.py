"""Whole numbers in few bytes: positions in a core, in ascending order, are a byte or two each and not eight."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def packed(tensor: Tensor) -> Tensor:
    """Return the differences of an int64 tensor's neighbours, compressed, as bytes.

    Example:
        >>> index = torch.arange(0, 30_000, 10)
        >>> len(packed(index)) < 100, torch.equal(unpacked(packed(index), [3000]), index)
        (True, True)
    """
    flat = tensor.detach().cpu().flatten().numpy().astype("<i8")
    planes = np.diff(flat, prepend=np.int64(0)).view(np.uint8).reshape(-1, 8).T  # the high bytes are nearly all equal
    return torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 9)), dtype=torch.uint8)


def unpacked(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what was packed.

    Raises:
        ValueError: it is not as many numbers.
    """
    count = 8 * math.prod(shape)
    try:
        found = zlib.decompressobj().decompress(tensor.numpy().tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"whole numbers that cannot be unpacked: {error}") from error
    if len(found) != count:
        raise ValueError(f"not the {count // 8} whole numbers that the header states")
    steps = np.ascontiguousarray(np.frombuffer(found, np.uint8).reshape(8, -1).T).view("<i8").reshape(-1)
    return torch.from_numpy(np.cumsum(steps, dtype=np.int64)).reshape(tuple(shape))
