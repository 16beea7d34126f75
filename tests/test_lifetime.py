"""What the library keeps of models and parameters goes with them."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import svdpeft
from svdpeft.methods.base import progress


def test_what_is_kept_of_parameters_goes_with_them():
    """Steps are counted of the parameters that exist: 100 trainings leave as many entries as one."""
    sizes = []
    for _ in range(6):
        model = nn.Sequential(nn.Linear(4, 3))
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank=1, mode="decoupled"))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(2):
            model.train()(torch.ones(1, 4)).sum().backward()
            adapter.before_step(0.1)
            optimizer.step()
            adapter.after_step()
        del model, adapter, optimizer
        gc.collect()
        sizes.append(len(progress._steps))
    assert len(set(sizes)) == 1, sizes


def test_nothing_of_the_library_grows():
    """No table of a module, and no cache, has more in it after many models than after some."""

    def once() -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        adapter = svdpeft.attach(model, svdpeft.SORSA(rank={"0": 1, ".*": 2}, mode="decoupled"))
        model.train()(torch.ones(1, 4)).sum().backward()
        with adapter.disabled(), svdpeft.using(model):
            model(torch.ones(1, 4))
        adapter.merge()
        copy.deepcopy(model)
        adapter.detach()
        del model, adapter
        gc.collect()

    def sizes() -> dict[str, int]:
        found = {}
        for name, module in list(sys.modules.items()):
            if name.startswith("svdpeft"):
                for key, value in vars(module).items():
                    if isinstance(
                        value, functools._lru_cache_wrapper
                    ):  # torch has other ones, with a cache_info of their own
                        found[f"{name}.{key}"] = value.cache_info().currsize
                    elif isinstance(value, (dict, list, set, weakref.WeakKeyDictionary, WeakIdKeyDictionary)):
                        found[f"{name}.{key}"] = len(value)
        return found

    once()
    once()
    before = sizes()
    for _ in range(10):
        once()
    after = sizes()
    assert {key: after[key] - count for key, count in before.items() if after[key] > count} == {}
    assert "svdpeft.methods.base.progress._steps" in after
