"""Chosen rows of a weight, such as those of new tokens in an embedding: one site, with all who use the weight."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from svdpeft.layers.base import Ranges
from svdpeft.layers.part import Part
from svdpeft.methods.whole import Whole
from svdpeft.patterns import matches
from svdpeft.registry import near_miss
from svdpeft.sites.place import Place
from svdpeft.targets.choice import Choice
from svdpeft.targets.inventory import Weight
from svdpeft.targets.survey import Survey, same_matrix

ROWS = "rows"  # name of the part


def chosen_rows(model: nn.Module, named: Mapping[str, Iterable[int]], whole: Iterable[str]) -> list[Choice]:
    """Return a site for the rows of every weight that is named.

    Args:
        model: any module.
        named: pattern -> numbers of rows, from 0.
        whole: names of the parameters that are trained whole.

    Raises:
        ValueError: a pattern that names no layer, or one that another names; rows that a weight does not have, one
            twice, none; a weight that no method could adapt.
    """
    if not named:
        return []
    survey = Survey.of(model, [], (), whole)
    chosen: dict[int, Choice] = {}
    for pattern, given in named.items():
        where = f"train={{{pattern!r}: …}}"
        rows = _checked(given, where)
        found = [w for w in survey.weights if w.kind is not None and any(matches(pattern, name) for name in w.names)]
        if not found:
            known = {name.rpartition(".")[2] for w in survey.weights if w.kind is not None for name in w.names}
            raise ValueError(f"{where} names no layer with a weight: {near_miss(pattern, known)}")
        mine = {id(weight.tensor) for weight in found}
        if twice := mine & chosen.keys():
            raise ValueError(f"{where}: the rows of {chosen[min(twice)].name} are named twice")
        chosen |= {key: _choice(survey, survey.users[key][0], rows, where) for key in mine}
    return list(chosen.values())


def _checked(given: Iterable[int], where: str) -> list[int]:
    """The numbers in ascending order."""
    rows = []
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(f"{where}: {given!r} is no list of rows")
    for row in given:
        truth = isinstance(row, bool) or "bool" in str(getattr(row, "dtype", ""))
        if truth or isinstance(row, str) or not hasattr(row, "__index__") or row < 0:
            raise ValueError(f"{where}: {row!r} is not the number of a row")
        rows.append(operator.index(row))
    rows.sort()
    if not rows:
        raise ValueError(f"{where} names no row")
    if (twice := next((a for a, b in itertools.pairwise(rows) if a == b), None)) is not None:
        raise ValueError(f"{where} names row {twice} twice")
    return rows


def _choice(survey: Survey, first: Weight, rows: Sequence[int], where: str) -> Choice:
    if id(first.tensor) in survey.trained:
        raise ValueError(f"{where}: {first.name} is trained whole already")
    if (why := survey.why_not_adaptable(first)) is not None:
        raise ValueError(f"{where}: {first.name} cannot be adapted: {why}")
    places = []
    for use in survey.users[id(first.tensor)]:
        if use.kind is None or not same_matrix(use, first):
            raise ValueError(f"{where}: {use.name} has the same weight and sees no such rows in it")
        matrix = use.kind.to_matrix(use.module, use.values)
        if matrix.ndim != 2:
            raise ValueError(f"{where}: the weight of {use.name} is a batch of matrices, whose rows have no numbers")
        if rows[-1] >= (total := matrix.shape[0]):
            raise ValueError(
                f"{where}: {use.name} has {total} rows, and {rows[-1]} is none of them; for new tokens resize it "
                "first: model.resize_token_embeddings(len(tokenizer))"
            )
        places.append(Place(use.module, use.parameter, Part(use.kind, runs(rows), total)))
    return Choice(f"{first.name}[{ROWS}]", places, Whole(), ROWS, first.roles)


def runs(rows: Sequence[int]) -> Ranges:
    """Ascending numbers as (start, stop, 1) ranges.

    Example:
        >>> runs([2, 3, 4, 9])
        ((2, 5, 1), (9, 10, 1))
    """
    found: list[tuple[int, int, int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1, 1)
        else:
            found.append((row, row + 1, 1))
    return tuple(found)
