"""The tensors of one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from svdpeft.methods.base.progress import optimizer_steps

Tensors = dict[str, Tensor]


class Factors(nn.Module):
    """The tensors of one site by name (``L``, ``C``, ``A`` and what a method adds), a child of the adapted layer.

    Everything floating point is a parameter, the frozen ones with ``requires_grad=False``: unlike buffers they are
    sharded with the layer and are not broadcast at every step. Start values are called ``L0``, ``C0``, ``A0``.

    Args:
        tensors: of this site alone.
        trains: names of those that train.
        tied: what several sites share, the same objects in each: parameters, and integer tensors.
        shape: (batch, m, n) of the site, for methods that cut their part out of what is shared.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            """Whatever a method calls its tensors."""
            ...

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        trains: Sequence[str],
        tied: dict[str, Tensor] | None = None,
        shape: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.trains, self.tied, self.shape = tuple(trains), tuple(tied or ()), shape
        self._shared = {} if tied is None else tied  # one mapping in all sites of a group
        self.origin: Any = None  # what the site was started from, where that is known
        self.memory: Tensors = {}  # what a method keeps from step to step: of a training, not of the adapter
        self._seen: list[tuple[int, int]] | None = None
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                # contiguous, as it comes back from a file: another layout may take another kernel
                self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=name in trains))
            else:
                self.register_buffer(name, tensor)
        for name, tensor in (tied or {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Factors:
        """Move or cast: a parameter keeps its identity, and a shared integer tensor is moved once for all sites."""
        super()._apply(fn, recurse)
        for name in self._buffers.keys() & self._shared.keys():
            moved, shared = self._buffers[name], self._shared[name]
            assert moved is not None
            if moved.device == shared.device:
                self._buffers[name] = shared
            else:
                self._shared[name] = moved
        return self

    def tensors(self) -> Tensors:
        """Every tensor of the site, detached, by name."""
        return {name: t.detach() for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def instead(self, **tensors: Tensor) -> Factors:
        """The site's tensors with others in the place of some, for one forward."""
        return cast("Factors", _Seen({**dict(self.named_parameters()), **dict(self.named_buffers()), **tensors}))

    def was_stepped(self) -> bool:
        """Whether an optimizer has stepped since this was last asked, and ``settle`` was not called since."""
        trained = [p for p in self._parameters.values() if p is not None and p.requires_grad]
        now = [(id(p), optimizer_steps(p)) for p in trained]
        seen, self._seen = self._seen, now
        return seen is not None and any(a[0] == b[0] and a != b for a, b in zip(seen, now, strict=False))

    def settle(self) -> None:
        """Take what is there as it is: a method's own step was done, or another state was loaded."""
        self._seen = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()  # a copy has parameters of its own

    def started(self, name: str) -> Tensor:
        """The start value of a factor: ``L0`` where ``L`` trains, ``L`` itself where it is frozen."""
        return getattr(self, f"{name}0" if f"{name}0" in self._parameters else name)


class _Seen:
    """Tensors by name; no SimpleNamespace, which a compiler cannot enter."""

    def __init__(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


def share(tensors: Tensors, trains: Sequence[str]) -> Tensors:
    """Make what several sites will share: parameters, and integer tensors as they are."""
    return {
        name: nn.Parameter(t.contiguous(), requires_grad=name in trains) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the positions of tensors that can be stacked, so that one batched call serves many sites.

    Example:
        >>> by_shape([torch.zeros(2, 3), torch.zeros(1), torch.zeros(2, 3)])
        [[0, 2], [1]]
    """
    groups: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(groups.values())
