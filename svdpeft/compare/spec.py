"""What is compared: a specification, from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from svdpeft.methods.base import Method
from svdpeft.registry import METHODS, TASKS, near_miss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method, the name it is shown under, and its learning rate."""

    label: str
    method: Method
    lr: float


@dataclass(frozen=True)
class Spec:
    """A comparison.

    Args:
        model: a name that ``svdpeft.models.load`` takes.
        task: registry name of a task of the model's modality.
        methods: what is compared.
        seeds: one run per method and seed; a seed sets initialisation, batch order and dropout.
        targets: patterns of the layers that factored methods adapt.
        exclude: patterns of layers that are left alone.
        budget: trainable values that the factors of every method may have: a count, or a share of the base such as
            ``"0.5%"``; ``None`` takes the methods as they are given. A new head is not counted: all have it.
        epochs: passes over the training split.
        batch_size: examples per optimizer step.
        head_lr: learning rate of a new head; ``None`` is the method's.
        image_size: side of a vision model's input in pixels; ``None`` is the model's own.
        task_options: hyper-parameters of the task.
    """

    model: str
    task: str
    methods: tuple[Entry, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    budget: str | int | None = None
    epochs: float = 1
    batch_size: int = 8
    head_lr: float | None = None
    image_size: int | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)

    def make_task(self):
        """Build the task."""
        return TASKS[self.task](**self.task_options)


def read_spec(path: Path | None = None, sizes: Mapping[str, int] | None = None, **options: Any) -> Spec:
    """Build a specification.

    Args:
        path: TOML file with any of ``Spec``'s fields; ``methods`` is a list of strings as on the command line or of
            tables with ``name``, ``label``, ``lr`` and hyper-parameters.
        sizes: hyper-parameters of the task that override the file's, such as ``{"train_size": 100}``.
        **options: fields that override the file; ``None`` is not given.

    Raises:
        ValueError: an unknown field, method, hyper-parameter or task, with the near miss; no seed or method.

    Example:
        >>> spec = read_spec(model="efficientnet-lite0", methods="lora,svft:pattern=banded", seeds=[0])
        >>> [entry.label for entry in spec.methods]
        ['LoRA', 'SVFT banded']
    """
    defaults = _parse(files("svdpeft.compare").joinpath("defaults.toml").read_text(), "defaults.toml")
    given = _parse(path.read_text(), str(path)) if path else {}
    given |= {name: value for name, value in options.items() if value is not None}
    model = given.get("model", defaults["all"]["model"])
    modality = _modality(model, given.get("task"))
    merged = {**defaults["all"], **defaults[modality], **defaults.get(model, {}), **given, "model": model}
    merged["task_options"] = {**merged.get("task_options", {}), **(sizes or {})}
    known = {f.name for f in dataclasses.fields(Spec)}
    for name in merged:
        if name not in known:
            raise ValueError(f"a comparison has no field {name!r}: {near_miss(name, known)}")
    TASKS[merged["task"]]
    merged["methods"] = read_methods(merged["methods"], defaults["lr"][modality] | defaults["lr"].get(model, {}))
    for name in ("seeds", "targets", "exclude"):
        value = merged.get(name, ())
        merged[name] = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for name in ("seeds", "methods"):
        if not merged[name]:
            raise ValueError(f"a comparison needs at least one of {name}")
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
    entries = []
    for word in words:
        table = dict(word) if isinstance(word, Mapping) else _read_word(word)
        name, label, lr = table.pop("name"), table.pop("label", None), table.pop("lr", None)
        method = METHODS.make(name, table)
        label = label or _label(method, table)
        entries.append(Entry(label, method, float(lr or rates.get(label, rates.get(name, 1e-3)))))
    labels = [entry.label for entry in entries]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two methods are labelled {twice!r}: give one of them another label=")
    return tuple(entries)


def _label(method: Method, options: Mapping[str, Any]) -> str:
    """``SVFT banded``: the class and what was asked of it."""
    values = (v if isinstance(v, str) and k == "pattern" else f"{k}={v}" for k, v in options.items())
    return " ".join([type(method).__name__, *values])


def _read_word(word: str) -> dict[str, Any]:
    name, *options = word.strip().split(":")
    table: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: write options as name:key=value:key=value")
        table[key] = _parse(f"v = {value}", word)["v"] if re.fullmatch(r"[-+\d.e]+|true|false|\[.*\]", value) else value
    return table


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
