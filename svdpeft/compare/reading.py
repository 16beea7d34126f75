"""Reading a specification, from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from svdpeft.compare.spec import AROUND, Entry, Search, Spec, check_number, check_text
from svdpeft.finetuning.words import modality_of, parse, read_values
from svdpeft.methods.base import Method
from svdpeft.registry import METHODS, TASKS, near_miss


def read_spec(path: Path | None = None, task_options: Mapping[str, Any] | None = None, **options: Any) -> Spec:
    """Build a specification.

    Args:
        path: TOML file with any of ``Spec``'s fields; ``methods`` is a list of strings as on the command line or of
            tables with ``name``, ``label``, ``lr``, ``loraplus_ratio``, ``gradients`` and hyper-parameters; ``search``
            a table of ``Search``'s fields, or ``false``.
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
    defaults = parse(files("svdpeft.compare").joinpath("defaults.toml").read_bytes(), "defaults.toml")
    given = parse(path.read_bytes(), str(path)) if path else {}
    if isinstance(options.get("search"), Mapping):
        written = given.get("search") or {}
        written = {"kind": written} if isinstance(written, str) else written
        options["search"] = {**written, **{k: v for k, v in options["search"].items() if v is not None}} or None
    given |= {name: value for name, value in options.items() if value is not None}
    for name in given:
        _check(name, {f.name for f in dataclasses.fields(Spec)}, "a comparison")
    model = given.get("model", defaults["all"]["model"])
    for name in ("model", "task", "baseline", "probe", "preserve"):
        if name in given:
            check_text(name, given[name])
    modality = modality_of(model, given.get("task"))
    merged = {**defaults["all"], **defaults[modality], **defaults.get(model, {}), **given, "model": model}
    if merged["task"] != defaults[modality]["task"] and "task_options" not in given:
        merged.pop("task_options", None)  # the model's are of the task that it has by default
    for table in (merged.get("task_options", {}), task_options or {}):
        if not isinstance(table, Mapping):
            raise ValueError(f"task_options = {table!r} is not a table")
    merged["task_options"] = {**merged.get("task_options", {}), **(task_options or {})}
    task = TASKS[merged["task"]]
    for name in merged["task_options"]:
        _check(name, {f.name for f in dataclasses.fields(task)}, f"task {merged['task']!r}")
    merged["methods"] = read_methods(
        merged["methods"], modality, defaults["lr"][modality] | defaults["lr"].get(model, {})
    )
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


def read_methods(
    methods: str | Sequence[str | Mapping[str, Any]], modality: str, rates: Mapping[str, float] = MappingProxyType({})
) -> tuple[Entry, ...]:
    """Read methods as they are written on the command line or in a file.

    Args:
        methods: ``"lora,svft:pattern=banded:lr=0.05"``, a list of such words, or of tables.
        modality: ``"vision"`` or ``"language"``: an entry that gives no learning rate has its method's for that.
        rates: learning rates that take precedence over the methods' own, by label or method name.

    Raises:
        ValueError: an entry that is not a method, two of one label, a method without a learning rate.

    Example:
        >>> (entry,) = read_methods("sorsa:gamma=0:label=no regulariser", "language")
        >>> entry.label, entry.lr
        ('no regulariser', 0.0002)
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
        around = {each: table.pop(each) for each in AROUND if each in table}
        method = METHODS.make(name, table)
        label = _label(method, table | around) if label is None else label
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"the label {label!r} of {name} is not a word")
        if lr is None:
            lr = rates.get(label, rates.get(name, method.learning_rates.get(modality)))
        if lr is None:
            raise ValueError(
                f"the method {name!r} says no learning rate for {modality} models: write {name}:lr=1e-3, or give its "
                f'class learning_rates = {{"{modality}": 1e-3}}'
            )
        check_number(f"the learning rate of {label!r},", lr, 0)
        entries.append(Entry(label, method, float(lr), tuple(table), **around))
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
