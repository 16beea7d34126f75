"""A batch whose rows use different adapters: which sites act on which of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from svdpeft.adapter.roster import adapters_in, rosters
from svdpeft.adapter.splitting import Groups, split
from svdpeft.adapter.turns import turns
from svdpeft.sites.place import PLACES
from svdpeft.sites.rows import Rows, rows_of
from svdpeft.sites.scope import scope, within


@contextmanager
def by_example(
    model: nn.Module, known: Mapping[str, Any], names: Sequence[str | None], flattened: bool
) -> Iterator[None]:
    """What ``Adapter.per_example`` does.

    Args:
        model: whose forward will be called.
        known: its adapters by name.
        names: of an adapter for every row of the batch.
        flattened: layers may see several rows for each example.

    Raises:
        ValueError: a name that no adapter has; parameters or statistics that an adapter has changed whole.
        RuntimeError: an adapter that is merged or folded, one that is named and disabled.
    """
    with ExitStack() as stack:
        stack.enter_context(turns(model).block("per_example", firm=True))
        placed = {place.site for module in model.modules() for place in vars(module).get(PLACES, ())}
        for roster in rosters():  # and those of larger models
            if roster.model is not model and not placed.isdisjoint(roster.sites()):
                stack.enter_context(turns(roster.model).block("per_example", firm=True))
        _enter(stack, model, known, names, flattened)
        yield


def _enter(
    stack: ExitStack, model: nn.Module, known: Mapping[str, Any], names: Sequence[str | None], flattened: bool
) -> None:
    adapters = adapters_in(model)
    rows = rows_of(names, known, flattened)
    for adapter in adapters:
        must_be(adapter, "attached", *(() if adapter.name in rows else ("disabled",)))
    attached = [adapter for adapter in adapters if adapter.state == "attached"]
    for adapter in attached:
        if (one := whole_of(adapter)) is not None:
            raise ValueError(
                f"adapter {adapter.name!r} has changed {one}, which is one for the whole batch: per_example() needs "
                "adapters without train= and with batch_norm='frozen'; disable this one to leave it out"
            )
    taken = {row for its in rows.values() for row in its.index.tolist()}
    base = Rows([row for row in range(len(names)) if row not in taken], len(names), flattened)
    groups = [(its, set(known[name].sites.values())) for name, its in rows.items()]
    stack.enter_context(routed(model, [*groups, *([(base, set())] if len(base.index) else [])]))
    stack.enter_context(within(dict.fromkeys(attached, "in a per_example block")))
    if not rows:  # where no adapter acts, no layer would see that the batch has another number of rows
        count = _Count(len(names), flattened)
        stack.enter_context(within({count: True}))
        stack.callback(model.register_forward_pre_hook(count, with_kwargs=True).remove)


class _Count:
    """Refuse a batch of another number of rows than there are names."""

    def __init__(self, total: int, flattened: bool) -> None:
        self.total, self.flattened = total, flattened

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        # Without kwargs where another thread calls the model while torch registers the hook.
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
        if self not in (scope() or {}) or x is None:  # of another thread's
            return
        if x.shape[0] % self.total if self.flattened else x.shape[0] != self.total:
            raise ValueError(
                f"the model is called with {x.shape[0]} rows, and per_example() was given {self.total} names; where "
                "each example has several rows (the beams or sequences of generate()), say flattened=True"
            )


def whole_of(adapter: Any) -> str | None:
    """A parameter or a statistic that an adapter has changed whole: there is one in the model, for all its callers."""
    return next(iter({**adapter.whole, **adapter.own.changed()}), None)


def must_be(adapter: Any, *states: str) -> None:
    """Refuse what an adapter cannot do in the state that it is in."""
    if adapter.state not in states:
        raise RuntimeError(f"adapter {adapter.name!r} is {adapter.state}; this needs it to be {' or '.join(states)}")


@contextmanager
def routed(model: nn.Module, groups: Groups) -> Iterator[None]:
    """Within the block some sites act on their rows alone, and all other sites of the model on none.

    Args:
        model: whose forward will be called.
        groups: the rows of each adapter, and of the base, with the sites that act on them.

    Raises:
        RuntimeError: an adapter that is merged or folded.
    """
    mine = {site: its for its, sites in groups for site in sites}
    placed = {place.site: None for module in model.modules() for place in vars(module).get(PLACES, ())}
    for site in placed:  # of adapters of a larger model too
        if site.folded or site.weight.written(site):
            raise RuntimeError(f"an adapter is merged or folded at {site.name}: every row would have it")
    silenced = dict.fromkeys((site for site in placed if site.acts and site not in mine), False)
    for its, _ in groups:
        for device in {next(site.factors.parameters()).device for site in mine}:
            its.prepare(device)
    with within({**silenced, **mine}), split(model, groups, list(placed)):
        yield
