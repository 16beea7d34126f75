"""The methods outside the equation: W' is another function of W0 and of the site's tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from svdpeft.decomposition import Product
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


@dataclass(frozen=True)
class ThinTransform(Transform):
    """Abstract: W' = T(W0), where the change is a product of thin factors that are made from the weight.

    So no layer that is called builds ΔW, and a LoRA file can hold it.

    Example:
        >>> from svdpeft.methods.base import Factors
        >>> method = svdpeft.HRA(rank=2)  # two reflections of the input: W0 (H − I) has rank two
        >>> f = Factors({"U": torch.eye(4)[:, :2]}, ("U",))
        >>> method.thin(f, torch.ones(3, 4)).rank, method.delta(f, torch.ones(3, 4))[0].tolist()
        (2, [-2.0, -2.0, 0.0, 0.0])
    """

    @abstractmethod
    def thin(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Product:
        """Return W' − W0 of matrices w0, (*b, m, n), as a product, exactly zero at an exact start."""

    def as_product(self, f: Factors, w0: Callable[[], Tensor]) -> Product:
        return self.thin(f, w0())

    def delta(self, f: Factors, w0: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b m n"]:
        return self.thin(f, w0).dense()

    def acts(self, linear: bool) -> bool:
        return True

    def act(self, f: Factors, call: Call) -> Float[Tensor, "*out"]:
        return call.add(None, self.thin(f, call.w0))
