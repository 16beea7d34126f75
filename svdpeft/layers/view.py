"""A kind that shows the weight of another kind in another way: some of its rows, or one matrix per head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from svdpeft.layers.base import CalledKind, Example, LayerKind


class View(CalledKind):
    """Another kind's weight, seen otherwise; the layer is run, and its bias added, as that kind says.

    Args:
        whole: the kind of the layer, or another view of it.
    """

    word: ClassVar[str]  # under which it is written beside the kind that it is a view of

    def __init__(self, whole: LayerKind) -> None:
        self.whole = whole
        self.multiplies = False

    def called(self, module: nn.Module) -> bool:
        return self.whole.called(module)

    def per_example(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Sequence[str] | None:
        return self.whole.per_example(module, tensors)

    def run(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return self._layer.run(module, x, w)

    def add_bias(self, module: nn.Module, out: Tensor) -> Tensor:
        return self._layer.add_bias(module, out)

    def examples(self) -> list[Example]:
        return []  # of the kinds that it is a view of

    def to_json(self) -> dict[str, Any]:
        return {**self.whole.to_json(), self.word: self.fields()}

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What is written under ``word``."""

    @classmethod
    @abstractmethod
    def of(cls, whole: LayerKind, fields: Mapping[str, Any]) -> View:
        """Return the view of a kind that ``fields`` describes."""

    @property
    def _layer(self) -> CalledKind:
        assert isinstance(self.whole, CalledKind), "only a layer that is called has an output to add to"
        return self.whole
