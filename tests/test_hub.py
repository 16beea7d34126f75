"""Adapters on the hub: against huggingface_hub's own cache, the network patched out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import perturb
from torch import nn

import svdpeft
from svdpeft import SORSA, CheckpointError, LoRA, attach
from svdpeft.interop.card import card


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Repositories as folders."""
    known: dict[str, Any] = {"calls": []}

    def create(self: Any, repo_id: str, **options: Any) -> None:
        known["calls"].append(("create", repo_id, options, self.token))
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)

    def upload(self: Any, *, repo_id: str, folder_path: Path, commit_message: str, revision: str | None) -> str:
        known["calls"].append(("upload", repo_id, commit_message, revision))
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(repo_id: str, **options: Any) -> str:
        known["calls"].append(("download", repo_id, options))
        if not (tmp_path / "hub" / repo_id).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"nothing of {repo_id} here, and no network")
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return known


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: dict[str, Any]):
    model, x = base(), torch.randn(4, 6)
    adapter = attach(model, SORSA(rank=2), ["0"], train=["2"])
    perturb(adapter)
    url = svdpeft.push_to_hub(adapter, "me/mine", "hf:me/base", {"accuracy": 0.9}, private=True, token="secret")
    assert url == "https://hub/me/mine/commit/1"
    create, upload = hub["calls"]
    assert create == ("create", "me/mine", {"private": True, "exist_ok": True}, "secret")
    assert upload == ("upload", "me/mine", "Upload an adapter of svdpeft", None)
    other = base()
    svdpeft.from_pretrained(other, "me/mine", revision="v1", token="secret")
    assert torch.equal(other(x), model(x))
    assert hub["calls"][-1][2]["revision"] == "v1"
    assert hub["calls"][-1][2]["allow_patterns"][:2] == ["adapter.json", "adapter.safetensors"]


def test_the_card_is_one_that_the_hub_reads_and_its_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = attach(base(), SORSA(rank=2), ["0"], train=["2"])
    perturb(adapter)
    svdpeft.save_pretrained(adapter, tmp_path / "a", "hf:me/base", {"accuracy": 0.912345, "loss": 0.25})
    found = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert found.data.library_name == "svdpeft"
    assert found.data.base_model == "me/base"
    assert found.data.tags == ["svdpeft", "sorsa"]
    assert "| accuracy | 0.9123 |" in found.text
    assert "SORSA(rank=2)" in found.text
    assert f"{adapter.trainable_count:,} trained values" in found.text
    assert "@" in found.text.split("```bibtex")[1]
    program = found.text.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(svdpeft.models, "load", lambda name: type("Loaded", (), {"model": base()})())
    scope: dict[str, Any] = {}
    exec(program, scope)
    x = torch.randn(2, 6)
    assert torch.equal(scope["base"](x), adapter.model(x))


def test_a_card_of_several_methods_cites_each_once():
    model = base()
    adapter = attach(model, None, {"0": SORSA(rank=2), "2": LoRA(rank=1)})
    text = card(adapter)
    assert text.count("@") >= 2
    assert "library_name: svdpeft" in text
    assert "base_model" not in text


def test_what_is_not_there_or_would_be_lost_is_told(hub: dict[str, Any], tmp_path: Path):
    adapter = attach(base(), LoRA(rank=1))
    with pytest.raises(OSError, match="'me/none' is no folder, and the hub does not give it: nothing of me/none"):
        svdpeft.from_pretrained(base(), "me/none")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="a card is not overwritten"):
        svdpeft.save_pretrained(adapter, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == [tmp_path / "b" / "README.md"]
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match="is not an adapter folder"):
        svdpeft.from_pretrained(base(), tmp_path / "c")
