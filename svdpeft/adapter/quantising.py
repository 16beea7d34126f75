"""Quantising a model, alone or under an adapter that takes up what it loses: QPiSSA, QSORSA, LoftQ, QERA.

    W0 ≈ Q + s L C A        Q ← q(W0 − s L C A)        s L C A ← the best approximation of W0 − Q of rank r

The base becomes Q and [L C A]start zero, so that all of s L C A is the update. A method with a start product begins
with that, as QPiSSA does (F. Meng, Z. Wang, M. Zhang, NeurIPS 2024, arXiv:2404.02948); one without begins with q(W0),
as LoftQ does (Y. Li, Y. Yu, C. Liang, P. He, N. Karampatziakis, W. Chen, T. Zhao, ICLR 2024, arXiv:2310.08659).
With a calibration the best approximation is that of the outputs, of least E‖(W0 − Q − s L C A) x‖², as QERA has it
(C. Zhang, J. T. H. Wong, C. Xiao, G. A. Constantinides, Y. Zhao, ICLR 2025, arXiv:2410.06040).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.dequantising import CONFIG, change_form
from svdpeft.adapter.moments import MOMENTS, Moment
from svdpeft.adapter.pretrained import NAME
from svdpeft.adapter.roster import ROSTER, adapters_in
from svdpeft.bars import bar
from svdpeft.decomposition import SVD, truncated_svd
from svdpeft.layers.quantised import Form, scheme
from svdpeft.layers.quantising import Make, scheme_named, transformers_config
from svdpeft.methods.base import Factored, Statistics
from svdpeft.sites.reads import undressed
from svdpeft.sites.site import Site
from svdpeft.targets.inventory import by_identity, weights_of
from svdpeft.targets.wrappers import unwrapped


class Loss(NamedTuple):
    """‖W0 − (Q + s L C A)‖ of one layer, and what it is of q(W0) alone.

    Args:
        nuclear: the nuclear norm; NaN where it was not asked for.
        frobenius: the Frobenius norm.
        plain_nuclear: the same of W0 − q(W0).
        plain_frobenius: the same of W0 − q(W0).
        output: the root of the mean of ‖(W0 − Q − s L C A) x‖² over the calibration's inputs; NaN without one.
        plain_output: the same of W0 − q(W0).
    """

    nuclear: float
    frobenius: float
    plain_nuclear: float
    plain_frobenius: float
    output: float = float("nan")
    plain_output: float = float("nan")


@dataclass(frozen=True)
class QuantizeReport:
    """What quantising has lost.

    Args:
        scheme: of every layer.
        losses: by the name of the layer.
        left: the matrices of the model that are not quantised: name -> why.
    """

    scheme: str
    losses: Mapping[str, Loss]
    left: Mapping[str, str]

    def reduction(self, norm: str = "nuclear") -> float:
        """Return the mean of 1 − ‖W0 − (Q + s L C A)‖ / ‖W0 − q(W0)‖ over the layers, in the "nuclear" or
        "frobenius" norm, or in the "output"."""
        shares = [
            1 - getattr(loss, norm) / before if (before := getattr(loss, f"plain_{norm}")) else 0.0
            for loss in self.losses.values()
        ]
        return sum(shares) / len(shares)

    def __str__(self) -> str:
        text = f"{len(self.losses)} layers in {self.scheme}; of what that loses the adapter takes up "
        text += " and ".join(f"{self.reduction(norm):.1%} in the {norm} norm" for norm in ("nuclear", "frobenius"))
        if not math.isnan(outputs := self.reduction("output")):  # with a calibration
            text += f", {outputs:.1%} in the outputs"
        return "\n".join([text.replace("frobenius", "Frobenius"), *(f"  {n}: {why}" for n, why in self.left.items())])


@torch.no_grad()
def quantize(
    model: nn.Module,
    adapter: Adapter | None = None,
    scheme: str = "nf4",
    iterations: int = 5,
    nuclear: bool = True,
    calibration: Mapping[str, Statistics] | None = None,
    moments: Literal["full", "diagonal"] = "full",
) -> QuantizeReport:
    """Quantise the weights of a model in place, and let an adapter that has not trained yet take up what is lost.

        W0 ≈ Q + s L C A        Q ← q(W0 − s L C A)        s L C A ← the best approximation of W0 − Q of rank r

    Save the model afterwards if you save the adapter: it is one for Q, which nothing but this call makes.

    Args:
        model: in full precision, or in half.
        adapter: on this model and alone on it: its layers are quantised, those it leaves are left. ``None``: every
            ``nn.Linear`` but the output head; attach to it, and you have QLoRA, or what the method's name is with a Q.
        scheme: ``"nf4"``, ``"fp4"`` or ``"int8"`` of bitsandbytes, ``"torchao-int8"``, ``"torchao-int4"``.
        iterations: how often Q and s L C A are found in turn. A method that starts from a part of the weight (PiSSA,
            SORSA) begins with that, and ends with Q: one iteration is QPiSSA as first published. One that starts from
            zero (LoRA) begins with Q: LoftQ. 0 leaves the adapter as it is, whatever its method.
        nuclear: whether the report has the nuclear norm, which takes all singular values of every layer twice.
        calibration: what ``svdpeft.calibrate`` saw of the adapter's layers before. The adapter then takes up what
            matters for the outputs: ‖(W0 − Q − s L C A) K‖ is least, K² = E[x xᵀ]. With LoRA and one iteration it is
            QERA.
        moments: ``"full"``, or ``"diagonal"``: inputs that do not correlate, without the root of an n×n matrix.

    Returns:
        What was lost in every layer, and what of the model is not quantised.

    Raises:
        ValueError: a scheme that does not exist; a calibration that nothing asks for, or that did not see a layer; a
            layer that is no ``nn.Linear``, or is quantised already; a method whose update cannot hold an arbitrary
            product of its rank; an adapter that has trained, or is not alone. Nothing has changed then.
        ImportError: the scheme's library is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
        >>> adapter = svdpeft.attach(model, svdpeft.PiSSA(rank=8), targets=["0"])
        >>> report = svdpeft.quantize(model, adapter, scheme="nf4", iterations=5)
        >>> report.losses["0"].nuclear < report.losses["0"].plain_nuclear
        True
    """
    model, make = unwrapped(model), scheme_named(scheme)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations {iterations!r} is no whole number from 0")
    if moments not in MOMENTS:
        raise ValueError(f"moments {moments!r} is neither 'full' nor 'diagonal'")
    if calibration is not None and (adapter is None or not iterations):
        raise ValueError("a calibration says what an adapter takes up: give the adapter, and at least one iteration")
    if adapter is None and adapters_in(model):
        raise ValueError("the model has an adapter, to which the weights that it was made for would be lost: name it")
    layers = quantisable(model) if adapter is None else _adapted(model, adapter, iterations)
    left = _left(model, layers)
    if not layers:
        raise ValueError(f"the model has no nn.Linear to quantise: {'; '.join(f'{n}: {w}' for n, w in left.items())}")
    plans = {}
    for name, (module, sites) in bar(layers.items(), what="quantize", unit="layer", total=len(layers)):
        seen = None if calibration is None else [Moment.of(site, calibration, moments) for site in sites]
        plans[name] = _plan(module, sites, make, iterations, nuclear, seen)
    for name, (module, sites) in layers.items():
        change_form(module, "weight", plans[name].form)
        for site, values in zip(sites, plans[name].factors, strict=True):
            for role, value in values.items():
                getattr(site.factors, role).data.copy_(value)
            site.factors.settle()
    if adapter is not None:
        getattr(model, ROSTER).replaced(module for module, _ in layers.values())
    _tell_transformers(model, scheme, {module for module, _ in layers.values()})
    return QuantizeReport(scheme, {name: plan.loss for name, plan in plans.items()}, left)


Layers = dict[str, tuple[nn.Module, Sequence[Site]]]  # by name, with the sites that its weight has


def quantisable(model: nn.Module) -> Layers:
    """What is quantised of a model without an adapter: every ``nn.Linear`` with a weight of its own, but the head."""
    weights = weights_of(model)
    users = by_identity(weights)
    plain = [w for w in weights if type(w.module) is nn.Linear and not w.head and w.scheme is None]
    return {w.name: (w.module, ()) for w in plain if len(users[id(w.tensor)]) == 1}


def _adapted(model: nn.Module, adapter: Adapter, iterations: int) -> Layers:
    """The layers of an adapter, each checked."""
    if adapter.model is not model or adapter.state != "attached":
        raise ValueError(f"adapter {adapter.name!r} is not attached to this model: it is {adapter.state}")
    if others := [other.name for other in adapters_in(model) if other is not adapter]:
        raise ValueError(f"adapter {others[0]!r} is on the model, too, and was made for its weights as they are")
    layers: dict[str, tuple[nn.Module, list[Site]]] = {}
    for name, site in adapter.sites.items():
        module = site.places[0].module
        if undressed(module) is not nn.Linear or len(site.places) > 1:
            how = scheme(module, site.places[0].parameter)
            what = f"quantised already ({how})" if how else f"a {type(module).__name__}"
            what = what if len(site.places) == 1 else "a weight that several layers share"
            raise ValueError(
                f"{name} cannot be quantised: it is {what}, and an nn.Linear with a weight of its own can be"
            )
        if iterations and not _holds_any(site):
            raise ValueError(
                f"{name}: the update of {site.method} is no free product L C A, so it cannot take up what quantising "
                "loses; quantize(model) before you attach it, or give iterations=0"
            )
        if iterations and bool((site.delta() != 0).any()):
            raise ValueError(
                f"{name} is not at its start, or {type(site.method).__name__} starts elsewhere than at the base: "
                "quantize before training, or give the merged model"
            )
        layers.setdefault(name.removesuffix(f"[{site.part}]"), (module, []))[1].append(site)
    return dict(layers)


def _holds_any(site: Site) -> bool:
    """Whether the method's update can be any product of its rank, once [L C A]start is zero."""
    method, names = site.method, site.factors.tensors().keys()
    usual = (
        getattr(type(method), each, None) is getattr(Factored, each) for each in ("core", "now", "anchor", "update")
    )
    free = isinstance(method, Factored) and {"L", "A"} <= set(method.trains) and not site.factors.tied
    return (
        free and all(usual) and names <= {"L", "C", "A", "L0", "C0", "A0"} and ("C" in method.trains) == ("C" in names)
    )


def _left(model: nn.Module, layers: Layers) -> dict[str, str]:
    mine, weights = {module for module, _ in layers.values()}, weights_of(model)
    left, users = {}, by_identity(weights)
    for weight in weights:
        if weight.module not in mine:
            why = "its weight is shared" if len(users[id(weight.tensor)]) > 1 else "not adapted"
            why = "the output head" if weight.head else why
            why = why if undressed(weight.module) is nn.Linear else f"a {type(weight.module).__name__}"
            left[weight.name] = why if weight.scheme is None else f"quantised already ({weight.scheme})"
    return left


def _tell_transformers(model: Any, scheme: str, quantised: Collection[nn.Module]) -> None:
    """Let ``save_pretrained`` write a folder that is loaded as what the model is now."""
    config = getattr(model, "config", None)
    if not callable(getattr(type(model), NAME, None)) or config is None or getattr(config, CONFIG, None) is not None:
        return
    from transformers.quantizers import AutoHfQuantizer

    plain = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module not in quantised]
    setattr(config, CONFIG, transformers_config(scheme, model.dtype, plain))
    model.hf_quantizer = AutoHfQuantizer.from_config(getattr(config, CONFIG), pre_quantized=True)


class _Plan(NamedTuple):
    """What a layer is to hold: the quantised weight, and the factors of each of its sites."""

    form: Form
    factors: list[dict[str, Tensor]]
    loss: Loss


def _plan(
    module: nn.Module,
    sites: Sequence[Site],
    make: Make,
    iterations: int,
    nuclear: bool,
    seen: Sequence[Moment] | None,
) -> _Plan:
    stored: Any = module._parameters["weight"]
    w = stored.detach().to(torch.promote_types(stored.dtype, torch.float32))

    def quantised(low: Tensor | float) -> Form:
        return make((w - low).to(stored.dtype))

    low: Tensor | float = 0.0
    plain, factors = quantised(low), [dict[str, Tensor]() for _ in sites]
    form, starts = plain, [site.method.anchor(site.factors) for site in sites if iterations]
    if begins := any(start is not None for start in starts):
        low = sum((_stored(site, start.dense()) for site, start in zip(sites, starts, strict=True) if start), start=low)
        form = quantised(low)
        factors = [_from_zero(site, {}) for site in sites]
    if seen is not None and iterations <= begins:
        raise ValueError(
            f"{sites[0].name}: {type(sites[0].method).__name__} begins with its own start, so that one iteration asks "
            "nothing of the calibration: give iterations=2 or more, or take LoRA"
        )
    for done in range(iterations - begins if sites else 0):
        rest, triplets = w - form.values(), []
        for i, site in enumerate(sites):
            method: Any = site.method
            driver: Any = getattr(method, "driver", "auto")
            part = site.kind.to_matrix(module, rest)
            if seen is not None:
                part = seen[i].nearest(part, method._rank, driver, site.name)
            triplets.append(truncated_svd(part, method._rank, driver, where=site.name))
        low = sum(
            (_stored(site, (t.u * t.s.unsqueeze(-2)) @ t.vh) for site, t in zip(sites, triplets, strict=True)), 0.0
        )
        factors = [_from_zero(site, _factors(site, t)) for site, t in zip(sites, triplets, strict=True)]
        if begins or done < iterations - 1:
            form = quantised(low)
    now, before = w - form.values() - low, w - plain.values()
    outputs = () if seen is None else (_outputs(module, sites, error, seen) for error in (now, before))
    return _Plan(form, factors, Loss(*_norms(now, nuclear), *_norms(before, nuclear), *outputs))


def _outputs(module: nn.Module, sites: Sequence[Site], error: Tensor, seen: Sequence[Moment]) -> float:
    parts = zip(sites, seen, strict=True)
    return sum(moment.square(site.kind.to_matrix(module, error)) for site, moment in parts) ** 0.5


def _stored(site: Site, matrix: Tensor) -> Tensor:
    return site.kind.from_matrix(site.places[0].module, matrix)


def _factors(site: Site, triplets: SVD) -> dict[str, Tensor]:
    """L, C and A with s L C A = U Σ Vᵀ: a C that trains is Σ, or it goes into L and A by halves."""
    method: Any = site.method
    scaled = triplets._replace(s=triplets.s / method.scale)
    if "C" in method.trains:
        return {"L": scaled.u, "C": scaled.s, "A": scaled.vh}
    left, right = scaled.balanced()
    return {"L": left, "A": right}


def _from_zero(site: Site, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors with [L C A]start = 0, by its L."""
    starts = {f"{role}0": value for role, value in factors.items()}
    zero = {"L0": torch.zeros_like(site.factors.L)}
    return {name: v for name, v in (factors | starts | zero).items() if name in site.factors._parameters}


def _norms(error: Tensor, nuclear: bool) -> tuple[float, float]:
    frobenius = float(torch.linalg.vector_norm(error))
    return float(torch.linalg.svdvals(error).sum()) if nuclear else float("nan"), frobenius
