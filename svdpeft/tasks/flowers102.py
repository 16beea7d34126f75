"""Oxford Flowers-102: photographs of 102 flowers, 10 of each for training, 10 for validation, 6,149 for the test.

Source: Nilsback, Zisserman, "Automated flower classification over a large number of classes", ICVGIP 2008.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from svdpeft.registry import TASKS
from svdpeft.tasks.images import ImageTask


@TASKS.register("flowers102")
@dataclass(frozen=True)
class Flowers102(ImageTask):
    """Flowers-102: all 1,020 training pictures, 2 of each class for validation, the 6,149 test pictures.

    Validation pictures are of the published validation split. Files: torchvision's layout, ``flowers-102/`` below
    ``root``. All options are those of ``images.ImageTask``.
    """

    data: str = field(default="torchvision:Flowers102", kw_only=True)
