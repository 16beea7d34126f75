"""A checkpoint of SORSA's own package: what its layer computes, the adapter here computes; everything else is refused.

The folders are laid out as ``sorsa`` 1.0.1 writes them with transformers 5.24: the base below ``model.``, of an adapted
layer ``weight``, ``sorsa_A``, ``sorsa_S`` and ``sorsa_B``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file, save_file
from tiny_language import llama, small_tokenizer
from torch import Tensor, nn
from typer.testing import CliRunner

import svdpeft
from svdpeft.cli import app

IDS = torch.arange(1, 9)[None]
RANK = 3


class Reference(nn.Module):
    """The package's layer, from its formula: y = x Rᵀ + s x (B diag(S) A)ᵀ + b."""

    def __init__(self, layer: nn.Linear, alpha: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = 1.0 if alpha is None else alpha / RANK
        w = layer.weight.detach().double()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        self.sorsa_A, self.sorsa_S = nn.Parameter(vh[:RANK].clone()), nn.Parameter(s[:RANK].clone())
        self.sorsa_B = nn.Parameter(u[:, :RANK].clone())
        self.weight = nn.Parameter((w - self.scale * self.product()).to(dtype))
        self.bias = layer.bias

    def product(self) -> Tensor:
        return self.sorsa_B @ torch.diag(self.sorsa_S) @ self.sorsa_A

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x).T + self.scale * (x @ self.product().T)
        return y if self.bias is None else y + self.bias


def base(dtype: torch.dtype = torch.float64) -> Any:
    return llama(small_tokenizer(), dtype)


def checkpoint(
    folder: Path, alpha: float | None = None, dtype: torch.dtype = torch.float64, trained: bool = True
) -> nn.Module:
    """Write a folder, and return the model that the package has."""
    model = base()
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "down_proj")):
            model.set_submodule(name, layer := Reference(module, alpha, dtype))
            for p in (layer.sorsa_A, layer.sorsa_S, layer.sorsa_B) if trained else ():
                p.data.add_(0.1 * torch.randn_like(p))
    config = {"model_type": "sorsa", "rank": RANK, "alpha": alpha, "dropout": 0.1, "architectures": ["SORSAModel"]}
    config |= {"base_model_name_or_path": "tiny", "target_modules": ["q_proj", "down_proj"], "dtype": "float32"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {f"model.{key}": t.clone(memory_format=torch.contiguous_format) for key, t in model.state_dict().items()},
        folder / "model.safetensors",
    )
    return model


@pytest.mark.parametrize("alpha", [None, 7.5])
def test_the_outputs_are_those_of_the_package(alpha: float | None, tmp_path: Path):
    theirs, ours = checkpoint(tmp_path / "theirs", alpha), base()
    adapter = svdpeft.import_sorsa(ours, tmp_path / "theirs")
    assert set(adapter.sites) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert {str(site.method) for site in adapter.sites.values()} == {
        str(svdpeft.SORSA(rank=RANK, alpha=alpha, dropout=0.1))
    }
    expected, before = theirs(IDS).logits, base()(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-8, atol=1e-8)
    assert (expected - before).abs().max() > 0.1
    with adapter.disabled():
        assert torch.equal(ours(IDS).logits, before)
    for name, site in adapter.sites.items():  # its tensors are the trained ones: a regulariser sees their bases
        layer: Any = theirs.get_submodule(name)
        assert torch.equal(site.factors.L.double(), layer.sorsa_B)
        assert torch.equal(site.factors.C.double(), layer.sorsa_S)
        assert torch.equal(site.factors.A.double(), layer.sorsa_A)
    adapter.save(tmp_path / "ours")
    again = base()
    svdpeft.load(again, tmp_path / "ours")
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_an_untrained_checkpoint_is_the_base(tmp_path: Path):
    checkpoint(tmp_path / "theirs", trained=False)
    ours = base()
    svdpeft.import_sorsa(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, base()(IDS).logits, rtol=1e-8, atol=1e-8)


def test_it_trains_on_as_the_package_does(tmp_path: Path):
    theirs, ours = checkpoint(tmp_path / "theirs", 7.5), base()
    adapter = svdpeft.import_sorsa(ours, tmp_path / "theirs")
    for model in (theirs, ours.eval()):
        model(IDS, labels=IDS).loss.backward()
    for name, site in adapter.sites.items():
        layer: Any = theirs.get_submodule(name)
        for role, their in zip("LCA", (layer.sorsa_B, layer.sorsa_S, layer.sorsa_A), strict=True):
            torch.testing.assert_close(getattr(site.factors, role).grad, their.grad, rtol=1e-7, atol=1e-9)


def test_rounded_frozen_weights_are_told_with_their_size(tmp_path: Path):
    theirs, ours = checkpoint(tmp_path / "theirs", dtype=torch.bfloat16), base()
    with pytest.warns(UserWarning, match=r"rounded its frozen weights.*of ‖W0‖ \(at model\.layers"):
        adapter = svdpeft.import_sorsa(ours, tmp_path / "theirs")
    for name in adapter.sites:
        layer: Any = theirs.get_submodule(name)
        w = layer.weight.double() + layer.scale * layer.product()
        off = (ours.get_submodule(name).weight - w).norm() / w.norm()
        assert 1e-5 < off < 2.0**-9  # half of bfloat16's eps, the most that rounding to nearest can do
    change = (theirs(IDS).logits - base()(IDS).logits).norm()
    assert (ours(IDS).logits - theirs(IDS).logits).norm() < 0.1 * change


def test_the_rest_may_be_in_another_precision(tmp_path: Path):
    theirs, ours = checkpoint(tmp_path / "theirs"), base()
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    rest = [name for name in tensors if "q_proj" not in name and "down_proj" not in name]
    save_file(tensors | {name: tensors[name].bfloat16() for name in rest}, file)
    svdpeft.import_sorsa(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-8, atol=1e-8)
    save_file(tensors | {name: (1.02 * tensors[name]).bfloat16() for name in rest}, file)
    model = base()
    with refused(model, "is another in this model"):
        svdpeft.import_sorsa(model, tmp_path / "theirs")


def test_several_files_with_an_index(tmp_path: Path):
    theirs, ours = checkpoint(tmp_path / "theirs"), base()
    whole = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(whole)
    names, index = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, whole.with_name(f"part{i}.safetensors"))
        index |= dict.fromkeys(part, f"part{i}.safetensors")
    whole.unlink()
    whole.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    svdpeft.import_sorsa(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-8, atol=1e-8)


def test_a_tied_head_is_in_the_file_once(tmp_path: Path):
    checkpoint(tmp_path / "theirs")
    file, model = tmp_path / "theirs" / "model.safetensors", base()
    tensors = load_file(file)
    del tensors["model.lm_head.weight"]
    save_file(tensors, file)
    with refused(model, "lacks model.lm_head.weight", "another base, or cut off"):
        svdpeft.import_sorsa(model, tmp_path / "theirs")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(svdpeft.import_sorsa(model, tmp_path / "theirs").sites) == 4


Q = "model.model.layers.0.self_attn.q_proj"


def _without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, tensors: tensors.pop(name)


def _with(name: str, tensor: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, tensors: tensors.update({name: tensor})


def _says(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda config, tensors: config.update(fields)


def _merged(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [name.removesuffix(".sorsa_S") for name in tensors if name.endswith("sorsa_S")]:
        b, s, a = (tensors[f"{name}.sorsa_{role}"] for role in "BSA")
        tensors[f"{name}.weight"] += (b * s) @ a


def _base_again(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight"] = base().get_parameter("model.layers.0.self_attn.q_proj.weight").detach().clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_says(model_type="llama"), ("model_type 'llama'", "svdpeft extract")),
        (_says(rank=2), ("down_proj has tensors of", "[3, 48]", "[2, 48]")),
        (_says(rank=None), ("rank=None", "no number of its kind")),
        (_says(rank=3.0), ("rank=3.0", "no number of its kind")),
        (_says(alpha="8"), ("alpha='8'", "no number of its kind")),
        (_says(rs=True), ("rs=True", "not understood")),
        (_says(alpha=-1.0), ("alpha -1.0 is not positive",)),
        (_without(f"{Q}.sorsa_S"), ("lacks sorsa_S of model.layers.0.self_attn.q_proj",)),
        (_without(f"{Q}.weight"), (f"lacks {Q}.weight",)),
        (_with(f"{Q}.sorsa_T", torch.ones(3)), (f"{Q}.sorsa_T has no place",)),
        (_with("model.model.extra", torch.ones(3)), ("model.model.extra has no place",)),
        (_with("other.weight", torch.ones(3)), ("other.weight does not begin with 'model.'",)),
        (_with("model.model.norm.weight", torch.full((32,), 0.5).double()), ("model.norm.weight is another",)),
        (_with("model.model.norm.weight", torch.ones(31)), ("model.norm.weight is [31] there, and [32]",)),
        (_with(f"{Q}.sorsa_S", torch.full((3,), torch.nan)), ("q_proj.sorsa_S", "not finite")),
        (_with(f"{Q}.weight", torch.randn(32, 32).double()), ("more than rank 3", "another base")),
        (_merged, ("more than rank 3", "merged before it was saved")),
        (_base_again, ("q_proj is the base's own", "sorsa_init was not called")),
        (
            lambda config, tensors: [tensors.pop(k) for k in list(tensors) if "sorsa_" in k],
            ("is another in this model",),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_named(change: Any, words: tuple[str, ...], tmp_path: Path):
    checkpoint(tmp_path / "theirs")
    config, tensors = tmp_path / "theirs" / "config.json", tmp_path / "theirs" / "model.safetensors"
    said, held = json.loads(config.read_text()), load_file(tensors)
    change(said, held)
    config.write_text(json.dumps(said))
    save_file({name: t.contiguous() for name, t in held.items()}, tensors)
    model = base()
    with refused(model, *words):
        svdpeft.import_sorsa(model, tmp_path / "theirs")


def test_folders_that_are_none(tmp_path: Path):
    model = base()
    with refused(model, "has no config.json"):
        svdpeft.import_sorsa(model, tmp_path)
    checkpoint(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with refused(model, "damaged or cut off"):
        svdpeft.import_sorsa(model, tmp_path / "theirs")
    file.rename(file.with_name("pytorch_model.bin"))
    with refused(model, "lacks model.safetensors", "safe_serialization=True"):
        svdpeft.import_sorsa(model, tmp_path / "theirs")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    theirs = checkpoint(tmp_path / "theirs", dtype=torch.float32)
    model = base(torch.float32)
    model.save_pretrained("tiny")
    small_tokenizer().save_pretrained("tiny")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({name: t.float() for name, t in load_file(file).items()}, file)
    result = CliRunner().invoke(app, ["import", "theirs", "ours", "--base", "tiny", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["sites"] == 4
    ours = copy.deepcopy(model)
    svdpeft.load(ours, "ours")
    torch.testing.assert_close(ours(IDS).logits.double(), theirs(IDS).logits, rtol=1e-3, atol=1e-3)
    result = CliRunner().invoke(app, ["import", "tiny", "again", "--base", "tiny"])
    assert result.exit_code == 2
    assert "svdpeft extract" in " ".join(result.output.split())
