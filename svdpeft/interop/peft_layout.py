"""How PEFT lays out the LoRA of a parameter that may hold several matrices, and which convolutions it has."""

from __future__ import annotations

from torch import Tensor, nn

from svdpeft.layers.part import Part
from svdpeft.layers.quantised import weight as values_of
from svdpeft.sites.place import Place


def flipped(place: Place) -> bool | None:
    """Whether the matrices that PEFT sees in a parameter are the transposes of ours; ``None``: they are others.

    It goes by a word of the module, ``is_transposed``, and else takes a parameter for (experts, out, in), or (out, in).
    """
    kind = place.kind.whole if isinstance(place.kind, Part) else place.kind
    weight = values_of(place.module, place.parameter)
    if weight.ndim > 3:
        return None
    theirs = weight.mT if weight.ndim == 3 and getattr(place.module, "is_transposed", False) else weight
    ours = kind.to_matrix(place.module, weight)
    if ours.shape == theirs.shape and ours.stride() == theirs.stride():
        return False
    return True if ours.shape == theirs.mT.shape and ours.stride() == theirs.mT.stride() else None


def from_peft(place: Place, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """L and A of a parameter from ``lora_A``, (experts · r, in), and ``lora_B``, (out, r · experts)."""
    if (weight := values_of(place.module, place.parameter)).ndim == 3:
        b = b.unflatten(1, (-1, len(weight))).permute(2, 0, 1)  # (experts, out, r)
        a = a.unflatten(0, (len(weight), -1))  # (experts, r, in)
    return (a.mT, b.mT) if flipped(place) else (b, a)


def to_peft(place: Place, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: ``lora_A`` and ``lora_B``."""
    b, a = (right.mT, left.mT) if flipped(place) else (left, right)
    return (a, b) if a.ndim == 2 else (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def plain_convolution(module: nn.modules.conv._ConvNd) -> bool:
    """Whether PEFT's LoRA of a convolution is a change of its weight.

    Its own has stride and padding of the layer, and neither dilation, padding mode nor, in one of its factors, groups.
    """
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
