"""Which adapters a model has, and which of them are on: for everybody, or for the calls of one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from svdpeft.adapter.adapter import Adapter, Condition
from svdpeft.adapter.roster import ROSTER
from svdpeft.adapter.routing import must_be, whole_of
from svdpeft.adapter.turns import turns
from svdpeft.registry import near_miss
from svdpeft.sites.scope import within
from svdpeft.targets.wrappers import unwrapped


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by name, in the order in which they came; of a copy of the model, the copy's.

    Args:
        model: what torch.compile and DataParallel put around it is seen through.

    Returns:
        An adapter that is attached to a part of the model goes by the part's name and its own: ``"encoder.default"``.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> a, b = (svdpeft.attach(model, svdpeft.LoRA(rank=1), name=name) for name in "ab")
        >>> list(svdpeft.adapters(model))
        ['a', 'b']
    """
    parts = ((path, vars(part)[ROSTER]) for path, part in unwrapped(model).named_modules() if ROSTER in vars(part))
    return {f"{path}.{name}".lstrip("."): a for path, roster in parts for name, a in roster.adapters.items()}


def only(model: nn.Module, *names: str) -> Only:
    """Turn the named adapters on and all others of the model off: at once, and where it opens a block, until its end.

    For all threads; ``using`` is for the calls of one.

    Args:
        model: as for ``adapters``.
        names: as ``adapters`` gives them; none at all is the base.

    Raises:
        ValueError: a name that no adapter has. Nothing is switched then.
        RuntimeError: an adapter is in a ``per_example`` block.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> a, b = (svdpeft.attach(model, svdpeft.LoRA(rank=1), name=name) for name in "ab")
        >>> with svdpeft.only(model, "b"):
        ...     a.state, b.state
        ('disabled', 'attached')
        >>> a.state
        'attached'
    """
    with turns(unwrapped(model)).change("only()"):
        return _only(_known(model, names), names)


@contextmanager
def using(model: nn.Module, *names: str) -> Iterator[None]:
    """Within the block the calls of this thread or task have the named adapters and no others; the model is left alone.

    So the threads of a server each have adapters of their own, on one model. What a thread starts within the block does
    not take part in it, unless it runs in a copy of its context (``asyncio.to_thread``, ``contextvars.copy_context``).

    Args:
        model: as for ``adapters``.
        names: as ``adapters`` gives them, of such as are on or disabled; none at all is the base.

    Raises:
        ValueError: a name that no adapter has; an adapter that has changed parameters or statistics whole, which are
            one for all threads.
        RuntimeError: an adapter is merged or folded, which it is for all threads.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> a, b = (svdpeft.attach(model, svdpeft.LoRA(rank=1), name=name) for name in "ab")
        >>> with svdpeft.using(model, "b"):
        ...     a.state, b.state
        ('disabled', 'attached')
    """
    with ExitStack() as stack:
        stack.enter_context(turns(whole := unwrapped(model)).block("using", firm=True))
        for part in {adapter.model for adapter in adapters(model).values()} - {whole}:
            stack.enter_context(turns(part).block("using", firm=True))
        known, here = _known(model, names), dict[Any, Any]()
        for name, adapter in known.items():
            on = name in names
            must_be(adapter, "attached", "disabled")
            if (on or adapter.state == "attached") and (one := whole_of(adapter)) is not None:
                raise ValueError(
                    f"adapter {adapter.name!r} has changed {one}, which is one for all threads: using() needs adapters "
                    "without train= and with batch_norm='frozen'"
                )
            here |= {adapter: "attached" if on else "disabled", **dict.fromkeys(adapter.sites.values(), on)}
        with within(here):
            yield


def _known(model: nn.Module, names: tuple[str, ...]) -> dict[str, Adapter]:
    known = adapters(model)
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter of this model is called {name!r}: {near_miss(name, known)}")
    return known


def _only(known: dict[str, Adapter], names: tuple[str, ...]) -> Only:
    switched = Only({adapter: adapter.state for adapter in known.values()})
    for adapter in known.values():
        adapter._must_be("attached", "merged", "folded", "disabled")
    for name, adapter in known.items():
        if name not in names and adapter.state != "disabled":
            adapter.disable()
    for name in names:
        known[name].enable()
    return switched


class Only:
    """What ``only`` has done, and the way back where it opens a block.

    Args:
        before: the states of all adapters of the model.
    """

    def __init__(self, before: dict[Adapter, Condition]) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before:
            with turns(next(iter(self._before)).model).change("the end of an only() block"):
                self._back()

    def _back(self) -> None:
        there: list[tuple[Adapter, Condition]]
        there = [(adapter, state) for adapter, state in self._before.items() if adapter.state != "detached"]
        failed = []
        for adapter, state in sorted(there, key=lambda each: each[1] != "disabled"):  # first those that go off
            try:
                if state == "disabled" and adapter.state != "disabled":
                    adapter.disable()
                elif state != "disabled":
                    adapter.enable()
                    if adapter.state != state:
                        adapter._to("attached")
                        adapter._to(state)
            except Exception as problem:  # the others are given back all the same
                failed.append(problem)
        if failed:
            raise failed[0]
