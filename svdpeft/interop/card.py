"""A model card: what an adapter is, of what, by which method, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from svdpeft.adapter.adapter import Adapter
from svdpeft.adapter.deriving import cost
from svdpeft.methods.base import Method

CARD = "README.md"
LOAD = """\
```python
{imports}
base = svdpeft.models.load({base!r}{options}).model
adapter = svdpeft.load(base, {place!r})
```
"""


def card(
    adapter: Adapter,
    base: str | None = None,
    place: str = "PATH",
    metrics: Mapping[str, float] | None = None,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the README of an adapter, with the metadata that the hub reads.

    Args:
        adapter: in any state.
        base: name of the model that it is for, as ``svdpeft.models.load`` takes it.
        place: where the adapter will lie: a folder, or a name on the hub.
        metrics: by name.
        command: that trained it.
        options: of ``svdpeft.models.load`` that the base was loaded with.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> text = card(svdpeft.attach(model, svdpeft.PiSSA(rank=1)), "hf:me/base")
        >>> "library_name: svdpeft" in text, "PiSSA" in text, "@" in text
        (True, True, True)
    """
    from huggingface_hub import ModelCardData

    methods = _methods(adapter)
    hub = base.removeprefix("hf:") if base and base.startswith("hf:") else None
    about = ModelCardData(
        library_name="svdpeft",
        base_model=hub,
        tags=["svdpeft", *(method.name for method in methods)],
    )
    lines = [f"---\n{about.to_yaml()}\n---\n", f"# {', '.join(str(method) for method in methods)}\n"]
    what = f"An adapter of [svdpeft](https://pypi.org/project/svdpeft) for `{base or type(adapter.model).__name__}`"
    lines.append(
        f"{what}: {len(adapter.sites)} sites, {adapter.trainable_count:,} trained values"
        + (f", {len(adapter.whole)} parameters trained whole" if adapter.whole else "")
        + ".\n"
    )
    if what := cost(adapter.sites):
        lines.append(f"It is {what}.\n")
    options = options or {}
    imports = (
        "import torch\n\n" * any(isinstance(value, torch.dtype) for value in options.values()) + "import svdpeft\n"
    )
    written = "".join(f", {name}={value!r}" for name, value in options.items())
    lines.append(LOAD.format(imports=imports, base=base or "BASE", options=written, place=place))
    if metrics:
        lines.append(
            "| metric | value |\n| --- | --- |\n" + "".join(f"| {n} | {v:.4g} |\n" for n, v in metrics.items())
        )
    if command:
        lines.append(f"Trained by\n\n```sh\n{command}\n```\n")
    cited = [method.reference.bibtex() for method in methods if method.reference is not None]
    if cited:
        lines.append("To cite\n\n```bibtex\n" + "\n\n".join(dict.fromkeys(cited)) + "\n```\n")
    return "\n".join(lines)


def _methods(adapter: Adapter) -> list[Method]:
    return list({str(method): method for method in adapter.methods}.values())
