"""CIFAR-100: 32x32 photographs of 100 things, 500 of each for training and 100 for the test.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", University of Toronto 2009.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from svdpeft.registry import TASKS
from svdpeft.tasks.images import ImageTask


@TASKS.register("cifar100")
@dataclass(frozen=True)
class Cifar100(ImageTask):
    """CIFAR-100 with few examples: 10 of each class for training, 2 for validation, the 10,000 test pictures.

    Files: torchvision's layout, ``cifar-100-python/`` below ``root``. On the hub, with both kinds of labels:
    ``data="hf:uoft-cs/cifar100", label="fine_label"``. All options are those of ``images.ImageTask``.
    """

    data: str = field(default="torchvision:CIFAR100", kw_only=True)
