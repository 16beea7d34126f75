"""svdpeft: SVD-based parameter-efficient fine-tuning on any architecture.

The public names are here; method classes (``svdpeft.SORSA``, …) come from the registry. Everything is imported when it
is first asked for: what completes a word in a shell, or prints a help, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svdpeft.registry import METHODS

if TYPE_CHECKING:  # what editors and type checkers see
    from svdpeft import methods
    from svdpeft.adapter.adapter import Adapter
    from svdpeft.adapter.attach import attach
    from svdpeft.adapter.choosing import adapters, only, using
    from svdpeft.adapter.combining import combine
    from svdpeft.adapter.file import CheckpointError
    from svdpeft.adapter.loading import load
    from svdpeft.adapter.quantising import QuantizeReport, quantize
    from svdpeft.calibration.calibrate import calibrate
    from svdpeft.calibration.calibration import Calibration
    from svdpeft.decomposition import svd_cache
    from svdpeft.methods.base import Method
    from svdpeft.methods.base.allocation import Budget
    from svdpeft.methods.base.schedules import Adaptive, Schedule
    from svdpeft.sites.weights import MergeReport

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Adaptive",
    "Budget",
    "Calibration",
    "CheckpointError",
    "MergeReport",
    "Method",
    "QuantizeReport",
    "Schedule",
    "adapters",
    "attach",
    "calibrate",
    "cite",
    "combine",
    "load",
    "method",
    "methods",
    "only",
    "quantize",
    "svd_cache",
    "using",
]

_LATE = {
    "Adapter": "svdpeft.adapter.adapter",
    "AdapterCallback": "svdpeft.training.callback",
    "Adaptive": "svdpeft.methods.base.schedules",
    "Budget": "svdpeft.methods.base.allocation",
    "Calibration": "svdpeft.calibration.calibration",
    "CheckpointError": "svdpeft.adapter.file",
    "Diverged": "svdpeft.training.divergence",
    "LoRAPro": "svdpeft.adapter.gradients",
    "MergeReport": "svdpeft.sites.weights",
    "Method": "svdpeft.methods.base",
    "QuantizeReport": "svdpeft.adapter.quantising",
    "Riemannian": "svdpeft.adapter.gradients",
    "Schedule": "svdpeft.methods.base.schedules",
    "Trainer": "svdpeft.training.trainer",
    "adapters": "svdpeft.adapter.choosing",
    "attach": "svdpeft.adapter.attach",
    "calibrate": "svdpeft.calibration.calibrate",
    "combine": "svdpeft.adapter.combining",
    "export_gguf": "svdpeft.interop.gguf",
    "export_lora": "svdpeft.interop.peft_export",
    "from_pretrained": "svdpeft.interop.hub",
    "import_peft": "svdpeft.interop.peft_import",
    "import_sorsa": "svdpeft.interop.sorsa_import",
    "last_checkpoint": "svdpeft.training.checkpoints",
    "load": "svdpeft.adapter.loading",
    "only": "svdpeft.adapter.choosing",
    "push_to_hub": "svdpeft.interop.hub",
    "quantize": "svdpeft.adapter.quantising",
    "save_pretrained": "svdpeft.interop.hub",
    "svd_cache": "svdpeft.decomposition",
    "using": "svdpeft.adapter.choosing",
}
_PACKAGES = (
    *("adapter", "analysis", "calibration", "decomposition", "folders", "interop", "layers", "methods", "models"),
    *("patterns", "sites", "targets", "tasks", "training", "zoo"),
)


def method(name: str) -> type[Method]:
    """Return a method's class by its registry name.

    Raises:
        ValueError: no method has that name; the message names the nearest.

    Example:
        >>> print(method("svft")(pattern="banded", off_diagonals=4))
        SVFT(rank=None, pattern='banded', off_diagonals=4)
    """
    return METHODS[name]


def cite(*names: str) -> str:
    """Return the BibTeX entries of methods, without repetition.

    Example:
        >>> print(cite("pissa").splitlines()[0])
        @inproceedings{meng2024pissa,
    """
    references = (METHODS[name].reference for name in names)
    return "\n\n".join(dict.fromkeys(r.bibtex() for r in references if r is not None))


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"svdpeft.{name}")
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    for cls in METHODS.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'svdpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE, *_PACKAGES, *(cls.__name__ for cls in METHODS.values())})
