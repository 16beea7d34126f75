"""NWPU-RESISC45: 256x256 aerial photographs of 45 kinds of scenes, 700 of each.

Source: Cheng, Han, Lu, "Remote sensing image scene classification: benchmark and state of the art", Proc. IEEE 2017,
arXiv:1703.00121. It was published without splits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from svdpeft.registry import TASKS
from svdpeft.tasks.images import ImageTask


@TASKS.register("resisc45")
@dataclass(frozen=True)
class Resisc45(ImageTask):
    """RESISC45 with few examples: 10 of each class for training, 2 for validation, 6,300 for the test.

    The splits are those of ``timm/resisc45`` on the hub: 18,900, 6,300 and 6,300 pictures. A folder of the pictures as
    they were published, ``data="NWPU-RESISC45", root=...``, is split here: 140 of each class for the test, so that
    numbers from the two differ by the choice of the test pictures. All options are those of ``images.ImageTask``.
    """

    data: str = field(default="hf:timm/resisc45", kw_only=True)
