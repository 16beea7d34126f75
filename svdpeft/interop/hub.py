"""Adapters on the hub, with a model card, by huggingface_hub; ``HF_TOKEN`` and offline mode are its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.file import FOLDER, HEADER, TENSORS
from svdpeft.adapter.loading import load
from svdpeft.atomic import replacing
from svdpeft.interop.card import CARD, card


def save_pretrained(
    adapter: Adapter,
    path: str | os.PathLike[str],
    base: str | None = None,
    metrics: Mapping[str, float] | None = None,
    place: str | None = None,
) -> None:
    """Write an adapter with a model card beside it.

    Args:
        adapter: in any state.
        path: of the folder.
        base: name of the model that it is for, as ``svdpeft.models.load`` takes it; for the card.
        metrics: by name; for the card.
        place: where the folder will lie, for the card; ``path`` unless said.

    Raises:
        FileExistsError: the folder holds files of these names that svdpeft has not written, or a card already.

    Example:
        >>> adapter = svdpeft.attach(nn.Linear(4, 3), svdpeft.PiSSA(rank=1))
        >>> save_pretrained(adapter, getfixture("tmp_path") / "a", base="hf:me/base")
        >>> from_pretrained(nn.Linear(4, 3), getfixture("tmp_path") / "a", check_base=False).sites.keys()
        dict_keys([''])
    """
    path = Path(path)
    if (path / CARD).exists():
        raise FileExistsError(f"{path / CARD} exists: a card is not overwritten; adapter.save() writes none")
    text = card(adapter, base, str(path) if place is None else place, metrics)
    adapter.save(path)
    with replacing(path / CARD) as new:
        new.write_text(text)


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    base: str | None = None,
    metrics: Mapping[str, float] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload an adapter of svdpeft",
) -> str:
    """Upload an adapter and its card into a repository, which is made where it is missing.

    Args:
        adapter: in any state.
        repo_id: ``"user/name"``.
        base: name of the model that it is for.
        metrics: by name; for the card.
        private: of a new repository; ``None`` is the owner's default.
        token: of the hub; ``None`` is the one that is stored, or ``HF_TOKEN``.
        revision: branch; ``None`` is the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(adapter, Path(folder) / "adapter", base, metrics, repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder) / "adapter", commit_message=message, revision=revision
        )
    return str(getattr(done, "commit_url", done))


def from_pretrained(
    model: nn.Module,
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    **options: Any,
) -> Adapter:
    """Load an adapter from the hub, or from a folder.

    Args:
        model: the base.
        name: a folder, or ``"user/name"`` on the hub.
        revision: branch, tag or commit there.
        token: of the hub.
        cache_dir: where it keeps files.
        **options: of ``svdpeft.load``.

    Raises:
        CheckpointError: as ``svdpeft.load`` does.
        OSError: neither such a folder nor such a repository.
    """
    name = os.fspath(name)
    if Path(name).exists():
        return load(model, name, **options)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [HEADER, TENSORS, f"{FOLDER}/{HEADER}", f"{FOLDER}/{TENSORS}"]
    try:
        folder = snapshot_download(name, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(f"{name!r} is no folder, and the hub does not give it: {error}") from error
    return load(model, folder, **options)
