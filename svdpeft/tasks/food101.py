"""Food-101: photographs of 101 dishes, 750 of each for training and 250 for the test.

Source: Bossard, Guillaumin, Van Gool, "Food-101 - Mining discriminative components with random forests", ECCV 2014.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from svdpeft.registry import TASKS
from svdpeft.tasks.images import ImageTask


@TASKS.register("food101")
@dataclass(frozen=True)
class Food101(ImageTask):
    """Food-101 with few examples: 10 of each class for training, 2 for validation, the 25,250 test pictures.

    Files: torchvision's layout, ``food-101/`` below ``root``. ``data="hf:ethz/food101"`` on the hub calls the same
    test pictures its validation split. All options are those of ``images.ImageTask``.
    """

    data: str = field(default="torchvision:Food101", kw_only=True)
