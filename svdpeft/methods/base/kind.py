"""What a method may ask of a layer kind: methods and kinds are written without knowing each other."""

from __future__ import annotations

from typing import Protocol


class Kind(Protocol):
    """A layer kind (``layers.base.LayerKind``), as far as it decides whether a method is defined on it."""

    @property
    def name(self) -> str:
        """In the registry."""
        ...

    @property
    def linear(self) -> bool:
        """Whether it multiplies the last axis of its input."""
        ...

    @property
    def sees(self) -> bool:
        """Whether it is called with vectors that its matrices multiply, which a calibration can look at."""
        ...

    @property
    def heads(self) -> int:
        """Heads of an attention, where it shows a matrix for each; else 0."""
        ...
