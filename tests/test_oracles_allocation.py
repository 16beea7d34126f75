"""AdaLoRA and rank allocation against their formulas in NumPy float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import perturb
from oracle import Array, every_shape, linear, near, output, rank_of, tensors
from torch import nn

from svdpeft import SORSA, AdaLoRA, Budget, LoRA, PiSSA, attach
from svdpeft.adapter.adapter import Adapter

AXES = {"L": 0, "A": 1}


@every_shape
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("scaling", ["paper", "code"])
def test_adalora_start_forward_count(shape: tuple[int, int], alpha: float | None, scaling: str):
    model, w, x = linear(shape)
    model.eval()  # a training would miss the method's own step when its factors are moved by hand
    adapter = attach(model, AdaLoRA(rank=4, alpha=alpha, scaling=scaling))
    start = tensors(adapter)
    assert not start["C"].any()
    assert set(start) == {"L", "C", "A"}
    for name in ("L", "A"):
        assert 0.01 < start[name].std() < 0.03
    near(output(model, x), x @ w.T)
    perturb(adapter)
    f, s = tensors(adapter), (4 if alpha is None else alpha) / (4 if scaling == "paper" else 4 + 1e-5)
    near(output(model, x), x @ (w + s * f["L"] @ np.diag(f["C"]) @ f["A"]).T)
    assert adapter.trainable_count == 4 * (sum(shape) + 1)


def three(method, seed: int = 0) -> tuple[nn.ModuleDict, Adapter]:
    """Three layers of different shapes, ranks and values."""
    torch.manual_seed(seed)
    shapes = {"a": (6, 9), "b": (9, 6), "c": (7, 5)}
    model = nn.ModuleDict({k: nn.Linear(n, m, bias=False, dtype=torch.float64) for k, (m, n) in shapes.items()})
    adapter = attach(model, method)
    perturb(adapter)
    return model, adapter


def values(adapter: Adapter) -> dict[str, dict[str, Array]]:
    return {k: {n: t.numpy().copy() for n, t in s.factors.tensors().items()} for k, s in adapter.sites.items()}


@pytest.mark.parametrize("regulariser", ["paper", "code"])
def test_adalora_penalty(regulariser: str):
    _, adapter = three(AdaLoRA(rank=3, gamma=0.7, regulariser=regulariser))
    norms = [np.linalg.norm(q.T @ q - np.eye(3)) for f in values(adapter).values() for q in (f["L"], f["A"].T)]
    penalty = adapter.penalty()
    near(penalty, 0.7 * (np.sum(np.square(norms)) if regulariser == "paper" else np.mean(norms)))
    penalty.backward()
    p = adapter.sites["b"].factors.A
    found, step = p.grad.clone(), 1e-6
    for i, j in ((0, 0), (2, 4)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p[i, j] += sign * step
                ends.append(float(adapter.penalty()))
                p[i, j] -= sign * step
        assert float(found[i, j]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    assert AdaLoRA(rank=3, gamma=0.0).penalty([adapter.sites["a"].factors]) is None


class Allocation:
    """The paper's algorithm: averages, scores, threshold and mask, in NumPy."""

    def __init__(self, f: dict, budget: Budget, total: int, pruned: tuple[str, ...], trains: tuple[str, ...]) -> None:
        self.start = {k: {n: f[k].get(f"{n}0", np.zeros_like(f[k][n])) for n in trains} for k in f}
        self.anchored = {k: {n: f"{n}0" in f[k] for n in trains} for k in f}
        self.budget, self.total, self.pruned, self.trains = budget, total, pruned, trains
        self.mean = {k: {n: 0.0 * f[k][n] for n in trains} for k in f}
        self.spread = {k: {n: 0.0 * f[k][n] for n in trains} for k in f}
        self.fixed: dict[str, Array] | None = None

    def measure(self, f: dict, g: dict) -> None:
        b = self.budget
        for k in f:
            for n in self.trains:
                moved = f[k][n] - self.start[k][n] if self.anchored[k][n] else f[k][n]
                importance = np.abs(moved * g[k][n])
                self.mean[k][n] = b.beta1 * self.mean[k][n] + (1 - b.beta1) * importance
                self.spread[k][n] = b.beta2 * self.spread[k][n] + (1 - b.beta2) * np.abs(importance - self.mean[k][n])

    def size(self, t: int, first: int, last: int) -> int:
        b = self.budget
        if t <= b.t_initial:
            return first
        if t > self.total - b.t_final:
            return last
        left = 1 - (t - b.t_initial) / (self.total - b.t_initial - b.t_final)
        return int(last + (first - last) * left**3)

    def prune(self, t: int, f: dict) -> dict:
        b, last_choice = self.budget, self.total - self.budget.t_final
        keep = self.fixed
        if t <= last_choice and (t == last_choice or (t > b.t_initial and t % b.interval == 0)):
            scores = {}
            for k in f:
                s = {n: self.mean[k][n] * self.spread[k][n] for n in self.trains}
                scores[k] = sum(s[n] if n == "C" else s[n].mean(AXES[n]) for n in self.trains)
            flat = np.concatenate(list(scores.values()))
            last = int(b.target_rank * len(f)) if b.target_rank else len(flat) * 2 // 3
            size = self.size(t, len(flat), last)
            threshold = np.sort(flat)[::-1][size - 1]
            keep = {k: scores[k] >= threshold for k in f}
            if t == last_choice:
                self.fixed = keep
        if keep is not None and (t >= last_choice or t % b.interval == 0):
            for k in f:
                for n in self.pruned:
                    mask = keep[k] if n == "C" else keep[k][None, :] if n == "L" else keep[k][:, None]
                    f[k][n] = np.where(mask, f[k][n], self.start[k][n])
        return f


BUDGETS = [
    Budget(t_initial=1, t_final=2, beta1=0.8, beta2=0.6),
    Budget(target_rank=1.5, t_initial=2, t_final=3, interval=2),
    Budget(target_rank=2, importance="code", t_final=1),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("method", "pruned"),
    [
        (AdaLoRA(rank=3, gamma=0.0), ("C",)),
        (SORSA(rank=3, gamma=0.0), ("L", "C", "A")),
        (PiSSA(rank=3), ("L", "A")),
        (LoRA(rank=3), ("L",)),
    ],
    ids=lambda v: v.name if hasattr(v, "name") else "",
)
def test_allocation_follows_the_algorithm(method, pruned: tuple[str, ...], budget: Budget):
    """Ten steps of gradient descent on made-up gradients: the same factors after each."""
    total, lr = 10, 0.05
    rng = np.random.default_rng(3)
    _, adapter = three(dataclasses.replace(method, allocate=budget))
    f = values(adapter)
    oracle = Allocation(f, budget, total, pruned, method.trains)
    left_out = 0
    for t in range(1, total + 1):
        g = {k: {n: rng.standard_normal(f[k][n].shape) for n in method.trains} for k in f}
        for k, site in adapter.sites.items():
            for n in method.trains:
                getattr(site.factors, n).grad = torch.from_numpy(g[k][n].copy())
        if budget.importance == "paper":
            oracle.measure(f, g)
        adapter.before_step(lr, total)
        with torch.no_grad():
            for p in adapter.parameters():
                p.sub_(lr * p.grad)
        f = {k: {n: v - lr * g[k][n] if n in g[k] else v for n, v in f[k].items()} for k in f}
        if budget.importance == "code" and t < total - budget.t_final:
            oracle.measure(f, g)
        adapter.after_step()
        if t < total - budget.t_final:
            for k, site in adapter.sites.items():
                for n in method.trains:
                    near(site.factors.memory[f"importance.{n}"], oracle.mean[k][n])
                    near(site.factors.memory[f"uncertainty.{n}"], oracle.spread[k][n])
        f = oracle.prune(t, f)
        found = values(adapter)
        for k in f:
            for n in f[k]:
                near(found[k][n], f[k][n])
    for k, site in adapter.sites.items():
        kept = site.factors.memory["kept"].numpy()
        assert set(site.factors.memory) == {"kept"}, "the averages are gone"
        left_out += int((~kept).sum())
        assert rank_of(adapter.delta(k).numpy()) <= (2 if "L" in pruned and "A" in pruned else 1) * kept.sum()
    assert left_out == 9 - (6 if budget.target_rank is None else int(3 * budget.target_rank))


def test_budget_counts_each_matrix_of_a_batch():
    """A grouped convolution has the triplets of every group; the target is per matrix."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3, groups=2), "fc": nn.Linear(5, 4)})
    adapter = attach(model, AdaLoRA(rank=3, allocate=Budget(target_rank=2)), "all")
    perturb(adapter)
    for p in adapter.parameters():
        p.grad = torch.randn_like(p)
    adapter.before_step(0.1, total_steps=1)
    adapter.after_step()
    kept = [site.factors.memory["kept"] for site in adapter.sites.values()]
    assert [tuple(k.shape) for k in kept] == [(2, 3), (3,)]
    assert sum(int(k.sum()) for k in kept) == 2 * 3
    for site, k in zip(adapter.sites.values(), kept, strict=True):
        assert torch.equal(site.factors.C != 0, k)
