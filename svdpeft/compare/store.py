"""One run, one JSON file: what makes a comparison resumable and its numbers traceable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import svdpeft


class Store:
    """The runs of one comparison, in the folder ``runs`` of its output folder.

    Args:
        folder: of the comparison; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def path(self, label: str, identity: dict[str, Any]) -> Path:
        """Return where the run with this identity lies; anything that changes its result changes the name."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:10]
        readable = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        return self.folder / "runs" / f"{readable}-seed{identity['seed']}-{digest}.json"

    def done(self, path: Path) -> bool:
        """Whether the run is there and did not fail; a failed one is tried again."""
        return path.exists() and "error" not in self.load(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Read one run."""
        return json.loads(path.read_text())

    def write(self, path: Path, record: dict[str, Any]) -> None:
        """Write one run, whole or not at all."""
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1, default=str)
            file.write("\n")
        os.replace(temporary, path)

    def read(self) -> list[dict[str, Any]]:
        """Return every run, in the order of their names."""
        return [self.load(path) for path in sorted((self.folder / "runs").glob("*.json"))]


def provenance() -> dict[str, Any]:
    """Return what a reader needs to run it again: revision, versions, machine."""
    packages = ("torchvision", "transformers", "timm", "accelerate", "safetensors", "numpy")
    return {
        "svdpeft": svdpeft.__version__,
        "git": _git(),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{name: version(name) for name in packages}},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def _git() -> dict[str, Any] | None:
    """Revision and dirty flag of the source tree; ``None`` where svdpeft is installed from a wheel."""
    root = Path(svdpeft.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root)]
        revision = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "dirty": bool(status.strip())}
