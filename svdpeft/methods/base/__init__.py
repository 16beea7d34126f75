"""What a method is made of: the contract that its one file fills in, and what it is given. For authors of methods.

    W' = W0 + s([L C A]now − [L C A]start)        L (*b, m, r)    C (r, r) structured    A (*b, r, n)

A method is a frozen dataclass of hyper-parameters. ``PerSite`` methods keep tensors beside each weight: a ``Factored``
one is on the equation above, a ``Transform`` is another function of W0. The baselines (full, partial, head only) train
whole parameters of the base and have no factors.
"""

from svdpeft.methods.base.call import Call
from svdpeft.methods.base.factored import Decomposed, Factored, Scaled, Triplets, Unscaled
from svdpeft.methods.base.factors import Factors, Tensors, by_shape, share
from svdpeft.methods.base.given import Given, Partner, Statistics, generator
from svdpeft.methods.base.hooks import Hooks
from svdpeft.methods.base.hyperparameters import check_numbers, check_patterns
from svdpeft.methods.base.kind import Kind
from svdpeft.methods.base.method import Method
from svdpeft.methods.base.persite import PerSite, grouped
from svdpeft.methods.base.progress import Progress
from svdpeft.methods.base.reference import Reference
from svdpeft.methods.base.transform import ThinTransform, Transform

__all__ = [
    "Call",
    "Decomposed",
    "Factored",
    "Factors",
    "Given",
    "Hooks",
    "Kind",
    "Method",
    "Partner",
    "PerSite",
    "Progress",
    "Reference",
    "Scaled",
    "Statistics",
    "Tensors",
    "ThinTransform",
    "Transform",
    "Triplets",
    "Unscaled",
    "by_shape",
    "check_numbers",
    "check_patterns",
    "generator",
    "grouped",
    "share",
]
