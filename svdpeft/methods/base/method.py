"""Anything that fine-tunes: a frozen dataclass of hyper-parameters, and what documentation says of it."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from svdpeft.methods.base.docstrings import inherit_args
from svdpeft.methods.base.hyperparameters import plain
from svdpeft.methods.base.reference import Reference


@dataclass(frozen=True)
class Method(ABC):
    """Abstract: a fine-tuning method; its class attributes are what a comparison and the documentation say of it.

    A method is a frozen dataclass of hyper-parameters, registered under a name by ``METHODS.register``.

    Example:
        >>> method = svdpeft.LoRA(rank=4)
        >>> method.to_json()["name"], svdpeft.method("lora")(rank=4) == method, str(method)
        ('lora', True, 'LoRA(rank=4)')
    """

    name: ClassVar[str]
    reference: ClassVar[Reference | None] = None
    latex: ClassVar[str] = ""  # the formula, for the documentation
    example: ClassVar[str] = ""  # a program for the documentation, where the usual one does not do
    # Where a comparison begins to search, by what the model sees: {"vision": 1e-2, "language": 1e-3}. A paper's, or of
    # the method's family; what was searched for one model is in compare/defaults.toml.
    learning_rates: ClassVar[Mapping[str, float]] = {}
    factored: ClassVar[bool] = True  # False: no factors, trains parameters of the base itself

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherit_args(cls)

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        """Patterns of the base's own parameters that this method trains whole."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return ``{"name": …, hyper-parameters}``; ``method(name)(**rest)`` builds it again."""
        return {"name": self.name, **{f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name == "rank"
        ]
        return f"{type(self).__name__}({', '.join(changed)})"
