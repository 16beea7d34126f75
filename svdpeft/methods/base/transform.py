"""The methods outside the equation: W' is another function of W0 and of the site's tensors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from svdpeft.methods.base.call import Call
from svdpeft.methods.base.factors import Factors
from svdpeft.methods.base.persite import PerSite


@dataclass(frozen=True)
class Transform(PerSite):
    """Abstract: W' = T(W0).

    ``delta`` is enough for every kind of layer. Where ``acts`` says so, ``act`` gives a called layer the same change
    without building ΔW.

    Example:
        >>> from svdpeft.methods.base import Factors
        >>> method = svdpeft.FLoRA(rank=1)  # W' = W0 ∘ (L A)
        >>> f = Factors({"L": torch.full((3, 1), 2.0), "A": torch.ones(1, 4)}, ("L", "A"))
        >>> torch.equal(method.delta(f, torch.ones(3, 4)), torch.ones(3, 4))
        True
    """

    @abstractmethod
    def delta(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        """Return W' − W0.

        Args:
            f: the site's tensors.
            w0: the weight as matrices, (*b, m, n), at least float32.

        Returns:
            (*b, m, n) in the dtype of ``w0``, differentiable in the site's tensors, exactly zero at an exact start.
        """

    def thinned(self, f: Factors) -> Factors:
        """Return the site's tensors for one forward in training; only asked where the method has ``dropout``."""
        return f

    def acts(self, linear: bool) -> bool:
        """Whether ``act`` is defined on a layer that is called; ``linear``: it multiplies its input's last axis."""
        return False

    def act(self, f: Factors, call: Call) -> Float[Tensor, "*out"]:
        """Return ΔW x of a layer in its own call, without its bias; only asked where ``acts`` says so."""
        raise NotImplementedError
