"""Calibration: one pass over data, and what it saw of every site, for the methods that start from data.

    inputs      Σ x xᵀ (*b, n, n) and Σ x (*b, n) of the vectors x that the matrices multiply
    gradients   ∂loss/∂W (*b, m, n), the mean over the batches

Sums are streamed: no activation is kept. The model is afterwards what it was, whatever happened in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.ambient import ordinary
from svdpeft.adapter.reach import WATCH, unwatch, watch
from svdpeft.adapter.roster import adapters_in
from svdpeft.bars import bar
from svdpeft.calibration.calibration import Calibration
from svdpeft.layers.base import CalledKind
from svdpeft.layers.quantised import scheme, weight
from svdpeft.methods.base import PerSite, Statistics
from svdpeft.methods.lora import LoRA
from svdpeft.sites.place import PLACES, Place
from svdpeft.targets.choice import Choice
from svdpeft.targets.rules import Targets, default_targets, rules
from svdpeft.targets.select import select
from svdpeft.targets.wrappers import unwrapped

SHOWN = 5  # names in a message


@ordinary()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Targets | None = None,
    exclude: Sequence[str] = (),
    inputs: bool = True,
    gradients: bool = False,
    loss: Callable[[Any, Any], Tensor] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Calibration:
    """Run the base model over some batches, in evaluation mode, and sum up what its sites see.

    Inputs take n² · 4 bytes per site on the device of the layer (parts of a fused weight share them), 8 bytes where the
    layer computes in float64; a convolution has n = in/groups · ∏kernel and n² per group. Gradients take the memory of
    one backward pass through all chosen weights, and m·n · 4 bytes per site beside it. Adapters that are attached are
    disabled meanwhile.

    Args:
        model: its modes, gradients, buffers and hooks are afterwards what they were.
        batches: what the model is called with: mappings as keywords, tuples and lists as arguments, anything else as
            the one argument.
        targets: as in ``attach``; it may be more than will be adapted.
        exclude: as in ``attach``.
        inputs: sum the inputs' second moments, for CorDA, EVA and LoRA-Null.
        gradients: average the weights' gradients, for LoRA-GA.
        loss: (output, batch) -> scalar; default the output's own ``loss``.
        mask: batch -> which positions count, such as (batch, tokens); default the ``attention_mask`` of a batch that
            is a mapping. It applies to the inputs of a layer that have its shape before the features.
        call: (model, batch) -> output, where a batch is not what the model is called with.

    Returns:
        Site name -> statistics. A site without inputs (read and never called, or not reached) is named in a warning.

    Raises:
        ValueError: no batch, no loss, nothing seen at all, a NaN or an infinity, or an adapter of a larger model.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> seen = calibrate(model, [torch.randn(5, 6), torch.randn(4, 6)])
        >>> seen["0"].count, seen["2"].second.shape
        (9, torch.Size([8, 8]))
    """
    model = unwrapped(model)
    if not inputs and not gradients:
        raise ValueError("inputs=False and gradients=False: there is nothing to look at")
    pairs = [
        (pattern, m)
        for pattern, m in rules(default_targets(model) if targets is None else targets, LoRA(rank=1))
        if isinstance(m, PerSite)
    ]
    choices = select(model, pairs, exclude, ()).choices
    for place in (choice.places[0] for choice in choices if gradients):
        if (how := scheme(place.module, place.parameter)) is not None:
            name = next(name for name, module in model.named_modules() if module is place.module)
            raise ValueError(
                f"the weight of {name} is quantised ({how}), and integers have no gradient: calibrate the model before "
                "it is quantised, and attach with what was seen there"
            )
    watched: dict[int, _Watched] = {}
    for choice in choices:
        watched.setdefault(id(_parameter(choice.places[0])), _Watched(choice))
    run, mask = call or _call, mask or _attention_mask
    now: list[Any] = [None]  # the mask of the batch that runs
    number = 0
    with _base(model), _as_found(model), ExitStack() as hooks:
        if inputs:
            for each in watched.values():
                for place in each.places:
                    if place.can_call and place.kind.sees:
                        handle = place.module.register_forward_hook(each.hook(place, now), with_kwargs=True)
                        hooks.callback(handle.remove)
        for p in model.parameters():
            p.requires_grad_(False)
        for each in watched.values() if gradients else ():
            each.parameter.requires_grad_(True)
        with torch.set_grad_enabled(gradients):
            for batch in bar(batches, what="calibrate", unit="batch"):
                now[0], number = mask(batch), number + 1
                output = run(model, batch)
                if gradients:
                    _add_gradients(list(watched.values()), (loss or _own_loss)(output, batch))
    if not number:
        raise ValueError("there is no batch: batches is empty, or an iterator that was used up")
    return _finish(choices, watched, number, inputs, gradients)


class _Watched:
    """The sums of one weight, over all layers that use it."""

    def __init__(self, choice: Choice) -> None:
        self.places, self.parameter = choice.places, _parameter(choice.places[0])
        place = choice.places[0]
        self.batch = place.kind.to_matrix(place.module, weight(place.module, place.parameter)).ndim - 2  # leading axes
        self.count = 0
        self.second: Tensor | None = None
        self.total: Tensor | None = None
        self.gradient: Tensor | None = None

    def hook(self, place: Place, mask: list[Any]) -> Callable[..., None]:
        """A forward hook for one of the layers."""

        @torch.no_grad()
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x: Any = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            assert isinstance(place.kind, CalledKind)
            with torch.autocast(x.device.type, enabled=False):
                self.add(place.kind.inputs(module, x.detach()), mask[0])

        return look

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add vectors, (*b, *positions, n), of the positions that count."""
        x, lead = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[self.batch : -1]
        if mask is not None and (mask.shape == lead or lead == (mask.numel(),)):  # or with its axes made one
            x = x[(slice(None),) * self.batch + (mask.to(x.device).bool().reshape(lead),)]
        x = x.reshape(*x.shape[: self.batch], -1, x.shape[-1])  # (*b, positions, n)
        if self.second is None or self.total is None:
            self.total = x.new_zeros(*x.shape[: self.batch], x.shape[-1])
            self.second = x.new_zeros(*self.total.shape, x.shape[-1])
        x = x.to(self.second)
        self.count += x.shape[-2]
        self.second += x.mT @ x
        self.total += x.sum(-2)


def _finish(
    choices: Sequence[Choice], watched: Mapping[int, _Watched], number: int, inputs: bool, gradients: bool
) -> Calibration:
    """Make the statistics of every site, and say what was not seen."""
    sites, unseen = {}, []
    for choice in choices:
        place = choice.places[0]
        found = watched[id(_parameter(place))]
        second, total = (found.second, found.total) if found.count else (None, None)
        gradient = None
        if found.gradient is not None:
            gradient = place.kind.to_matrix(place.module, found.gradient / number).clone()  # of a part: its rows
        for what, tensor in (("inputs", second), ("gradients", gradient)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"the {what} of {choice.name} hold NaN or infinite values, or overflow when squared")
        if (inputs and second is None) or (gradients and gradient is None):
            unseen.append(choice.name)
        if second is not None or gradient is not None:
            sites[choice.name] = Statistics(found.count, second, total, gradient)
    names = ", ".join(unseen[:SHOWN]) + (", …" if len(unseen) > SHOWN else "")
    if not sites:
        raise ValueError(f"nothing was seen of {names}: the model never calls these layers")
    if unseen:
        warnings.warn(
            f"{len(unseen)} sites were not seen: their weights are read and never called, or no batch reached them, "
            f"so no method can start from their data: {names}",
            stacklevel=3,
        )
    return Calibration(sites)


def _add_gradients(watched: Sequence[_Watched], value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss is of {what}: a scalar tensor that depends on the weights is needed")
    # Not backward(): the gradients that the model has are the user's.
    for each, found in zip(
        watched, torch.autograd.grad(value.sum(), [each.parameter for each in watched], allow_unused=True), strict=True
    ):
        if found is not None:
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            each.gradient = found if each.gradient is None else each.gradient + found


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _attention_mask(batch: Any) -> Tensor | None:
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _own_loss(output: Any, batch: Any) -> Any:
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        raise ValueError(
            "the model's output has no loss: give it labels, or pass loss=lambda output, batch: … to calibrate"
        )
    return value


def _parameter(place: Place) -> Tensor:
    found = place.module._parameters[place.parameter]
    assert found is not None
    return found


@contextmanager
def _base(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base, without any adapter."""
    awaited = [(module, vars(module)[WATCH][1]) for module in model.modules() if WATCH in vars(module)]
    with ExitStack() as stack:
        for module, sites in awaited:  # the first batch of the training, which this is not
            unwatch(module)
            stack.callback(watch, module, sites)
        for adapter in adapters_in(model):
            stack.enter_context(adapter.disabled())
        for place in (place for module in model.modules() for place in vars(module).get(PLACES, [])):
            if place.site.acts or place.site.weight.written(place.site):
                raise ValueError(
                    f"{place.site.name} has an adapter of a larger model, of which this one is a part: calibrate that "
                    "model, or detach the adapter"
                )
        yield


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards its modes, flags and buffers are as before."""
    training = [module for module in model.modules() if module.training]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(b, b.clone()) for _, held in buffers for b in held.values() if b is not None and not b.is_meta]
    try:
        for module in training:  # and not eval(): what holds a layer's mode would take it for the user's wish
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
