"""Models of one's own: a folder of timm's, a state dict for an architecture of timm's, a function that builds."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from svdpeft.registry import near_miss

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


class Architecture(NamedTuple):
    """One of timm's, and where its weights are.

    Args:
        name: that ``timm.create_model`` takes.
        base: name of the architecture, whose sizes and classifier are known.
        file: a state dict; ``None``: timm finds the weights.
    """

    name: str
    base: str
    file: Path | None = None


def architecture(name: str) -> Architecture:
    """What a name of timm's means: ``NAME``, ``NAME@state_dict.pth``, ``local-dir:FOLDER``.

    Raises:
        ValueError: no such file; a folder that timm has not written.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        base = architecture_of(folder)
        if base is None:
            raise ValueError(f"{folder} is no folder of timm's: it needs a config.json that names an architecture")
        return Architecture(name, base)
    plain, at, file = name.partition("@")
    if at and not Path(file).is_file():
        raise ValueError(f"the weights of {plain!r} are to be in {file!r}, and there is no such file")
    return Architecture(plain, plain, Path(file) if at else None)


def architecture_of(folder: Path) -> str | None:
    """The architecture that a folder of timm's names, or ``None``."""
    try:
        found = json.loads((folder / "config.json").read_text()).get("architecture")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def is_factory(name: str) -> bool:
    """Whether a name is one of a function in a module, and none of ours."""
    return FACTORY.fullmatch(name) is not None and name.partition(":")[0] not in ("timm", "hf")


def build(name: str, options: dict[str, Any]) -> Any:
    """Call ``package.module:function``; the working directory is looked through, too, as by ``python -m``.

    Args:
        name: of the function. It returns a module, or a ``Loaded``.
        options: that were given; it must take them.

    Raises:
        ValueError: no such module or function; one that does not take an option, or returns something else.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: there is no module {error.name!r}") from error
    factory = getattr(found, function, None)
    if not callable(factory):
        raise ValueError(f"{name!r}: {module} has no function {function!r}: {near_miss(function, vars(found))}")
    given = {key: value for key, value in options.items() if value is not None}
    try:
        made = factory(**given)
    except TypeError as error:
        raise ValueError(f"{name!r} was called with {given}: {error}") from error
    if not isinstance(made, nn.Module) and not hasattr(made, "modality"):
        raise ValueError(
            f"{name!r} returned a {type(made).__name__}: it must return a module, or svdpeft.models.Loaded"
        )
    return made
