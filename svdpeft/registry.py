"""Name to class, for methods, layer kinds and tasks: one mechanism, third parties included.

A package that is not ours joins by an entry point in its own ``pyproject.toml``::

    [project.entry-points."svdpeft.methods"]
    my-method = "my_package.my_method"

The module is imported when the registry is first read; its ``@METHODS.register("my-method")`` does the rest.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=type)


def near_miss(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, for the end of an error message.

    Example:
        >>> near_miss("sorza", ["lora", "sorsa"])
        "did you mean 'sorsa'? Known: lora, sorsa"
    """
    known = sorted(known)
    spelled = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name).lower(), spelled, n=1)  # what a file says may be no text
    hint = f"did you mean {spelled[close[0]]!r}? " if close else ""
    shown = ", ".join(known[:40]) + (f", … ({len(known)} in all)" if len(known) > 40 else "")
    return f"{hint}Known: {shown or 'none'}"


class Registry(Generic[T]):
    """Classes by name; fills itself from one package of files and from one group of entry points.

    Args:
        what: the word for one entry, used in messages ("method").
        package: dotted name of the package whose modules register themselves; a new file is a new entry.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self.package = package
        self._classes: dict[str, T] = {}
        self._filled = False
        self._broken: dict[str, str] = {}  # plug-ins that could not be loaded

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: file the class under ``name`` and write the name on it as ``cls.name``."""

        def add(cls: T) -> T:
            taken = self._classes.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.what} {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True  # first, so that a module that reads the registry while it is filled does not recurse
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            try:
                point.load()
            except Exception as error:  # a broken plug-in costs its own entries, and not ours or another's
                self._broken[point.name] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"the plug-in {point.name!r} ({point.value}), an entry point of {self.package}, could not be "
                    f"loaded and is left out: {self._broken[point.name]}",
                    stacklevel=2,
                )

    def offered(self) -> list[str]:
        """The names that the files and the entry points say, without importing either: for a shell that completes.

        An entry point is to be called as what it registers; one that is not is completed by its own name.
        """
        spec = importlib.util.find_spec(self.package)
        folders = map(Path, (spec and spec.submodule_search_locations) or ())
        texts = (file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*.py"))
        names = (name for text in texts for name in re.findall(r'^@\w+\.register\("([^"]+)"\)', text, re.MULTILINE))
        return sorted({*names, *(point.name for point in entry_points(group=self.package))})

    def __getitem__(self, name: str) -> T:
        self._fill()
        if name not in self._classes:
            lost = [f"; the plug-in {point!r} could not be loaded: {why}" for point, why in self._broken.items()]
            raise ValueError(f"no {self.what} is called {name!r}: {near_miss(name, self._classes)}{''.join(lost)}")
        return self._classes[name]

    def make(self, name: str, options: Mapping[str, Any]) -> Any:
        """Build an entry from its options.

        Raises:
            ValueError: no entry, or none of its options, has the name, with the near miss; an option without a default
                is not given, or one has a value of another type.
        """
        cls = self[name]
        known = inspect.signature(cls).parameters
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no hyper-parameter {option!r}: {near_miss(option, known)}")
        needed = [option for option in known if known[option].default is inspect.Parameter.empty]
        if missing := [option for option in needed if option not in options]:
            raise ValueError(f"{self.what} {name!r} needs {', '.join(missing)}")
        try:
            return cls(**options)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # of a text that is compared, say
            raise ValueError(f"{self.what} {name!r} cannot have {dict(options)}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self._fill()
        return len(self._classes)

    def values(self) -> list[T]:
        """Every registered class, ordered by name."""
        return [self._classes[name] for name in self]


METHODS: Registry = Registry("method", "svdpeft.methods")
KINDS: Registry = Registry("layer kind", "svdpeft.layers")
TASKS: Registry = Registry("task", "svdpeft.tasks")
