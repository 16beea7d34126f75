"""What a training is asked for, and how that is read from a file and from flags."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdpeft.finetuning.session import Setup
from svdpeft.finetuning.words import check_preserve, modality_of, parse, read_values
from svdpeft.methods.base import Method
from svdpeft.registry import METHODS, TASKS, near_miss
from svdpeft.tasks.base import whole
from svdpeft.training.recipe import Recipe

SETUP = ("image_size", "dtype", "seed", "head_lr", "quantize", "preserve")  # fields that go by their own names
PATTERNS = {"targets": "targets", "exclude": "exclude", "train": "whole"}
RECIPE = tuple(name for name in Recipe.__dataclass_fields__ if name != "lr")
ORDER = ("eval_every", "save_every", "tracker")
TEXTS = {"model", "data", "task", "method", "preserve", "svd_cache", "out"}
OPTIONS = {*TEXTS, "option", "lr", "length", *PATTERNS, *SETUP, *RECIPE, *ORDER}


@dataclass(frozen=True)
class Order:
    """What ``train`` is asked for.

    Args:
        setup: model, data and seed.
        method: what adapts it.
        recipe: how it trains.
        out: folder of the adapter, its record and its checkpoints.
        eval_every: steps after which the validation loss is measured; 0: never.
        save_every: steps after which a checkpoint is written; 0: never.
        keep: checkpoints that stay; older ones are deleted.
        svd_cache: folder in which decompositions are kept from training to training.
        tracker: that the trainer tells its logs.
        command: as it was typed, for the record.
    """

    setup: Setup
    method: Method
    recipe: Recipe
    out: Path
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    svd_cache: Path | None = None
    tracker: str = "none"
    command: Sequence[str] = field(default_factory=lambda: (Path(sys.argv[0]).name, *sys.argv[1:]))

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every"):
            if not whole(value := getattr(self, name)) or value < 0:
                raise ValueError(f"{name} {value!r} is no whole number of steps; 0 is never")

    def settings(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        setup = {**asdict(self.setup), "task": {"name": self.setup.task.name, **asdict(self.setup.task)}}
        return json.loads(
            json.dumps({**setup, "method": self.method.to_json(), "recipe": asdict(self.recipe)}, default=str)
        )


def read_order(file: Path | None, flags: Mapping[str, Any]) -> Order:
    """Read what is asked for: the flags, and what they leave open from a TOML file with the same names.

    Args:
        file: TOML; ``option`` is a table there.
        flags: by name, underscores for dashes; ``option`` a list of ``key=value``.

    Raises:
        ValueError: an option that does not exist, with the near miss; no model, method or data.

    Example:
        >>> order = read_order(None, {"model": "smollm2-135m", "task": "wordproblems", "method": "pissa:rank=4"})
        >>> str(order.method), order.recipe.lr, order.setup.task.name
        ('PiSSA(rank=4)', 0.0002, 'wordproblems')
    """
    given = parse(file.read_bytes(), str(file)) if file else {}
    if unknown := [name for name in given if name not in OPTIONS]:
        raise ValueError(f"{file}: a training has no option {unknown[0]!r}: {near_miss(unknown[0], OPTIONS)}")
    given = {**given, **flags, "option": _options(given) | _options(flags)}
    for name in TEXTS & given.keys():
        if not isinstance(given[name], str | Path):
            raise ValueError(f"{name} = {given[name]!r} is no text")
    if missing := [name for name in ("model", "method") if name not in given]:
        raise ValueError(f"a training needs a {missing[0]}: --{missing[0]}")
    method = read_method(given["method"])
    task = _task(given)
    rate = given.get("lr", method.learning_rates.get(TASKS[given["task"]].modality))
    if rate is None:
        raise ValueError(f"the method {given['method']!r} says no learning rate for {task.modality} models: give --lr")
    known = {each: given[each] for each in SETUP if each in given}
    patterns = {ours: _patterns(each, given[each]) for each, ours in PATTERNS.items() if each in given}
    check_preserve(known.get("preserve"), [method])
    setup = Setup(given["model"], task, **patterns, **known)
    recipe = Recipe(rate, **{each: given[each] for each in RECIPE if each in given})
    more = {each: given[each] for each in ORDER if each in given}
    cache = Path(given["svd_cache"]) if "svd_cache" in given else None
    return Order(setup, method, recipe, Path(given.get("out", "runs/train")), svd_cache=cache, **more)


def _task(given: dict[str, Any]) -> Any:
    """The task: the one that is named, else the one for data of one's own; its name is put into ``given``."""
    if "task" not in given:
        if "data" not in given:
            raise ValueError("a training needs --data of your own, or a --task")
        given["task"] = "images" if modality_of(given["model"], None) == "vision" else "text"
    usual = {"shots": "all"} if given["task"] == "images" else {}
    named = {option: given[name] for name, option in (("data", "data"), ("length", "max_length")) if name in given}
    return TASKS.make(given["task"], {**usual, **named, **given["option"]})


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the task: a table in a file, words on the command line."""
    options = given.get("option", {})
    if not isinstance(options, Mapping | list):
        raise ValueError(f"option = {options!r} is no table of names and values")
    return dict(options) if isinstance(options, Mapping) else read_values(options)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """One pattern or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{name} = {value!r} is no pattern and no list of patterns")
    return tuple(found)


def read_method(word: str) -> Method:
    """Read a method with its options; colons and commas do the same.

    Raises:
        ValueError: no such method or option, or a value that cannot be.

    Example:
        >>> str(read_method("svft:pattern=banded,off_diagonals=3"))
        "SVFT(rank=None, pattern='banded', off_diagonals=3)"
    """
    name, *options = re.split(r"[:,](?![^\[]*\])", word.strip())
    return METHODS.make(name, read_values(options))
