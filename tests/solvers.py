"""Another solver: every choice that a decomposition leaves free is made at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

F64 = {"dtype": torch.float64}
EQUAL = 1e-13  # of the largest value: what no solver tells apart


def another_solver(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Let torch.linalg.svd and eigh choose at random: signs, bases of clusters and of kernels; and round otherwise."""
    svd, eigh, random = torch.linalg.svd, torch.linalg.eigh, torch.Generator().manual_seed(seed)

    def turned(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=random, **F64)).Q

    def choose(left: Tensor, values: Tensor, right: Tensor | None = None) -> None:
        """Turn the columns of left, and with them the rows of right, within clusters."""
        size = values.abs().max()
        start = 0
        for end in range(1, len(values) + 1):
            if end == len(values) or (values[start] - values[end]).abs() > EQUAL * size:
                turn = turned(end - start)
                left[:, start:end] = left[:, start:end] @ turn
                if right is not None:
                    kernel = values[start] <= EQUAL * size
                    right[start:end] = (turned(end - start) if kernel else turn).mT @ right[start:end]
                start = end

    def solve(w: Tensor, full_matrices: bool = True, driver: Any = None) -> Any:
        right, s, left = svd(w.mT.contiguous(), full_matrices=full_matrices)  # of the transpose: it rounds otherwise
        u, vh = left.mT.contiguous(), right.mT.contiguous()
        for each in zip(
            u.view(-1, *u.shape[-2:]), s.reshape(-1, s.shape[-1]), vh.view(-1, *vh.shape[-2:]), strict=True
        ):
            choose(*each)
        return torch.return_types.linalg_svd((u, s, vh))

    def eigen(a: Tensor) -> Any:
        values, vectors = eigh(a)
        vectors = vectors.contiguous()
        for each in zip(vectors.view(-1, *vectors.shape[-2:]), values.reshape(-1, values.shape[-1]), strict=True):
            choose(*each)
        return torch.return_types.linalg_eigh((values, vectors))

    monkeypatch.setattr(torch.linalg, "svd", solve)
    monkeypatch.setattr(torch.linalg, "eigh", eigen)
