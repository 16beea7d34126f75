"""What the core tests share: a model around a layer under test, an adapter on it, and comparisons."""

from __future__ import annotations

import copy
import hashlib
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import QUANTISED, layer_kind
from torch import Tensor, nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.attach import attach
from svdpeft.layers.base import CalledKind, LayerKind
from svdpeft.layers.quantised import form_of, weight
from svdpeft.layers.quantising import plain, put, scheme_named
from svdpeft.methods.base import Method, Statistics
from svdpeft.sites.site import Site
from svdpeft.sites.weights import MergeReport
from svdpeft.targets.select import select

LIGHT = Path(__file__).parent / "light"  # first on the path of a process, it starts without what it does not need

# The one bound of float64. No method and no layer kind has its own.
RTOL, ATOL = 1e-10, 1e-12
# Of rows that have no float64, relative to the largest entry: an entry is a sum of at most 32 products, made by a chain
# of at most 8 such, so 256 roundings of terms, and terms are at most 4 times the largest entry of what they add up to.
ROUNDINGS_OF_A_CHAIN = 2**10
_working = [torch.float64]  # what ``close`` compares in: see ``working_in``


class Host(nn.Module):
    """A layer under test as part of a model: a norm with running statistics, a nonlinearity and a head follow."""

    targets: tuple[str, ...] = ("layer",)  # what of it is adapted

    def __init__(self, layer: nn.Module, width: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(width, dtype=dtype)
        self.head = nn.Linear(width, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = self.norm(y.reshape(-1, y.shape[-1]))
        return self.head(torch.tanh(y))


class Both(nn.Module):
    """One weight that is called in one place and read in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.layer.weight


# Of the CPU alone: ``torch.manual_seed`` looks for devices, which costs a thousand times as much.
seeded = torch.default_generator.manual_seed


def example(kind: tuple[str, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[LayerKind, Any, Tensor]:
    """A kind, a fresh example layer in a dtype that it has and its input, the same for the same seed."""
    state = torch.get_rng_state()
    seeded(seed)
    found = layer_kind(kind)
    if kind in QUANTISED:  # four blocks and a half, of 64 values each, in NF4; a group a row in torchao's 4 bits
        dtype = torch.float32 if dtype == torch.float64 else dtype
        layer, x = nn.Linear(32, 9).to(dtype), torch.randn(2, 3, 32)
        quantise(layer, kind[0])
    else:
        layer, x, _ = found.examples()[kind[1]]
    torch.set_rng_state(state)
    return found, layer.to(dtype), x.to(dtype) if x.is_floating_point() else x


def quantise(layer: Any, scheme: str) -> None:
    """Let a linear layer store its weight as integers."""
    put(layer, "weight", scheme_named(scheme)(layer.weight.detach()))
    if scheme == "int8":  # every input is an outlier: else it is rounded to 8 bits where the layer evaluates
        layer.state.threshold = 1e-7


def below(kind: tuple[str, int], name: str = "layer") -> tuple[str, ...]:
    """The targets of an example that is called ``name`` in its model."""
    targets = ("",) if kind in QUANTISED else layer_kind(kind).examples()[kind[1]].targets
    return tuple(f"{name}.{target}".removesuffix(".") for target in targets)


def host(kind: tuple[str, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Host, Tensor]:
    """A model around an example layer, in eval mode, and its input."""
    _, layer, x = example(kind, seed, dtype)
    with torch.no_grad():
        width = layer(x).shape[-1]
    state = torch.get_rng_state()
    seeded(seed + 1)
    model = Host(layer, width).to(x.dtype if kind in QUANTISED else dtype).eval()
    model.targets = below(kind)
    torch.set_rng_state(state)
    return model, x


def frozen(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a base that does not train: torch picks a linear layer's kernel by whether its weight does."""
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        out = model.requires_grad_(False)(x)
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return out


def weight_of(model: nn.Module, site: Any) -> str:
    """The full name of the parameter that a site adapts."""
    place = site.places[0]
    name = next(name for name, module in model.named_modules() if module is place.module)
    return f"{name}.{place.parameter}".lstrip(".")


def weights_of(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The base weights of all sites by name, as they are stored; quantised ones dequantised."""
    places = {weight_of(model, site): site.places[0] for site in adapter.sites.values()}
    return {name: weight(place.module, place.parameter) for name, place in places.items()}


def updated(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """W0 + ΔW of every adapted weight, without asking the model."""
    total = {name: w.detach().clone() for name, w in weights_of(model, adapter).items()}
    for site in adapter.sites.values():
        total[weight_of(model, site)] += site.delta()
    return total


def dequantised(kind: tuple[str, int]) -> Host:
    """A fresh base, whose weight is plain."""
    model, x = host(kind)
    if kind in QUANTISED:
        put(model.layer, "weight", plain(form_of(model.layer, "weight"), x.dtype))
    return model


def expected_of(kind: tuple[str, int], x: Tensor, weights: dict[str, Tensor], layer: bool = False) -> Tensor:
    """What a fresh base gives with other weights in the place of its own; ``layer``: its layer alone."""
    model = dequantised(kind)
    with torch.no_grad():
        for name, w in weights.items():
            model.get_parameter(name).copy_(w)
        return (model.layer if layer else model)(x)


def shared_of(adapter: Adapter) -> list[Tensor]:
    """What trains and belongs to several sites, once per site."""
    tied = [getattr(site.factors, role) for site in adapter.sites.values() for role in site.factors.tied]
    return [p for p in tied if p.requires_grad]


def factors_of(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    return {name: site.factors.tensors() for name, site in adapter.sites.items()}


def adapt(model: nn.Module, method: Method, **options: Any) -> Adapter:
    """Attach to the layer under test, ranks clipped to it; methods without factors get the head to train."""
    if not method.factored:
        options.setdefault("train", ("head",))
    targets = list(getattr(model, "targets", ["layer"]))
    options = {"targets": targets, "clip_rank": True, "seed": 5, **options}
    if getattr(method, "needs", ""):
        options.setdefault("calibration", seen_at(model, method, options["targets"]))
    return attach(model, method, **options)


def seen_at(model: nn.Module, method: Any, targets: Any) -> dict[str, Statistics]:
    """A calibration without a forward: what a few seeded random inputs, and gradients, make at every site."""
    found = {}
    for choice in select(
        model, [(t, method) for t in ([targets] if isinstance(targets, str) else targets)], (), ()
    ).choices:
        module, kind = choice.places[0].module, choice.places[0].kind
        w = kind.to_matrix(module, weight(module, choice.places[0].parameter))
        *batch, m, n = w.shape
        generator = torch.Generator().manual_seed(zlib.crc32(choice.name.encode()))
        x = torch.randn(*batch, n, 3 * n + 5, generator=generator, dtype=torch.float64) + 0.3
        gradient = torch.randn(*batch, m, n, generator=generator, dtype=torch.float64)
        y = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
        found[choice.name] = Statistics(x.shape[-1], x @ x.mT, x.sum(-1), gradient, y @ y.mT / n)
    return found


def merge(adapter: Adapter) -> MergeReport:
    """Merge: of a quantised model into plain weights, in the dtype of what is beside them."""
    dtypes = {s.places[0].module.bias.dtype for s in adapter.sites.values() if s.weight.scheme is not None}
    return adapter.merge(dtype=next(iter(dtypes), None))


def go(adapter: Adapter, state: str) -> None:
    """From attached to a state: "attached", "merge" or "fold"."""
    if state != "attached":
        merge(adapter) if state == "merge" else adapter.fold()


def back(adapter: Adapter, state: str) -> None:
    """The way back."""
    if state != "attached":
        getattr(adapter, f"un{state}")()


def perturb(adapter: Adapter, size: float = 0.3, seed: int = 7) -> None:
    """Move every trainable tensor off its start, so that no bug hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_((size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p))


@contextmanager
def working_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the block ``close`` takes tensors of this dtype, beside those in float64."""
    _working.append(dtype)
    yield
    _working.pop()


def close(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)
        return
    assert found.dtype == expected.dtype == _working[-1]
    bound = ROUNDINGS_OF_A_CHAIN * torch.finfo(found.dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def negligible() -> float:
    """The share of a change that rounding may take: some 4,000 roundings."""
    return 2**12 * torch.finfo(_working[-1]).eps


def widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by far more than rounding: guards against comparing two no-ops."""
    return bool((a - b).abs().max() > 1e-3)


def near_by_change(found: Tensor, expected: Tensor, base: Tensor, share: float) -> None:
    """Assert that ``found`` is ``expected`` to within a share of what the adapter changes: zeros, the base and a change
    of the other sign are all far off, which they need not be of a tolerance in numbers.
    """
    found, expected, base = found.detach().double(), expected.detach().double(), base.detach().double()
    change = (expected - base).norm()
    assert change > 0.1 * base.norm(), "the adapter hardly changes anything"
    assert expected.norm() > 0.5 * change, "zeros would be near"
    off = float((found - expected).norm() / change)
    assert off < share, f"off by {off:.3g} of the change"


def paths(site: Site) -> list[bool]:
    """The values of ``site.dense`` that a called site can be computed with."""
    return [False, True] if site.method.product(site.factors) is not None or not site.dense else [True]


def exact_change(site: Site) -> Tensor:
    """ΔW as matrices, computed in float64 from the site's tensors and W0."""
    wide = copy.deepcopy(site.factors).double()
    product = site.method.product(wide)
    return (site.method.delta(wide, site.base_matrix().double()) if product is None else product.dense()).detach()


def terms(site: Site) -> Tensor:
    """The sum of the absolute values of all terms of which the site's change is made, as matrices in float64."""
    wide = copy.deepcopy(site.factors).double()
    return site.method.absolute(wide, site.base_matrix().double()).detach()


def magnitude(kind: CalledKind, layer: Any, x: Tensor, w: Tensor, site: Site) -> Tensor:
    """The sum of the absolute values of all terms in the layer's output, float64: what rounding is relative to."""
    x = widened(x).abs()
    total = kind.run(layer, x, w.detach().double().abs() + kind.from_matrix(layer, terms(site)))
    return (
        total if getattr(layer, "bias", None) is None else total + kind.add_bias(layer, torch.zeros_like(total)).abs()
    )


# Every output is a sum of terms that are rounded at most this often in the layer's dtype (input, weight, factor, three
# intermediate results, sum, bias); accumulation inside a kernel is at least float32 and adds the float32 share below.
ROUNDINGS = 8


def close_to_rounding(
    found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype, roundings: int = ROUNDINGS
) -> None:
    """Assert |found − expected| <= roundings · eps(dtype) · size, elementwise."""
    error = (found.double() - expected.double()).abs()
    bound = roundings * torch.finfo(dtype).eps * size.double()
    assert bool((error <= bound).all()), f"off by {float((error / bound).max()):.2f} of the bound"


def bits(t: Tensor) -> bytes:
    if hasattr(t, "__tensor_flatten__"):  # torchao's
        return b"".join(bits(inner) for name in t.__tensor_flatten__()[0] if (inner := getattr(t, name)) is not None)
    return bytes(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digest(t: Tensor) -> bytes:
    """Of a tensor's bits: a snapshot of a real model is not to be a second model."""
    if hasattr(t, "__tensor_flatten__"):  # torchao's
        return b"".join(digest(inner) for name in t.__tensor_flatten__()[0] if (inner := getattr(t, name)) is not None)
    return hashlib.blake2b(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).digest()


def digests(model: nn.Module) -> dict[str, bytes]:
    """Of everything in a model's state."""
    return {name: digest(t) for name, t in model.state_dict().items()}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an adapter might leave changed."""
    seen: dict[str, Any] = {"keys": list(model.state_dict()), "named": [n for n, _ in model.named_parameters()]}
    for name, module in model.named_modules():
        seen[name] = {
            "type": type(module),
            "identity": module,
            "training": module.training,
            "attributes": sorted(vars(module)),
            "children": list(module._modules),
            "parameters": {
                k: None if p is None else (id(p), p.requires_grad, digest(p)) for k, p in module._parameters.items()
            },
            "buffers": {k: None if b is None else (id(b), digest(b)) for k, b in module._buffers.items()},
            "hooks": {k: list(v) for k, v in vars(module).items() if k.endswith(("_hooks", "_kwargs", "_called"))},
        }
    return seen


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == value, f"{name!r} changed"


@contextmanager
def refused(model: nn.Module, *words: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Within the block a call fails with a message that holds every word, and the model is left as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same(before, snapshot(model))


class Checks:
    """Named checks of one walk. One that fails is kept and the next goes on; all are told at the end.

    Example:
        with Checks() as check:
            with check("merged is adapted"):
                close(merged, adapted)
    """

    def __init__(self) -> None:
        self.failed: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, pytest.fail.Exception):
            self.failed.append(f"-- {name} --\n{traceback.format_exc()}")

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.failed:
            raise AssertionError(f"{len(self.failed)} failed:\n" + "\n".join(self.failed)) from error
