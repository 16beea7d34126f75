"""Switched off, kept in memory, swapped in and combined: every method on every layer."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import adapt, close, equal_bits, frozen, host, merge, perturb, refused
from rows import Kind, asked, rows
from safetensors.torch import save_file

from svdpeft import LoRA, attach, combine, load
from svdpeft.methods.base import Factored, Method

TURN = [(m, k) for m, k in asked("switching") if m.factored]


@rows("method, kind", TURN)
def test_off_in_memory_swapped_in_and_combined(method: Method, kind: Kind, tmp_path: Path):
    model, x = host(kind)
    base = frozen(model, x)  # as it is then: attention has a path of its own
    adapter = adapt(model, method, train=("head.weight",))
    start = adapter.state_dict()
    perturb(adapter)
    out, state = model(x), adapter.state_dict()

    # Off it is the base, and can be saved and merged.
    adapter.disable()
    assert equal_bits(model(x), base)
    adapter.save(tmp_path)
    merge(adapter)
    close(model(x), out)
    adapter.disable()
    assert equal_bits(model(x), base)
    adapter.enable()
    assert equal_bits(model(x), out)

    # Its values come back from memory, whatever state it is in, and a file is loaded switched off.
    adapter.load_state_dict(start)
    assert not equal_bits(model(x), out)
    merge(adapter)
    adapter.load_state_dict(state)
    assert adapter.state == "merged"
    adapter.unmerge()
    assert equal_bits(model(x), out)
    save_file(state.tensors, tmp_path / "one.safetensors", metadata=state.metadata)
    for source in (state, tmp_path / "one.safetensors", tmp_path):
        adapter.detach()
        adapter = load(model, source, enabled=False)
        assert equal_bits(model(x), base)
        adapter.enable()
        assert equal_bits(model(x), out)
    assert adapter.state_dict().metadata == state.metadata

    # A sum with another.
    beside = adapt(model, LoRA(rank=1), name="beside")
    perturb(beside)
    made = combine([(adapter, 0.7), (beside, -0.4)])
    for name in adapter.sites:
        close(made.adapter.delta(name), 0.7 * adapter.delta(name) - 0.4 * beside.delta(name))
        assert made.lost[name] < 1e-9
    for each in (made.adapter, beside):
        each.detach()

    # A LoRA takes its update.
    deltas = {name: adapter.delta(name) for name in adapter.sites}
    full = any(site.method.as_product(site.factors, site.base_matrix) is None for site in adapter.sites.values())
    room = {name: min(site.shape[1:]) for name, site in adapter.sites.items()}
    adapter.detach()
    slot = attach(model, LoRA(rank=room, alpha=5.0), model.targets, train=["head.weight"], name="slot")
    if full:
        with refused(model, "has an update of full rank: no LoRA can hold it"):
            slot.load_state_dict(state)
        return
    slot.load_state_dict(state)
    for name, delta in deltas.items():
        close(slot.delta(name), delta)
    if isinstance(method, Factored) and not method.dropout:
        close(model(x), out)
    assert torch.equal(slot.own["head.weight"], state.tensors["head.weight"])
