"""Reading and writing a base weight: the one place where a parameter of the base changes.

A weight is its original plus what adapters have written into it. The original is kept while anything is written, and
is copied back when nothing is: it is never reached by subtracting, so every bit returns. A quantised one is only read:
its values are the dequantised ones, and nothing is written before a plain weight has taken its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdpeft.decomposition import all_finite, digest, has_digest
from svdpeft.layers.base import LayerKind
from svdpeft.layers.quantised import Form, form_of, noted, scheme
from svdpeft.sites.shards import gathered, shape_of, sharded


def stored(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer itself; as an attribute an adapted weight is read with its update added."""
    tensor = owner._parameters.get(name)
    tensor = owner._buffers[name] if tensor is None else tensor
    assert tensor is not None
    return tensor


CHUNK = 1 << 18  # values at once, which stay in a processor's cache through the dozen operations on them


class RoundedSum:
    """W' = round(W0 + ΔW), of a weight whole or part by part, and the share of ΔW that rounding has lost.

    Args:
        dtype: of W'.
        rounding: of the sum to a coarser dtype than its own; ``None``: to the nearest.

    Example:
        >>> sums = RoundedSum(torch.bfloat16)
        >>> sums.of(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2**-30]))
        tensor([1.5000, 2.0000], dtype=torch.bfloat16)
        >>> sums.lost < 1e-8
        True
    """

    def __init__(self, dtype: torch.dtype, rounding: Callable[[Tensor], Tensor] | None = None) -> None:
        self.dtype = dtype
        self._rounding = rounding
        self._added: list[Tensor] = []  # norms of all parts, and of what they have lost
        self._lost: list[Tensor] = []

    @torch.no_grad()
    def of(self, w: Tensor, added: Tensor, out: Tensor | None = None) -> Tensor:
        """Return W' of a part.

        Args:
            w: W0.
            added: ΔW, in at least float32, of the same shape; the sum is formed in its dtype.
            out: where W' is written, contiguous and no part of ``w``; ``None``: a new tensor.
        """
        out = torch.empty(w.shape, dtype=self.dtype, device=w.device) if out is None else out
        step = CHUNK if w.device.type == "cpu" else max(w.numel(), 1)
        buffers = [added.new_empty(min(step, w.numel())) for _ in range(2)]  # new memory costs more than the arithmetic
        parts = (flat.split(step) for flat in (out.view(-1), w.reshape(-1), added.reshape(-1)))
        for into, start, more in zip(*parts, strict=True):
            before = start.to(more.dtype)
            came, off = (buffer[: len(more)] for buffer in buffers)
            if self.dtype == more.dtype:
                # What of ΔW has come into the sum, and what has not (Knuth, TAOCP 2, 4.2.2)
                torch.add(before, more, out=into)
                torch.sub(into, before, out=came)
                torch.sub(into, came, out=off)
                torch.sub(before, off, out=off).add_(torch.sub(more, came, out=came))
            else:  # not against the sum, which may have lost a small ΔW whole; coarse numbers have an exact difference
                exact = torch.add(before, more, out=came)
                into.copy_(exact if self._rounding is None else self._rounding(exact))
                torch.sub(into.to(more.dtype), before, out=off).sub_(more)
            self._added.append(_norm(more))
            self._lost.append(_norm(off))
        return out

    @property
    def lost(self) -> float:
        """‖W' − (W0 + ΔW)‖_F / ‖ΔW‖_F of all parts together; 0 for an update of zeros, not finite where W' is not."""
        added, lost = (torch.linalg.vector_norm(torch.stack(norms)) for norms in (self._added, self._lost))
        return float(lost / added if added > 0 else 0 * lost)


def _norm(x: Tensor) -> Tensor:
    """‖x‖ in float64; computed in it, which takes three times as long, only where squares overflow."""
    norm = torch.linalg.vector_norm(x)
    return norm.double() if norm.isfinite() else torch.linalg.vector_norm(x, dtype=torch.float64)


SAMPLE = 32  # values of a weight


def sample(w: Tensor) -> list[float]:
    """Some values of a weight, by which the same weight in another precision is known; its hash is another one."""
    flat = w.detach().reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).round().long()
    return flat[at.to(flat.device)].double().tolist()


class Identity(NamedTuple):
    """What a weight is known by: its hash, of a quantised one that of its integers, and values by which the same weight
    in another precision is known."""

    hash: str
    sample: list[float]


class BaseWeight:
    """One parameter of the base model, and what is written into it at present.

    Args:
        owner: module that holds the parameter.
        parameter: its name there.
    """

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        self.owner = owner
        self.parameter = parameter
        self.size = self._size()  # when it was first adapted
        self.quantised: Form | None = None  # what a plain weight stands in the place of
        self._original: Tensor | None = None
        self._identities: dict[str, tuple[tuple[Any, ...], Identity]] = {}
        self._written: dict[Hashable, Callable[[], Tensor]] = {}  # by the site that has written it

    @property
    def stored(self) -> Tensor:
        """The parameter itself."""
        return stored(self.owner, self.parameter)

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now, detached (shares memory)."""
        return self.stored.detach()

    @property
    def scheme(self) -> str | None:
        """By what scheme it is quantised now; ``None``: it is not."""
        return scheme(self.owner, self.parameter)

    @property
    def original(self) -> Tensor:
        """The base's own value, dequantised, whatever is written at present."""
        tensor = self.stored
        if self._original is None and self.quantised is None and type(tensor) is nn.Parameter and not noted(tensor):
            return self.tensor  # what a compiler can trace
        return self._form.values().detach()

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's own value; of a sharded one nothing is gathered for it."""
        return self.stored.dtype if self.quantised is None and self.scheme is None else self.original.dtype

    def check_size(self) -> None:
        """Refuse a weight that somebody has resized since: factors are of the size that it had.

        Raises:
            RuntimeError: it is of another size now.
        """
        if (now := self._size()) != self.size:
            raise RuntimeError(
                f"its weight was {list(self.size)} when it was adapted and is {list(now)} now: resize a model (its "
                "embeddings, say) before an adapter is attached or loaded"
            )

    def check_whole(self) -> None:
        """Refuse to write into a shard.

        Raises:
            ValueError: the weight is sharded over processes.
        """
        if sharded(self.stored):
            raise ValueError(
                "its weight is sharded over processes: save() the adapter, and load it to a model that is whole"
            )

    def write(self, key: Hashable, part: Callable[[], Tensor]) -> float:
        """Add ``part()``, in the stored layout, to the weight.

        The sum is formed in at least float32 and rounded once.

        Returns:
            The share of the part that rounding lost, ‖W_stored − W_exact‖_F / ‖part‖_F; 0 for a part of zeros.

        Raises:
            ValueError: the sum is not finite, or not in the weight's dtype; the weight is quantised. Nothing is
                written then.
        """
        if (how := self.scheme) is not None:
            raise ValueError(
                f"its weight is quantised ({how}), and rounding W0 + ΔW to that again would be another model: "
                "merge(dtype=torch.bfloat16) dequantises the model first"
            )
        w, before = self.tensor, self._exact() if self._written else self.original
        added = part().to(torch.promote_types(before.dtype, torch.float32))
        if self._original is None and self.quantised is None:
            before = self._original = w.clone()
        self._written[key] = part  # before the first value changes: whoever is interrupted erases it
        sums = RoundedSum(w.dtype)
        rounded = sums.of(before, added, w if w.is_contiguous() else None)
        lost = sums.lost
        if not math.isfinite(lost) and not all_finite(rounded):
            self.erase(key)
            why = f"it overflows {w.dtype}" if all_finite(before + added) else "the training has diverged"
            raise ValueError(f"the weight with its update would not be finite: {why}")
        if rounded is not w:
            w.copy_(rounded)
        return lost

    def erase(self, key: Hashable) -> None:
        """Take back what was written under ``key``; the last one to go restores every bit."""
        rest = {other: part for other, part in self._written.items() if other != key}
        self.tensor.copy_(self._exact(rest) if rest else self.original)
        self._written = rest  # after the copy: if that is interrupted, erasing again completes it
        if not rest:
            self._original = None

    def keep(self, key: Hashable) -> None:
        """Make what was written under ``key`` part of the original; what others have written stays theirs."""
        part = self._written.pop(key)
        if self._written:
            exact = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
            self._original = (exact + part().to(exact.dtype)).to(self.stored.dtype)
            self.tensor.copy_(self._exact())
        else:
            self._original = None
        self.quantised = None

    def identity(self, free: Sequence[LayerKind] = ()) -> Identity:
        """What the base is known by, found once for a value: saving twice does not read the base twice.

        Args:
            free: parts of it that do not matter, since an adapter has values of its own for them.
        """
        parts = str([kind.to_json() for kind in free])
        if sharded(self.stored):  # as it was before: nothing can be written into it, and no weight is gathered for it
            if parts not in self._identities:
                whole = gathered(self.stored).detach()
                self._identities[parts] = (), self._identify(whole, whole, free)
            return self._identities[parts][1]
        form = self._form
        w, raw = form.values().detach(), form.tensor
        version = None if raw.is_inference() else raw._version  # which .data does not raise
        values = sample(w)
        seen = (raw.data_ptr(), version, tuple(values))
        if parts not in self._identities or self._identities[parts][0] != seen:
            codes = form.codes().detach()
            known = self._identify(w, codes, free) if free else Identity(digest(codes), values)
            self._identities[parts] = seen, known
        return self._identities[parts][1]

    def known_by(self, known: str, free: Sequence[LayerKind] = ()) -> bool:
        """Whether the base is the one of this hash.

        Args:
            known: of a file, which an earlier revision may have written.
            free: as for ``identity``.
        """
        if known == self.identity(free).hash:
            return True
        form = self._form
        w, codes = form.values().detach(), form.codes().detach()
        return not sharded(self.stored) and has_digest(self._without(free, w, codes)[1], known)

    def _identify(self, w: Tensor, codes: Tensor, free: Sequence[LayerKind]) -> Identity:
        w, codes = self._without(free, w, codes)
        return Identity(digest(codes), sample(w))

    def _without(self, free: Sequence[LayerKind], w: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        for kind in free:
            chosen = kind.from_matrix(self.owner, torch.ones_like(kind.to_matrix(self.owner, w))).bool()
            w, codes = (each.masked_fill(chosen, 0) for each in (w, codes))  # not subtracted: it may be no number
        return w, codes

    @property
    def overwritten(self) -> bool:
        """Whether anything is written at present."""
        return bool(self._written)

    def written(self, key: Hashable) -> bool:
        """Whether something is written under ``key``."""
        return key in self._written

    @property
    def _form(self) -> Form:
        """How the base's own value is stored."""
        if self.quantised is not None:
            return self.quantised
        form = form_of(self.owner, self.parameter)._replace(tensor=self.stored)  # which may be read from a file
        if self._original is None:
            return form
        self._original = self._original.to(form.tensor.device)  # the model may have moved since
        return form._replace(tensor=self._original)

    def _size(self) -> tuple[int, ...]:
        form = form_of(self.owner, self.parameter)
        return shape_of(self.stored) if form.scheme is None else tuple(form.shape)

    def _exact(self, written: Mapping[Hashable, Callable[[], Tensor]] | None = None) -> Tensor:
        total = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
        for part in (self._written if written is None else written).values():
            total = total + part().to(total.dtype)
        return total


@dataclass(frozen=True)
class MergeReport:
    """What rounding took: per site the share ‖W_stored − W_exact‖_F / ‖ΔW‖_F of the update that was lost."""

    lost: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest share over all sites."""
        return max(self.lost.values(), default=0.0)

    def __str__(self) -> str:
        if not self.lost:
            return "merged 0 sites"
        where = max(self.lost, key=lambda name: self.lost[name])
        mean = sum(self.lost.values()) / len(self.lost)
        return (
            f"merged {len(self.lost)} sites; rounding to the weights' dtype lost {mean:.2%} of the update on average, "
            f"at most {self.worst:.2%} at {where}"
        )
