"""How long a program takes that ran on shapes alone: each distinct call of torch that it made is timed once, here.

A call that is too large for that is timed at a half and a quarter of its long sides, and goes on growing as it did
between the two.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

LARGEST, LARGEST_SOLVED = 2**24, 2**20  # values in a call that is timed as it is; in one that decomposes
LONG = 64  # sides that are halved
LONG_CALL = 0.05  # seconds, beside which what a first call prepares is nothing
DRAWN = 1_000_003  # normal numbers, which are repeated: drawing takes longer than what is timed. A prime: rows differ


class Shape(NamedTuple):
    """A tensor without values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def halved(self) -> Shape:
        """The same with half of every long side."""
        size = tuple(-(-side // 2) if side >= LONG else side for side in self.size)
        order = sorted(range(len(size)), key=lambda axis: self.stride[axis])
        stride, step = [0] * len(size), 1
        for axis in order:  # the layout stays
            stride[axis], step = step if self.stride[axis] else 0, step * size[axis]
        return Shape(size, tuple(stride), self.dtype)

    def values(self) -> Tensor:
        """A tensor of that shape: normal numbers, or zeros where they are no real numbers."""
        if 0 in self.stride or not self.dtype.is_floating_point:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype).zero_()
        needed = 1 + sum((side - 1) * step for side, step in zip(self.size, self.stride, strict=True))
        flat = _normal(self.dtype).repeat(-(-needed // DRAWN)) if needed > DRAWN else _normal(self.dtype).clone()
        return flat.as_strided(self.size, self.stride)


@functools.cache
def _normal(dtype: torch.dtype) -> Tensor:
    return torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).to(dtype)


class Call(NamedTuple):
    """A call of torch, by its shapes."""

    function: Any
    leaves: tuple[Hashable, ...]

    @property
    def limit(self) -> int:
        """The number of values up to which it is timed as it is."""
        return LARGEST_SOLVED if "linalg" in str(self.function) else LARGEST

    def size(self) -> int:
        """Values of the largest tensor."""
        shapes = (leaf for leaf in self.leaves if isinstance(leaf, Shape))
        return max((torch.Size(shape.size).numel() for shape in shapes), default=0)

    def halved(self) -> Call:
        """The same on half of every long side."""
        leaves = (leaf.halved() if isinstance(leaf, Shape) else leaf for leaf in self.leaves)
        return Call(self.function, tuple(leaves))


class Calls(TorchDispatchMode):
    """Counts the calls that are made within its block, by function and shapes; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Call] = Counter()
        self._trees: dict[Call, TreeSpec] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            leaves, tree = tree_flatten((args, kwargs or {}))
            call = Call(func, tuple(_outline(leaf) for leaf in leaves))
            if call.size():
                self.counts[call] += 1
                self._trees[call] = tree
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """Time each of them on this machine, and return what all of them take together."""
        return sum(self._seconds(call, self._trees[call]) * count for call, count in self.counts.items())

    def _seconds(self, call: Call, tree: TreeSpec) -> float:
        smaller, halvings = call, 0
        while smaller.size() > call.limit:
            smaller, halvings = smaller.halved(), halvings + 1
        taken = _time(smaller, tree)
        if not halvings:
            return taken
        growth = taken / max(_time(smaller.halved(), tree), 1e-9)
        return taken * min(max(growth, 1.0), 8.0) ** halvings


def _outline(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return Shape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)
    if isinstance(leaf, torch.Generator):
        return None
    return tuple(leaf) if isinstance(leaf, list) else leaf


def _time(call: Call, tree: TreeSpec) -> float:
    """Seconds of one call, at the second go unless the first is a long one."""
    args, kwargs = tree_unflatten([v.values() if isinstance(v, Shape) else v for v in call.leaves], tree)
    started = time.perf_counter()
    with suppress(RuntimeError):  # random numbers may be no matrix that it wants: what it has cost until then counts
        for _ in range(2):
            started = time.perf_counter()
            call.function(*args, **kwargs)
            if time.perf_counter() - started > LONG_CALL:
                break
    return time.perf_counter() - started
