"""A batch whose rows use different adapters: which rows of a layer's input belong to one of them.

A row is an index of the first axis. Nothing else is known of a layer's input, so a model that puts another axis first
(time, say) is refused where its size differs from the batch's, and cannot be told from a right one where it is equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from svdpeft.registry import near_miss

BASE = "base"  # a row without an adapter, as ``None`` is


class Rows:
    """The rows of one adapter.

    Args:
        mine: their positions in the batch, ascending.
        total: number of rows of the batch.
        flattened: layers may see several rows per example, those of one example one after the other.
    """

    def __init__(self, mine: Sequence[int], total: int, flattened: bool) -> None:
        self.total, self.flattened, self.everything = total, flattened, len(mine) == total
        self.index = torch.tensor(mine)
        self._known: dict[tuple[torch.device, int], Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Copy the positions to a device before the forward pass, which then has nothing to wait for."""
        self._positions(device, 1)

    def of(self, site: str, x: Tensor, out: Tensor) -> Tensor | None:
        """Return the positions of this adapter's rows in a layer's input and output; ``None``: all of them.

        Raises:
            ValueError: the layer does not see one row per example.
        """
        if out.is_nested:
            raise ValueError(f"{site} gives a nested tensor: per_example() needs one row per example")
        seen = x.shape[0] if x.ndim else 1
        times, rest = divmod(seen, self.total)
        if rest or not times or out.shape[0] != seen or (times > 1 and not self.flattened):
            hint = "its input has no axis for the batch first: leave the layer out of the adapter"
            if times > 1 and not rest:
                hint = (
                    f"if they are {times} of the first example, then {times} of the second, and so on (windows, "
                    "tokens, the beams or sequences of generate()), say flattened=True"
                )
            raise ValueError(f"{site} sees {seen} rows, and per_example() was given {self.total} names: {hint}")
        return None if self.everything else self._positions(out.device, times)

    def refuse_read(self, site: str) -> NoReturn:
        """Say what is wrong with a weight that is read and not called."""
        raise RuntimeError(
            f"the model reads the weight of {site} instead of calling the layer, in a place that was not known when "
            "per_example() began: call the model once before the block. If that does not help it is read further up "
            "than in the layer around it; leave it out of the adapter then"
        )

    def _positions(self, device: torch.device, times: int) -> Tensor:
        if (device, times) in self._known:
            return self._known[device, times]
        found = self.index.to(device)
        if times > 1:
            found = (found[:, None] * times + torch.arange(times, device=device)).flatten()
        if not torch.compiler.is_compiling():
            self._known[device, times] = found
        return found


def rows_of(names: Sequence[str | None], known: Iterable[str], flattened: bool) -> dict[str, Rows]:
    """Return the rows of every adapter that is named, in the order of their first rows.

    Raises:
        ValueError: no names; something that is not a name; a name that no adapter has.
    """
    if isinstance(names, str) or not len(names):
        raise ValueError(f"per_example({names!r}) needs a sequence with the name of an adapter, or None, for every row")
    known = set(known)
    mine: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is None or (name == BASE and BASE not in known):
            continue
        if name not in known:
            meant = near_miss(str(name), {*known, BASE})
            raise ValueError(f"row {row}: no adapter of this model is called {name!r}: {meant}")
        if name == BASE:
            raise ValueError(f"row {row}: an adapter is called {BASE!r} here, so a row of the base alone is None")
        mine.setdefault(name, []).append(row)
    return {name: Rows(rows, len(names), flattened) for name, rows in mine.items()}
