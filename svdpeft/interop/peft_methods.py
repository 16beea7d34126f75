"""PEFT's methods as those of this library: which one it is, and its tensors in the places that they have here.

A function for each ``peft_type`` gives a site's method and the values of its factors. The site is then built as
``attach`` would build it, so that what is not in the folder (starts, norms of the base) comes from the base as it did
in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.interop.peft_folder import TENSORS, Folder
from svdpeft.interop.peft_layout import from_peft, plain_convolution
from svdpeft.methods.adalora import AdaLoRA
from svdpeft.methods.base import Factors, Given, PerSite, Progress, share
from svdpeft.methods.boft import BOFT
from svdpeft.methods.dora import DoRA
from svdpeft.methods.lora import LoRA
from svdpeft.methods.mica import MiCA
from svdpeft.methods.oft import OFT
from svdpeft.methods.olora import OLoRA
from svdpeft.methods.pissa import PiSSA
from svdpeft.methods.randlora import RandLoRA
from svdpeft.methods.vera import VeRA
from svdpeft.sites.place import Place

STARTS: dict[Any, type[LoRA | PiSSA | OLoRA | MiCA]] = {
    "pissa": PiSSA,
    "olora": OLoRA,
    "mica": MiCA,
}  # others start with an update that nothing is subtracted for
PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")
UNDILATED = (
    "PEFT computes its update with another convolution than that of the layer, so that it is no change of the weight"
)


class Found(NamedTuple):
    """One site of a folder.

    Args:
        name: of the site here.
        layer: its name as PEFT's patterns see it.
        place: the layer.
        given: what a method may know of it.
        tensors: of the folder, by role; what has its place is taken out.
    """

    name: str
    layer: str
    place: Place
    given: Given
    tensors: dict[str, Tensor]

    @property
    def module(self) -> Any:
        """The layer."""
        return self.place.module


Read = tuple[PerSite, dict[str, Tensor]]


def build(folder: Folder, found: Found, groups: dict[Any, dict[str, Tensor]]) -> tuple[PerSite, Factors]:
    """Return a site's method and its factors, with the values of the folder.

    Args:
        folder: that was read.
        found: the site.
        groups: what earlier sites share, by who can; this site adds to it.

    Raises:
        ValueError: a tensor is missing or of another shape, or the method is not defined on the layer.
    """
    method, values = READERS[folder.kind](folder, found)
    _, m, n = found.given.shape
    method = method.at(found.name, m, n)
    if (why := method.why_not(found.place.kind)) is not None:
        raise ValueError(f"{folder.path}: {found.name} is adapted by {type(method).__name__}: {why}")
    shared = _shared(folder, found, method, groups)
    if found.tensors:
        raise ValueError(
            f"{folder.path / TENSORS}: {min(found.tensors)} of {found.name} has no place in the {method} that the "
            "configuration describes"
        )
    factors = method.factors(found.given.sharing(shared))
    with torch.no_grad():
        for role, value in values.items():
            own = getattr(factors, role)
            if value.numel() != own.numel():
                raise ValueError(
                    f"{folder.path}: {role} of {found.name} has {list(value.shape)} there, and {list(own.shape)} here: "
                    "the adapter is of another model"
                )
            own.copy_(value.reshape(own.shape))
        if isinstance(base := getattr(method, "inner", method), PiSSA):  # PEFT divides the singular values by s
            for start in (factors.L0, factors.A0):
                start.div_(math.sqrt(base.scale))
    method.after_step([factors], Progress())  # as PEFT's forward does: COFT's projection
    return method, factors


def _lora(folder: Folder, found: Found) -> Read:
    left, right = _factors(folder, found)
    init, rank = folder["init_lora_weights"], right.shape[-2]
    if init not in STARTS and init not in PLAIN:
        folder.refuse(
            "init_lora_weights",
            "that start was taken out of the base's weight, and neither is in the folder",
            "save it with path_initial_model_for_weight_conversion=…, as PEFT's documentation of it says",
        )
    method = STARTS.get(init, LoRA)(
        rank=rank,
        alpha=folder.for_layer("alpha_pattern", found.layer, folder["lora_alpha"]),
        rs=folder["use_rslora"],
        dropout=folder["lora_dropout"],
    )
    values = {"L": left, "A": right}
    if not folder["use_dora"]:
        return method, values
    embedding = isinstance(found.module, nn.Embedding)
    dora = DoRA(method, magnitude="columns" if embedding else "rows")
    return dora, {**values, "mag": _take(folder, found, "lora_magnitude_vector")}


def _factors(folder: Folder, found: Found) -> tuple[Tensor, Tensor]:
    """L and A of a LoRA, as matrices (*b, m, r) and (*b, r, n)."""
    module = found.module
    if isinstance(module, nn.Embedding):
        return _take(folder, found, "lora_embedding_A").mT, _take(folder, found, "lora_embedding_B").mT
    a, b = _take(folder, found, "lora_A"), _take(folder, found, "lora_B")
    if isinstance(module, nn.modules.conv._ConvNd):
        if not plain_convolution(module):
            raise ValueError(f"{folder.path}: {found.name} has groups, a dilation or a padding mode: {UNDILATED}")
        return b.flatten(1).unsqueeze(0), a.flatten(1).unsqueeze(0)
    return from_peft(found.place, a, b) if found.place.kind.name in ("experts", "raw") else (b, a)


def _take(folder: Folder, found: Found, role: str) -> Tensor:
    if role not in found.tensors:
        raise ValueError(f"{folder.path / TENSORS} lacks {role} of {found.name}")
    return found.tensors.pop(role)


def _adalora(folder: Folder, found: Found) -> Read:
    right = _take(folder, found, "lora_A")
    alpha, first, rank = folder["lora_alpha"], folder["init_r"], len(right)
    # The scale stays that of the rank at the start, whatever rank is left.
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    method = AdaLoRA(
        rank=rank,
        alpha=alpha if rank == first and alpha > 0 else scale * (rank + 1e-5),
        dropout=folder["lora_dropout"],
        allocate=None,
        gamma=folder["orth_reg_weight"],
        regulariser="code",
        scaling="code",
    )
    return method, {"L": _take(folder, found, "lora_B"), "C": _take(folder, found, "lora_E"), "A": right}


def _vera(folder: Folder, found: Found) -> Read:
    d = _take(folder, found, "vera_lambda_d")
    method = VeRA(rank=len(d), d_initial=folder["d_initial"] or VeRA.d_initial, dropout=folder["vera_dropout"])
    return method, {"b": _take(folder, found, "vera_lambda_b"), "d": d}


def _randlora(folder: Folder, found: Found) -> Read:
    scales = _take(folder, found, "randlora_lambda")  # (r, bases)
    bases = "very-sparse" if folder["very_sparse"] else "sparse" if folder["sparse"] else "dense"
    method = RandLoRA(
        rank=len(scales),
        alpha=folder["randlora_alpha"],
        dropout=folder["randlora_dropout"],
        bases=bases,
        gamma="peft",
    )
    return method, {"Lambda": scales.mT, "Gamma": _take(folder, found, "randlora_gamma")}


def _shared(folder: Folder, found: Found, method: PerSite, groups: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The random bases of VeRA and RandLoRA, one mapping for all sites that can share them."""
    if not isinstance(method, (VeRA, RandLoRA)):
        return {}
    if not folder["save_projection"]:
        folder.refuse("save_projection", "the random bases are not in the folder, and other versions may draw others")
    for role in folder.shared.keys() & found.tensors.keys():
        if not torch.equal(found.tensors.pop(role), folder.shared[role]):
            raise ValueError(f"{folder.path / TENSORS}: {role} of {found.name} is another than that of the model")
    _, m, n = found.given.shape
    number = method.number(m, n) if isinstance(method, RandLoRA) else 0
    key = (number, found.given.dtype, found.given.device)
    if key not in groups:
        a, b = (folder.shared_tensor(f"{folder.kind.lower()}_{side}") for side in "AB")
        if number:  # PEFT pairs the columns of B, basis first, with the rows of A, rank first
            a, b = a.squeeze(1), b[:, :number].flatten(1).unflatten(1, (-1, number)).mT
        tensors = {"A": a, "B": b}
        groups[key] = share({k: t.to(found.given.device, found.given.dtype) for k, t in tensors.items()}, method.trains)
    return groups[key]


def _oft(folder: Folder, found: Found) -> Read:
    embedding = isinstance(found.module, nn.Embedding)
    if isinstance(found.module, nn.modules.conv._ConvNd):
        raise ValueError(f"{folder.path}: {found.name} is a convolution: {UNDILATED}; leave it out in PEFT")
    values, terms = _take(folder, found, "oft_embedding_R" if embedding else "oft_R"), None
    size = math.isqrt(2 * values.shape[-1]) + 1  # of size(size − 1)/2 values
    if folder["use_cayley_neumann"]:
        if folder["num_cayley_neumann_terms"] < 3:
            folder.refuse("num_cayley_neumann_terms", "the series has no end as the one here")
        terms = max(folder["num_cayley_neumann_terms"] - 2, 2)
    # PEFT counts upper triangles, turns inputs and the rows of an embedding, and its series the other way.
    q = values.new_zeros(len(values), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[..., rows, columns] = values
    q = (q - q.mT) * (1 if embedding == (terms is not None) else -1)
    method = OFT(
        block_size=size,
        block_share=folder["block_share"],
        eps=folder["eps"] if folder["coft"] else None,
        neumann=terms,
        dropout=folder["module_dropout"],
    )
    return method, {"Q": _lower(q)}


def _boft(folder: Folder, found: Found) -> Read:
    if isinstance(found.module, nn.modules.conv._ConvNd):
        raise ValueError(f"{folder.path}: {found.name} is a convolution: {UNDILATED}; leave it out in PEFT")
    full = _take(folder, found, "boft_R")  # (butterflies, blocks, size, size), of which the skew part counts
    method = BOFT(block_size=full.shape[-1], butterflies=len(full), dropout=folder["boft_dropout"])
    return method, {"Q": _lower((full - full.mT) / 2), "s": _take(folder, found, "boft_s")}


def _lower(q: Tensor) -> Tensor:
    """The values below the diagonal, row by row: the inverse of ``skew``."""
    rows, columns = torch.tril_indices(q.shape[-1], q.shape[-1], -1)
    return q[..., rows, columns]


READERS: dict[str, Callable[[Folder, Found], Read]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "VERA": _vera,
    "RANDLORA": _randlora,
    "OFT": _oft,
    "BOFT": _boft,
}
