"""Files without frozen bases: the same bits here, the same outputs with another solver, and else a refusal by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, equal_bits, factors_of, host, perturb, refused
from rows import Kind, asked, rows, some
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from solvers import another_solver
from torch import nn

import svdpeft
from svdpeft import CheckpointError, attach, load
from svdpeft.adapter.file import HEADER, TENSORS
from svdpeft.adapter.origin import frozen
from svdpeft.methods.base import Method

NEAR = 1e-5  # of the largest output


def nbytes(folder: Path) -> int:
    """Of the tensors of a file, without its header."""
    return sum(tensor.nbytes for tensor in load_file(folder / TENSORS).values())


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / HEADER).read_text())["sites"]


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= NEAR * expected.abs().max())


DTYPES = [torch.float32, torch.float64]


TURN = [(m, k) for m, k in asked("a file without its bases") if m.factored]


@rows("method, kind, dtype", [(m, k, d) for m, k in TURN for d in some(DTYPES, "derived", m, k)])
def test_the_same_bits_here_and_the_same_outputs_elsewhere(
    method: Method, kind: Kind, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, x = host(kind, dtype=dtype)
    adapter = adapt(model, method)
    perturb(adapter)
    found = [frozen(site.method, site.factors) for site in adapter.sites.values()]
    if not any(found):
        adapter.save(tmp_path / "a", bases="derived")
        assert json.loads((tmp_path / "a" / HEADER).read_text())["format"] == 3, "there is nothing to leave out"
        return
    if method.needs or method.pairs:
        with pytest.raises(ValueError, match=r"cannot be left out of a file: .* starts from more than the weight"):
            adapter.save(tmp_path / "a", bases="derived")
        assert not (tmp_path / "a").exists()
        return
    adapter.save(tmp_path / "a", bases="derived")
    still = sum(
        t.nbytes for s in adapter.sites.values() for n, t in s.factors.tensors().items() if n in s.method.settable
    )
    trained = sum(parameter.nbytes for parameter in adapter.parameters())
    packing = 16 * sum(not t.is_floating_point() for s in factors_of(adapter).values() for t in s.values())
    assert nbytes(tmp_path / "a") <= 2 * trained + still + packing  # a stream of zlib has a dozen bytes of its own
    other, _ = host(kind, dtype=dtype)
    again = load(other, tmp_path / "a")
    for name, tensors in factors_of(adapter).items():
        assert all(equal_bits(factors_of(again)[name][role], tensor) for role, tensor in tensors.items())
    expected = model(x).detach()
    assert equal_bits(other(x), expected)
    again.save(tmp_path / "b", bases="derived")
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()
    another_solver(monkeypatch)
    third, _ = host(kind, dtype=dtype)
    load(third, tmp_path / "a")
    assert near(third(x), expected)


DEGENERATE = {
    "the identity": lambda m, n: torch.eye(m, n),
    "one block twice": lambda m, n: torch.block_diag(*[torch.randn(m // 2, n // 2)] * 2),
    "of rank three": lambda m, n: torch.randn(m, 3) @ torch.randn(3, n),
    "orthogonal": lambda m, n: nn.init.orthogonal_(torch.empty(m, n)),
    "signs": lambda m, n: torch.randint(2, (m, n)) * 2.0 - 1,
    "repeated rows": lambda m, n: torch.randn(m // 4, n).repeat(4, 1),
}
METHODS = [
    svdpeft.SVFT(),
    svdpeft.SVFT(pattern="banded"),
    svdpeft.SVFT(pattern="random"),
    svdpeft.SVFT(pattern="topk"),
    svdpeft.SVF(),
    svdpeft.SVDiff(),
    svdpeft.SSVD(rank=12),
    svdpeft.FRoD(density=0.1),
    svdpeft.LoRAXS(rank=5),
    svdpeft.PSOFT(rank=5),
    svdpeft.AntiPaSTO(rank=12),
    svdpeft.TinyLoRA(rank=5),
    svdpeft.PiCa(rank=5),
    svdpeft.SVFit(rank=5),
    svdpeft.PiSSA(rank=5),
    svdpeft.SORSA(rank=5),
]


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_whose_singular_values_are_equal(method: Method, name: str, tmp_path: Path, monkeypatch: Any):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(DEGENERATE[name](*layer.weight.shape))
    others = [copy.deepcopy(model) for _ in range(3)]
    adapter = attach(model, method)
    perturb(adapter)
    adapter.save(tmp_path / "a", bases="derived")
    x = torch.randn(5, 16)
    for seed, other in enumerate(others):
        with monkeypatch.context() as patch:
            another_solver(patch, seed)
            load(other, tmp_path / "a")
        assert near(other(x), model(x))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).to(dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = attach(net(), svdpeft.SVFT(pattern="banded"))
    perturb(adapter)
    adapter.save(tmp_path / "a")
    return tmp_path / "a"


def test_auto_leaves_out_what_takes_more_than_a_quarter_of_the_weights(tmp_path: Path):
    for method, left_out in (
        (svdpeft.SVFT(), True),
        (svdpeft.LoRAXS(rank=2), True),  # 2 · 32 values of 240
        (svdpeft.LoRAXS(rank=1), False),
        (svdpeft.PiSSA(rank=8), False),  # what is frozen is a start, and no basis
        (svdpeft.LoRA(rank=2), False),
    ):
        attach(net(), method).save(tmp_path / "a")
        assert all(("derived" in entry) == left_out for entry in entries(tmp_path / "a").values()), method
    attach(net(), svdpeft.SVFT()).save(tmp_path / "a", bases="stored")
    assert json.loads((tmp_path / "a" / HEADER).read_text())["format"] == 3
    with pytest.raises(ValueError, match=r"bases 'derive' is not one of auto, stored, derived: .*'derived'"):
        attach(net(), svdpeft.SVFT()).save(tmp_path / "b", bases="derive")  # type: ignore[arg-type]


def test_each_method_of_an_adapter_goes_its_own_way(tmp_path: Path):
    adapter = attach(net(), targets={"0": svdpeft.SVFT(), "2": svdpeft.PiSSA(rank=1)})
    adapter.save(tmp_path / "a")
    assert ["derived" in entry for entry in entries(tmp_path / "a").values()] == [True, False]
    assert load(net(), tmp_path / "a").sites.keys() == adapter.sites.keys()


def test_what_is_turned_while_it_runs_is_in_the_file(tmp_path: Path):
    adapter = attach(net(), svdpeft.SVDiff())
    perturb(adapter)
    adapter.set(strength=0.25)
    adapter.save(tmp_path / "a")
    model = net()
    load(model, tmp_path / "a")
    x = torch.randn(3, 12)
    assert equal_bits(model(x), adapter.model(x))


@pytest.mark.parametrize("check_base", [True, False])
def test_another_base_is_refused_by_name(saved: Path, check_base: bool):
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-6
    with refused(model, "2 is another one", "adapter.save(…, bases='stored')", error=CheckpointError):
        load(model, saved, check_base=check_base)
    with refused(net().bfloat16(), "saved for torch.float32, here torch.bfloat16", "bases='stored'"):
        load(refused_model := net().bfloat16(), saved, check_base=check_base)
        assert refused_model


def rewritten(folder: Path, change: Any) -> None:
    """The file with another header, in both of its places."""
    header = json.loads((folder / HEADER).read_text())
    change(header)
    with safe_open(folder / TENSORS, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata | {HEADER: json.dumps(header)})
    (folder / HEADER).write_text(json.dumps(header))


@pytest.mark.parametrize("role", ["L", "A", "sigma"])
def test_another_fingerprint_is_refused_by_name(saved: Path, role: str):
    def change(header: dict[str, Any]) -> None:
        header["sites"]["2"]["derived"]["products"][role][3] += 1e-4

    rewritten(saved, change)
    with refused(net(), f"2/{role} comes out otherwise here", error=CheckpointError):
        load(net(), saved)


def test_a_solver_that_errs_is_refused_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Vectors of two near values that are turned a little into each other: the weight is made of them as before."""
    real = torch.linalg.eigh

    def solve(a: torch.Tensor) -> Any:
        values, vectors = real(a)
        vectors[:, 4:6] = vectors[:, 4:6] @ torch.tensor([[1.0, -1e-5], [1e-5, 1.0]], dtype=a.dtype)
        return torch.return_types.linalg_eigh((values, vectors))

    monkeypatch.setattr(torch.linalg, "eigh", solve)
    with pytest.raises(CheckpointError, match="0/L comes out otherwise here"):
        load(net(), saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header["packed"].update({"0/index": [7]}), "not the 7 whole numbers that the header states"),
        (lambda header: header["packed"].update({"0/nothing": [7]}), "damaged"),
        (lambda header: header["sites"]["0"]["derived"].pop("seed"), "seed"),
        (lambda header: header["sites"]["0"]["derived"]["products"].update({"M": [0.0] * 8}), "'M'"),
        (lambda header: header["sites"]["0"]["derived"]["products"].pop("L"), "the factors of 0 make no"),
        (lambda header: header["sites"]["0"]["derived"]["products"].update({"L": []}), "0/L"),
    ],
)
def test_a_damaged_file_is_refused(saved: Path, change: Any, words: str):
    rewritten(saved, change)
    model = net()
    with refused(model, words, error=CheckpointError):
        load(model, saved)


def test_bases_that_cannot_be_found_again_stay_in_the_file(tmp_path: Path):
    """Bases that came from elsewhere, a weight that has changed, a method that has seen data."""

    def other_bases(adapter: Any) -> None:
        site = adapter.sites["0"]
        site.factors.L.data[:, 1] *= -1
        site.factors.A.data[1] *= -1

    def other_weight(adapter: Any) -> None:
        adapter.model[0]._parameters["weight"].data[0, 0] += 0.1  # its first value is among those of the sample

    for change, words in ((other_bases, "not what attaching made"), (other_weight, "its weight has changed")):
        adapter = attach(net(), svdpeft.SVFT(pattern="banded"))
        change(adapter)
        with pytest.raises(ValueError, match=rf"0 cannot be left out of a file: .*{words}.*bases='stored'"):
            adapter.save(tmp_path / "a", bases="derived")
        assert not (tmp_path / "a").exists()
        adapter.save(tmp_path / "a")
        assert not any("derived" in entry for entry in entries(tmp_path / "a").values())
        assert load(copy.deepcopy(net()), tmp_path / "a", check_base=False)
        (tmp_path / "a" / HEADER).unlink()
        (tmp_path / "a" / TENSORS).unlink()
        (tmp_path / "a").rmdir()


def test_a_file_with_bases_gives_an_adapter_that_is_saved_with_bases(tmp_path: Path):
    attach(net(), svdpeft.SVFT()).save(tmp_path / "a", bases="stored")
    adapter = load(net(), tmp_path / "a")
    adapter.save(tmp_path / "b")
    assert nbytes(tmp_path / "b") == nbytes(tmp_path / "a")
    with pytest.raises(ValueError, match="came from a file or another adapter with all its tensors"):
        adapter.save(tmp_path / "c", bases="derived")


def test_renamed_modules_do_not_matter(saved: Path):
    inner = net()
    x = torch.randn(3, 12)
    model = nn.ModuleDict({"body": inner})
    load(model, saved, rename={"": "body."})
    plain = net()
    load(plain, saved)
    assert equal_bits(inner(x), plain(x))


def test_a_cache_serves_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with svdpeft.svd_cache(tmp_path / "svd"):
        adapter = attach(net(), svdpeft.SVFT())
        adapter.save(tmp_path / "a")
        monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("computed again"))
        load(net(), tmp_path / "a")


def test_values_are_taken_into_an_attached_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch):
    expected = net()
    load(expected, saved)
    x = torch.randn(3, 12)
    from svdpeft.adapter.loading import restore

    swapped, restored = net(), net()
    attach(swapped, svdpeft.SVFT(pattern="banded")).load_state_dict(saved)
    assert equal_bits(swapped(x), expected(x))
    adapter = attach(restored, svdpeft.SVFT(pattern="banded"))
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("it has the bases already"))
    restore(adapter, saved)
    assert equal_bits(restored(x), expected(x))
    adapter.sites["0"].factors.L.data[:, 1] *= -1
    with pytest.raises(CheckpointError, match="0/L comes out otherwise"):
        restore(adapter, saved)
