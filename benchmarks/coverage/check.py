"""What is checked on one model, the same for all: every weight is adapted or named, and everything comes back."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import svdpeft
from benchmarks.coverage.case import Case

RANK = 2
BOUND = 1e-8  # of the largest output: how far a merged model may be from the adapted one. One bound for all models.
DIFFERS = 1e-5  # of the largest output: what the perturbed factors change at least


@dataclass
class Row:
    """What was found for one model."""

    family: str
    label: str
    adapted: int = 0  # weights
    inside: int = 0  # values in them
    total: int = 0  # values in all weights
    kinds: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    left: dict[str, Counter[str]] = field(default_factory=dict)  # why -> names
    error: str = ""


class InDouble(TorchFunctionMode):
    """Within this mode what models cast to float32 by name is float64, so that one bound holds for all of them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def in_double() -> Iterator[None]:
    """Everything in float64, every random draw of the model the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def check(case: Case) -> Row:
    """Adapt every weight of one model and check what svdpeft promises.

    Raises:
        AssertionError: which promise was broken.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own making
        model, forward = case.make()
        model = model.double().eval().requires_grad_(False)

        def run() -> Tensor:
            with in_double():
                return torch.cat([t.flatten() for t in tensors(forward(model))])

        with torch.no_grad():
            settle(model, run)
            base = run()
        assert base.isfinite().all(), "the base model's output is not finite"
        before = {name: t.clone() for name, t in state(model)}
        keys = list(model.state_dict())
        matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}

    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=RANK), targets="all", clip_rank=True)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        assert same(run(), base), "the adapted model does not start at the base model"
    warned = any("adapter.unreached" in str(w.message) for w in caught)
    assert warned == bool(adapter.unreached), "sites that the batch does not reach, and no warning, or the reverse"
    row = describe(case, model, adapter, matrices)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note_idle(row, case.idle, adapter, run)
        perturb(adapter)
        with torch.no_grad():
            adapted = run()
        size = adapted.abs().max()
        assert size.isfinite(), "the adapted model's output is not finite"
        assert (adapted - base).abs().max() > DIFFERS * size, "the adapters change nothing"
        with torch.no_grad():
            adapter.merge()
            error = (run() - adapted).abs().max() / size
            assert error <= BOUND, f"merged, the output is off by {error:.1e} of its size"
            adapter.unmerge()
            assert same(run(), adapted), "unmerge() does not give the adapted model back"
            adapter.detach()
            assert list(model.state_dict()) == keys, "detach() leaves other names in the state_dict"
            after = dict(state(model))
            assert list(after) == list(before), "detach() leaves other parameters or buffers"
            changed = [name for name in before if not same(before[name], after[name])]
            assert not changed, f"detach() does not give {changed} back"
            assert same(run(), base), "detach() does not give the base model back"
    return row


def settle(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Move a random model off its special values, which hide what a weight does.

    Gates and scales that start at 0 or 1e-6 would switch whole branches off, and normalisation layers without
    statistics of the data let activations fade away.
    """
    for p in model.parameters():
        if p.numel() and bool((p == p.flatten()[0]).all()):
            p.add_(0.1 * torch.randn_like(p))

    def normalise(module: Any, args: tuple[Tensor]) -> None:
        axes = [0, *range(2, args[0].ndim)]
        module.running_mean.copy_(args[0].mean(axes) / 2)  # never a variance of zero, from a single position
        module.running_var.copy_(args[0].square().mean(axes))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    handles = [norm.register_forward_pre_hook(normalise) for norm in norms]
    run()
    for handle in handles:
        handle.remove()


@torch.no_grad()
def perturb(adapter: svdpeft.Adapter, seed: int = 0, relative: float = 0.05) -> None:
    """Move every factor off its start, so that each update has about this size relative to its weight."""
    generator = torch.Generator().manual_seed(seed)
    for site in adapter.sites.values():
        n = site.shape[-1]
        for role, p in site.factors.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if role == "L":  # a row of A has the norm 1/√3
                p.copy_(relative * site.weight.original.square().mean().sqrt() * (3 * n / RANK) ** 0.5 * noise)
            else:
                p.add_(0.1 * p.square().mean().sqrt() * noise)


def describe(case: Case, model: nn.Module, adapter: svdpeft.Adapter, matrices: dict[str, nn.Parameter]) -> Row:
    """Count what is adapted, and check that every weight is either adapted or named with a reason."""
    row = Row(case.family, case.label, len(adapter.sites))
    adapted: set[int] = set()
    for site in adapter.sites.values():
        adapted.add(id(site.weight.owner._parameters[site.weight.parameter]))
        batch, m, n = site.shape
        row.inside += batch * m * n
        row.kinds[site.kind.name] += 1
        row.paths[site.path] += 1
    left: set[int] = set()
    for name, why in adapter.skipped.items():
        owner, _, attribute = name.rpartition(".")
        whole = getattr(model.get_submodule(owner), attribute) if name else model
        held = [whole] if isinstance(whole, Tensor) else list(whole.parameters(recurse=False))
        if nn.utils.parametrize.is_parametrized(whole):
            held += whole.parametrizations.parameters()
        left |= set(map(id, held))
        row.left.setdefault(blocks(why.partition(";")[0]), Counter())[blocks(name)] += 1
    if adapter.unreached:
        row.left["not reached by this input"] = Counter(map(blocks, adapter.unreached))
    for name, p in matrices.items():
        known, vector = id(p) in adapted | left, sum(size > 1 for size in p.shape) < 2
        assert known or vector, f"{name} is neither adapted nor named"
        row.total += p.numel() if known else 0
    return row


def note_idle(row: Row, known: tuple[str, str], adapter: svdpeft.Adapter, run: Callable[[], Tensor]) -> None:
    """Note the sites that change nothing, though the model reached them; only the known ones may.

    A few units happen to be off at any one place, and everything behind them, so that several are tried.
    """
    idle = [name for name in adapter.sites if name not in adapter.unreached]
    for draw in range(1, 6):
        perturb(adapter, draw, 0.02 * 2**draw)
        output = run()
        (output * torch.randn_like(output)).sum().backward()
        idle = [name for name in idle if not any(map(moves, adapter.sites[name].factors.parameters()))]
        if not idle:
            break
    pattern, why = known
    for name in idle:
        assert re.fullmatch(pattern, name), f"{name} is adapted, is not reported as unreached, and changes nothing"
        row.left.setdefault(f"adapted without effect: {why}", Counter())[blocks(name)] += 1


def moves(p: Tensor) -> bool:
    """Whether the output depends on a trained tensor."""
    return p.grad is not None and bool((p.grad.isfinite() & (p.grad != 0)).any())


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, the buffers that are not saved too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def blocks(name: str) -> str:
    """``blocks.3.attn.q`` -> ``blocks.*.attn.q``: repeated blocks share an entry."""
    return re.sub(r"(?<![a-z])\d+|(?<=layer|stage|block)\d+", "*", name)
