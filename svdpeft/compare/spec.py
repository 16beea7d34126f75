"""What is compared: a specification, checked whole before anything runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from svdpeft.adapter.gradients import rule_for
from svdpeft.adapter.loraplus import check_roles
from svdpeft.finetuning.words import check_preserve
from svdpeft.methods.base import Method, PerSite
from svdpeft.registry import TASKS, near_miss
from svdpeft.training.recipe import DTYPES, Recipe

Kind = Literal["grid", "halving"]
AROUND = ("loraplus_ratio", "gradients")  # likewise, of one line of a comparison
RECIPE = ("accumulate", "scheduler", "warmup", "weight_decay", "clip", "mixed_precision")  # fields of training.Recipe


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ``ValueError`` where a value is no whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} is not a whole number of at least {least}")


def check_text(name: str, value: Any) -> None:
    """Raise ``ValueError`` where a value is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} {value!r} is not a text")


def check_number(name: str, value: Any, above: float) -> None:
    """Raise ``ValueError`` where a value is no finite number above another."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= sys.float_info.max:
        raise ValueError(f"{name} {value!r} is not a number above {above:g}")


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        label: the name that the method is shown under.
        method: with its hyper-parameters.
        lr: learning rate that it is known to work at.
        asked: hyper-parameters that were asked for by name, should they be those that it has by itself.
        loraplus_ratio: LoRA+, the rate of L as a multiple of that of A.
        gradients: a rule for the gradients of L and A.

    Raises:
        ValueError: the method has no L and A that both train.
    """

    label: str
    method: Method
    lr: float
    asked: tuple[str, ...] = ()
    loraplus_ratio: float | None = None
    gradients: str | None = None

    def __post_init__(self) -> None:
        if self.loraplus_ratio is not None:
            check_roles(self.loraplus_ratio, [self.method])
        if self.gradients is not None:
            check_text("gradients", self.gradients)
            rule_for(self.gradients, [self.method])

    def around(self) -> dict[str, Any]:
        """What is around its steps, where anything is."""
        return {name: value for name in AROUND if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Search:
    """How the learning rate of each method is found on the validation split: the same grid and seeds for all.

    The rates lie on a log grid, lr · factorᵏ for k = −(trials − 1)/2, …, (trials − 1)/2, around the method's own.

    Args:
        kind: ``"grid"`` trains every rate as long as the comparison's runs; ``"halving"`` (successive halving) trains
            all for a part of that, then the better half for twice as long, and the last two for the whole.
        trials: number of rates; odd, so that the method's own is the middle.
        factor: ratio of neighbouring rates.
        metric: what is looked at; ``None`` is the task's own metric, and its loss where two rates are equal.
        seed: of the trials; no run of the comparison has it.
        seeds: how often each rate is trained, with ``seed``, ``seed`` + 1 and so on: their mean counts.
        further: at most so many rates beyond the grid, one after the other while the best lies at an edge.

    Source: Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS
    2016.
    """

    kind: Kind = "grid"
    trials: int = 5
    factor: float = 10**0.5
    metric: str | None = None
    seed: int = 1000
    seeds: int = 1
    further: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"search kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        check_whole("search trials", self.trials, 3)
        if self.trials % 2 == 0:
            raise ValueError(f"search trials {self.trials} is not odd: the method's own rate is the middle")
        check_number("search factor", self.factor, 1)
        for name, least in (("seed", 0), ("seeds", 1), ("further", 0)):
            check_whole(f"search {name}", getattr(self, name), least)

    @property
    def trained(self) -> range:
        """The seeds that every rate is trained with."""
        return range(self.seed, self.seed + self.seeds)

    def rates(self, centre: float) -> list[float]:
        """Return the rates around one, from the least.

        Example:
            >>> Search(trials=3, factor=10).rates(0.5)
            [0.05, 0.5, 5.0]
        """
        half = self.trials // 2
        return [self._rate(centre, k) for k in range(-half, half + 1)]

    def beyond(self, best: float, rates: Sequence[float]) -> float | None:
        """Return the next rate outside those that were tried, where the best is their first or last.

        Example:
            >>> [Search(factor=10).beyond(best, [0.01, 0.1, 1.0]) for best in (0.01, 0.1, 1.0)]
            [0.001, None, 10.0]
        """
        if best not in (min(rates), max(rates)):
            return None
        return self._rate(best, 1 if best == max(rates) else -1)

    def _rate(self, centre: float, k: int) -> float:
        return float(f"{centre * self.factor**k:.6g}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields; what an older comparison could not say is said where it is not what that did."""
        new = {"seeds": 1, "further": 0}
        return {n: value for n, value in dataclasses.asdict(self).items() if n not in new or value != new[n]}

    def rungs(self) -> list[tuple[int, float]]:
        """Return how many rates each rung trains, and for which part of a run's epochs.

        Example:
            >>> Search(trials=9).rungs(), Search("halving", 9).rungs()
            ([(9, 1.0)], [(9, 0.125), (5, 0.25), (3, 0.5), (2, 1.0)])
        """
        if self.kind == "grid":
            return [(self.trials, 1.0)]
        counts = [self.trials]
        while counts[-1] > 2:
            counts.append((counts[-1] + 1) // 2)
        return [(count, 0.5 ** (len(counts) - 1 - i)) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class Spec:
    """A comparison.

    Args:
        model: a name that ``svdpeft.models.load`` takes.
        task: registry name of a task of the model's modality.
        methods: what is compared.
        seeds: one run per method, budget and seed; a seed sets initialisation, batch order and dropout.
        targets: patterns of the layers that factored methods adapt; ``None`` is what ``attach`` adapts where nothing is
            said.
        exclude: patterns of layers that are left alone.
        budgets: trainable values that the factors of every method may have, each a count, or a share of the base such
            as ``"0.5%"``; ``None``, in a file ``"none"``, takes the methods as they are given. A new head is not
            counted: all have it. Methods without factors train what they train, once.
        epochs: passes over the training split.
        batch_size: examples per forward.
        accumulate: forwards per optimizer step.
        scheduler: of the learning rate, one of transformers'.
        warmup: in which the rate rises from 0: a share of the steps below 1, else a number of steps.
        weight_decay: of AdamW.
        clip: the norm that gradients are clipped to; 0 leaves them.
        mixed_precision: ``"bf16"``, ``"fp16"`` or ``"tf32"``; ``None``: the dtypes of the tensors.
        head_lr: learning rate of a new head; ``None`` is the method's.
        image_size: side of a vision model's input in pixels; ``None`` is the model's own.
        dtype: of the base: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: of a CPU that each run takes: the order of a sum, and so its last digit, depends on them; ``None`` is
            all that its process has.
        task_options: hyper-parameters of the task.
        search: how learning rates are found; ``None`` takes each method's own.
        baseline: label of the method that the others are tested against; ``None`` is the first that is LoRA, else the
            first of all.
        confidence: of the intervals over seeds; ``None`` is 0.95 where there is more than one seed.
        snapshots: number of moments in training at which the spectra of the weights are compared with the base's.
        probe: file or folder on which forgetting is measured; ``None`` is the built-in text or pictures.
        preserve: file or folder with data whose outputs are to stay, for methods that start from such data, too.
    """

    model: str
    task: str
    methods: tuple[Entry, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    budgets: tuple[str | int | None, ...] = (None,)
    epochs: float = 1
    batch_size: int = 8
    accumulate: int = 1
    scheduler: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    mixed_precision: str | None = None
    head_lr: float | None = None
    image_size: int | None = None
    dtype: str = "float32"
    threads: int | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)
    search: Search | None = Search()
    baseline: str | None = None
    confidence: float | None = None
    snapshots: int = 0
    probe: str | None = None
    preserve: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "methods", "budgets"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"a comparison needs at least one of {name}")
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} names {twice[0]!r} twice")
        for name, least in (("batch_size", 1), ("snapshots", 0), ("image_size", 1), ("threads", 1)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        for name in ("epochs", "head_lr", "confidence"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        for seed in self.seeds:
            check_whole("a seed", seed, 0)
        for limit in self.budgets:
            if limit is not None and not isinstance(limit, str):
                check_whole("a budget that is no share such as '0.5%',", limit, 1)
        for name in ("targets", "exclude"):
            for pattern in getattr(self, name) or ():
                check_text(f"{name}, a pattern:", pattern)
        if self.targets == ():
            raise ValueError("targets is empty: no factored method would adapt anything")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        self.recipe(1.0, self.epochs)
        check_preserve(self.preserve, [entry.method for entry in self.methods])
        labels = [entry.label for entry in self.methods]
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(
                f"no method is labelled {self.baseline!r}, the baseline: {near_miss(self.baseline, labels)}"
            )
        if self.confidence is not None:
            if self.confidence >= 1:
                raise ValueError(f"confidence {self.confidence:g} is outside (0, 1)")
            if len(self.seeds) < 2:
                raise ValueError(
                    f"seeds {list(self.seeds)}: one seed gives no confidence interval: give at least two, "
                    "or leave confidence out"
                )
        if limit := next((limit for limit in self.budgets if limit is not None), None):
            for entry in self.methods:
                _check_knob(entry, limit)
        if self.search is not None and self.search.metric is not None:
            known = TASKS[self.task].on_validation()
            if self.search.metric not in known:
                near = near_miss(self.search.metric, known)
                raise ValueError(
                    f"task {self.task!r} has no metric {self.search.metric!r}, the search's, on its validation split: "
                    f"{near}"
                )
        if self.search is not None and (twice := sorted({*self.search.trained} & {*self.seeds})):
            raise ValueError(f"seed {twice[0]} is the search's: its run would be judged by its own choice")

    def recipe(self, lr: float, epochs: float) -> Recipe:
        """How a run trains, at a rate and for so many passes."""
        return Recipe(lr, self.batch_size, epochs, **{name: getattr(self, name) for name in RECIPE})

    def make_task(self):
        """Build the task."""
        return TASKS.make(self.task, self.task_options)

    def to_json(self) -> dict[str, Any]:
        """Return the specification as plain values; ``read_spec`` takes them back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        methods = [{"label": e.label, "method": e.method.to_json(), "lr": e.lr, **e.around()} for e in self.methods]
        search = self.search.to_json() if self.search else None
        lists = {name: list(plain[name]) for name in ("seeds", "exclude", "budgets")}
        targets = None if self.targets is None else list(self.targets)
        if self.preserve is None:  # as in older comparisons
            del plain["preserve"]
        return {
            **plain,
            **lists,
            "targets": targets,
            "task_options": dict(self.task_options),
            "methods": methods,
            "search": search,
        }


def _check_knob(entry: Entry, limit: str | int) -> None:
    """What a budget decides cannot be asked for as well."""
    method = entry.method
    if not isinstance(method, PerSite):
        return
    for known in dataclasses.fields(method):
        asked = getattr(method, known.name)
        if known.name == method.knob and (asked != known.default or known.name in entry.asked):
            raise ValueError(
                f"{entry.label!r} asks for {known.name}={asked!r}, which the budget {limit} decides: leave it out, or "
                'say --budget none (budgets = ["none"])'
            )
