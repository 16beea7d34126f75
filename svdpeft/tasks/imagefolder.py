"""Any data set of pictures, by name or path: torchvision's, one of the hub, or folders of your own."""

from __future__ import annotations

from dataclasses import dataclass

from svdpeft.registry import TASKS
from svdpeft.tasks.images import ImageTask


@TASKS.register("images")
@dataclass(frozen=True)
class Images(ImageTask):
    """Pictures of ``data``: ``"torchvision:CIFAR10"``, ``"hf:user/name"``, or the path of a folder.

    A folder has one folder per class, or ``train/``, ``val/`` and ``test/`` with such folders in them. What is missing
    is taken from what is there, the same way every time: see ``images.choose``. All options are those of
    ``images.ImageTask``.
    """
