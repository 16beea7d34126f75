"""What a method may say beside its start and its way of acting. Each default means: nothing of the kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Product
from svdpeft.methods.base.factors import Factors, Tensors
from svdpeft.methods.base.given import Given
from svdpeft.methods.base.kind import Kind
from svdpeft.methods.base.method import Method
from svdpeft.methods.base.progress import Progress


@dataclass(frozen=True)
class Hooks(Method):
    """Where a method has a say: its class attributes, what sites share, and the steps of a training.

    A method overrides the few of these that it needs; a method around another one (``DoRA``) forwards them all.

    Example:
        >>> from svdpeft.registry import KINDS
        >>> svdpeft.CorDA().needs, svdpeft.CorDA().why_not(KINDS["linear"]()), svdpeft.VeRA(rank=4).draws
        ('inputs', None, True)
    """

    exact_start: ClassVar[bool] = True  # the adapted model starts as the base model
    depends_on_base: ClassVar[bool] = True  # False: what the base holds there does not matter to the adapted weight
    draws: ClassVar[bool] = False  # its start, or a part of it, is drawn from the seed
    smallest: ClassVar[tuple[int, int]] = (1, 1)  # the smallest matrix, m×n, that it is defined on
    settable: ClassVar[tuple[str, ...]] = ()  # frozen one-element tensors that adapter.set() writes
    pairs: ClassVar[tuple[str, ...]] = ()  # it decomposes products of an attention's weights by head: "qk", "vo"
    needs: ClassVar[Literal["", "inputs", "gradients"]] = ""  # what of a calibration it starts from
    family: ClassVar[str] = ""  # one of ``svdpeft.zoo.FAMILIES``, where it does not follow from what trains
    knob: ClassVar[str] = "rank"  # the hyper-parameter that a budget turns

    def knob_values(self, sites: Sequence[Given]) -> Sequence[Any]:
        """The values of the knob that a budget may choose, the smallest count first."""
        return range(1 if self.knob == "rank" else 0, max(min(site.shape[1:]) for site in sites) + 1)

    def why_not(self, kind: Kind) -> str | None:
        """Why the method is not defined on a layer kind, or ``None`` where it is.

        ``targets`` leaves a weight of that kind with this reason, or refuses it where it was named.
        """
        if self.needs == "inputs" and not kind.sees:
            return (
                f"{type(self).__name__} starts from the inputs of a layer, and weights of kind {kind.name!r} see none"
            )
        return None

    @property
    def dropout(self) -> float:  # a field of the methods that have one
        """Probability with which an entry of the adapter's input is dropped in training."""
        return 0.0

    @property
    def preserves(self) -> bool:
        """Whether its start also asks for the inputs on data whose outputs are to stay: ``Calibration.preserving``."""
        return False

    @property
    def pair(self) -> Callable[[Factors], Product] | None:
        """How the change s L C A is read of a site, where L and A are its own thin factors and both train.

        What ``gradients=`` of a training is about, by a rule for two such factors; ``None``: the method has none.
        """
        return None

    # Tensors that several sites have in common.

    def group(self, given: Given) -> str | None:
        """The group of sites that share tensors with this one; ``None``: it shares nothing."""
        return None

    def share(self, group: Sequence[Given]) -> Tensors:
        """Return what the sites of one group share; names in ``trains`` train, integer tensors become buffers."""
        return {}

    def shared_count(self, group: Sequence[Given]) -> int:
        """Number of values that train and that all sites of one group share."""
        return 0

    # Around an optimizer step, for all sites of the method at once, so that equal shapes can be batched.

    def penalty(self, sites: Sequence[Factors]) -> Float[Tensor, ""] | None:
        """Return what is added to the loss, a scalar that is differentiable in what trains, or ``None``."""
        return None

    def before_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        """Change the gradients, after clipping and before the optimizer's step."""

    def after_step(self, sites: Sequence[Factors], progress: Progress) -> None:
        """Change the factors after the optimizer's step."""

    @property
    def changes_gradients(self) -> bool:
        """Whether ``before_step`` must be called for the method to be what its name says."""
        return False

    @property
    def keeps_state(self) -> bool:
        """Whether it keeps something from step to step, which a resumed run needs."""
        return False

    @property
    def has_step(self) -> bool:
        """Whether ``before_step`` or ``after_step`` does anything: a training that leaves it out is refused.

        By default where the class has one of its own; a method whose step depends on its hyper-parameters says here on
        which.
        """
        return self._steps_beyond(Hooks)

    def _steps_beyond(self, base: type[Hooks]) -> bool:
        names = ("before_step", "after_step")
        return any(getattr(type(self), name) is not getattr(base, name) for name in names)
