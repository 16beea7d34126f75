"""What is compared: a specification, from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from svdpeft.methods.base import Method, PerSite
from svdpeft.registry import METHODS, TASKS, near_miss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Kind = Literal["grid", "halving"]
DTYPES = ("float32", "bfloat16", "float16")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} is not a whole number of at least {least}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} {value!r} is not a text")


def _number(name: str, value: Any, above: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ValueError(f"{name} {value!r} is not a number above {above:g}")


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method, the name it is shown under, and the learning rate it is known to work at."""

    label: str
    method: Method
    lr: float


@dataclass(frozen=True)
class Search:
    """How the learning rate of each method is found on the validation split: the same number of trials for all.

    The rates lie on a log grid, lr · factorᵏ for k = −(trials − 1)/2, …, (trials − 1)/2, around the method's own.

    Args:
        kind: ``"grid"`` trains every rate as long as the comparison's runs; ``"halving"`` (successive halving) trains
            all for a part of that, then the better half for twice as long, and the last two for the whole.
        trials: number of rates; odd, so that the method's own is the middle.
        factor: ratio of neighbouring rates.
        metric: what is looked at; ``None`` is the task's own metric, and its loss where two rates are equal.
        seed: of the trials; no run of the comparison has it.

    Source: Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS
    2016.
    """

    kind: Kind = "grid"
    trials: int = 5
    factor: float = 10**0.5
    metric: str | None = None
    seed: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"search kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        _whole("search trials", self.trials, 3)
        if self.trials % 2 == 0:
            raise ValueError(f"search trials {self.trials} is not odd: the method's own rate is the middle")
        _number("search factor", self.factor, 1)
        _whole("search seed", self.seed, 0)

    def rates(self, centre: float) -> list[float]:
        """Return the rates around one, from the least.

        Example:
            >>> Search(trials=3, factor=10).rates(0.5)
            [0.05, 0.5, 5.0]
        """
        half = self.trials // 2
        return [float(f"{centre * self.factor**k:.6g}") for k in range(-half, half + 1)]

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
        targets: patterns of the layers that factored methods adapt.
        exclude: patterns of layers that are left alone.
        budgets: trainable values that the factors of every method may have, each a count, or a share of the base such
            as ``"0.5%"``; ``None``, in a file ``"none"``, takes the methods as they are given. A new head is not
            counted: all have it. Methods without factors train what they train, once.
        epochs: passes over the training split.
        batch_size: examples per optimizer step.
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
    """

    model: str
    task: str
    methods: tuple[Entry, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    budgets: tuple[str | int | None, ...] = (None,)
    epochs: float = 1
    batch_size: int = 8
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

    def __post_init__(self) -> None:
        for name in ("seeds", "methods", "budgets"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"a comparison needs at least one of {name}")
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} names {twice[0]!r} twice")
        for name, least in (("batch_size", 1), ("snapshots", 0), ("image_size", 1), ("threads", 1)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        for name in ("epochs", "head_lr", "confidence"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0)
        for seed in self.seeds:
            _whole("a seed", seed, 0)
        for limit in self.budgets:
            if limit is not None and not isinstance(limit, str):
                _whole("a budget that is no share such as '0.5%',", limit, 1)
        for name in ("targets", "exclude"):
            for pattern in getattr(self, name):
                _text(f"{name}, a pattern:", pattern)
        if not self.targets:
            raise ValueError("targets is empty: no factored method would adapt anything")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
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
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError(f"seed {self.search.seed} is the search's: its run would be judged by its own choice")

    def make_task(self):
        """Build the task."""
        return TASKS.make(self.task, self.task_options)

    def to_json(self) -> dict[str, Any]:
        """Return the specification as plain values; ``read_spec`` takes them back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        methods = [{"label": e.label, "method": e.method.to_json(), "lr": e.lr} for e in self.methods]
        search = dataclasses.asdict(self.search) if self.search else None
        lists = {name: list(plain[name]) for name in ("seeds", "targets", "exclude", "budgets")}
        return {**plain, **lists, "task_options": dict(self.task_options), "methods": methods, "search": search}


def read_spec(path: Path | None = None, task_options: Mapping[str, Any] | None = None, **options: Any) -> Spec:
    """Build a specification.

    Args:
        path: TOML file with any of ``Spec``'s fields; ``methods`` is a list of strings as on the command line or of
            tables with ``name``, ``label``, ``lr`` and hyper-parameters; ``search`` a table of ``Search``'s fields, or
            ``false``.
        task_options: hyper-parameters of the task that override the file's, such as ``{"train_size": 100}``.
        **options: fields that override the file; ``None`` is not given, also inside ``search``.

    Raises:
        ValueError: an unknown field, method, hyper-parameter or task, with the near miss; no seed or method; a
            confidence asked of one seed.

    Example:
        >>> spec = read_spec(model="efficientnet-lite0", methods="lora,svft:pattern=banded", seeds=[0])
        >>> [entry.label for entry in spec.methods]
        ['LoRA', 'SVFT banded']
    """
    defaults = _parse(files("svdpeft.compare").joinpath("defaults.toml").read_text(), "defaults.toml")
    given = _parse(path.read_text(), str(path)) if path else {}
    if isinstance(options.get("search"), Mapping):
        written = given.get("search") or {}
        written = {"kind": written} if isinstance(written, str) else written
        options["search"] = {**written, **{k: v for k, v in options["search"].items() if v is not None}} or None
    given |= {name: value for name, value in options.items() if value is not None}
    for name in given:
        _check(name, {f.name for f in dataclasses.fields(Spec)}, "a comparison")
    model = given.get("model", defaults["all"]["model"])
    for name in ("model", "task", "baseline", "probe"):
        if name in given:
            _text(name, given[name])
    modality = _modality(model, given.get("task"))
    merged = {**defaults["all"], **defaults[modality], **defaults.get(model, {}), **given, "model": model}
    for table in (merged.get("task_options", {}), task_options or {}):
        if not isinstance(table, Mapping):
            raise ValueError(f"task_options = {table!r} is not a table")
    merged["task_options"] = {**merged.get("task_options", {}), **(task_options or {})}
    task = TASKS[merged["task"]]
    for name in merged["task_options"]:
        _check(name, {f.name for f in dataclasses.fields(task)}, f"task {merged['task']!r}")
    merged["methods"] = read_methods(merged["methods"], defaults["lr"][modality] | defaults["lr"].get(model, {}))
    for name in ("seeds", "targets", "exclude", "budgets"):
        if name in merged:
            value = merged[name]
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ValueError(f"{name} = {value!r} is not a list: write [{value!r}]")
            merged[name] = tuple(value)
    if "budgets" in merged:  # TOML has no null
        merged["budgets"] = tuple(None if limit == "none" else limit for limit in merged["budgets"])
    merged["search"] = _read_search(merged.get("search", {}))
    return Spec(**merged)


def read_methods(methods: str | Sequence[str | Mapping[str, Any]], rates: Mapping[str, float]) -> tuple[Entry, ...]:
    """Read methods as they are written on the command line or in a file.

    Args:
        methods: ``"lora,svft:pattern=banded:lr=0.05"``, a list of such words, or of tables.
        rates: learning rate by label or method name, for entries that give none.

    Example:
        >>> read_methods("sorsa:gamma=0:label=no regulariser", {"sorsa": 1e-3})[0].label
        'no regulariser'
    """
    words = methods.split(",") if isinstance(methods, str) else methods
    if not isinstance(words, Sequence):
        raise ValueError(f"methods = {methods!r} is not a list")
    entries = []
    for word in words:
        if not isinstance(word, str | Mapping):
            raise ValueError(f"the method {word!r} is neither a word nor a table")
        table = dict(word) if isinstance(word, Mapping) else _read_word(word)
        if not isinstance(table.get("name"), str):
            raise ValueError(f"the method {table} has no name=")
        name, label, lr = table.pop("name"), table.pop("label", None), table.pop("lr", None)
        method = METHODS.make(name, table)
        label = _label(method, table) if label is None else label
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"the label {label!r} of {name} is not a word")
        lr = rates.get(label, rates.get(name, 1e-3)) if lr is None else lr
        _number(f"the learning rate of {label!r},", lr, 0)
        entries.append(Entry(label, method, float(lr)))
    labels = [entry.label for entry in entries]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two methods are labelled {twice!r}: give one of them another label=")
    return tuple(entries)


def _read_search(value: Any) -> Search | None:
    if value is False or value is None or value == "none":
        return None
    if isinstance(value, Search):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f"search = {value!r} is neither a table, nor a kind, nor false")
    table: dict[str, Any] = {"kind": value} if isinstance(value, str) else dict(value)
    for name in table:
        _check(name, {f.name for f in dataclasses.fields(Search)}, "a search")
    return Search(**table)


def _check_knob(entry: Entry, limit: str | int) -> None:
    """What a budget decides cannot be asked for as well."""
    method = entry.method
    if not isinstance(method, PerSite):
        return
    for known in dataclasses.fields(method):
        asked = getattr(method, known.name)
        if known.name == method.knob and asked != known.default:
            raise ValueError(
                f"{entry.label!r} asks for {known.name}={asked!r}, which the budget {limit} decides: leave it out, or "
                'say --budget none (budgets = ["none"])'
            )


def _check(name: str, known: set[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{what} has no field {name!r}: {near_miss(name, known)}")


def _label(method: Method, options: Mapping[str, Any]) -> str:
    """``SVFT banded``: the class and what was asked of it."""
    values = (v if isinstance(v, str) and k == "pattern" else f"{k}={v}" for k, v in options.items())
    return " ".join([type(method).__name__, *values])


def _read_word(word: str) -> dict[str, Any]:
    name, *options = word.strip().split(":")
    if not all("=" in option for option in options):
        raise ValueError(f"{word!r}: write options as name:key=value:key=value")
    return {"name": name, **read_values(options)}


def read_values(words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words; a value is a number, a truth, a list, or else a string.

    Example:
        >>> read_values(["rank=8", "pattern=banded", "rs=true"])
        {'rank': 8, 'pattern': 'banded', 'rs': True}
    """
    table: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: write an option as key=value")
        if re.fullmatch(r"true|false|\[.*\]", value):
            table[key] = _parse(f"v = {value}", word)["v"]
        else:
            table[key] = as_number(value)
    return table


def as_number(text: str) -> int | float | str:
    """Read a number, or leave the text as it is."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: {error}") from error


def _modality(model: str, task: str | None) -> str:
    """Where the defaults come from: the task if it is given, else what the model's name says."""
    if task is not None:
        return TASKS[task].modality
    from svdpeft.models import vision

    return "vision" if model in vision.EMBEDDED or model.startswith("timm:") else "language"
