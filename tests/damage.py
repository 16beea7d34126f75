"""Adapter folders with something wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdpeft.adapter.file import HEADER, TENSORS


def header_of(path: Path) -> dict[str, Any]:
    """The header that is read: of the tensors' file."""
    with safe_open(path / TENSORS, "pt") as opened:
        return json.loads(opened.metadata()[HEADER])


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header, by what the change returns or in place, in both files."""
    header = header_of(path)
    changed = change(header)
    put(path, json.dumps(header if changed is None else changed))


def put(path: Path, header: str) -> None:
    """Let both files have a header."""
    save_file(load_file(path / TENSORS), path / TENSORS, metadata={HEADER: header})
    (path / HEADER).write_text(header)


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], header: bool = False) -> None:
    """Change the tensors; without a header in their file, as earlier revisions wrote it, unless it is to stay."""
    tensors = load_file(path / TENSORS)
    metadata = {HEADER: json.dumps(header_of(path))} if header else None
    change(tensors)
    save_file(tensors, path / TENSORS, metadata=metadata)
