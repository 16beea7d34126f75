"""Write docs/methods: a page and a picture per method, made from its class. Run by ``make docs``."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from svdpeft.adapter.adapter import Adapter
from svdpeft.methods.base import Factored, PerSite
from svdpeft.registry import METHODS
from svdpeft.sites.weights import stored
from svdpeft.zoo import FAMILIES, SIDE, Card, card, search

FOLDER = Path(__file__).parent / "methods"
EXAMPLE = """\
import torch
from torch import nn
import svdpeft

model = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 10))
{before}adapter = svdpeft.attach(model, svdpeft.{name}(), targets=["0"], train=["2"]{more})
print(adapter.summary())
"""
CALIBRATE = """\
batches = torch.randn(8, 16, 256)  # yours: a few batches of the data to adapt to
calibration = svdpeft.calibrate({arguments})
"""
WORDS = """\
In the formulas W0 is the weight, of m outputs and n inputs, and r the rank: [concepts](../concepts.md) has the equation
and the words. [All methods](README.md); [which one when](../choosing.md)."""
OUT_OF_SCOPE = """\
## Not here

Methods that change no weight: prompt and prefix tuning, which put trained vectors in front of a text, and mixtures in
which a router chooses among adapters (Poly, X-LoRA). An adapter here is a change of weights, which can be merged."""
FROZEN, TRAINED, INK = "#c9d3e0", "#f2a65a", "#1f2933"
HEIGHT, WIDTH, THIN = 1.6, 2.0, 0.45  # of W, and of the inner side of L and A


# -- pages ----------------------------------------------------------------------------------------------------------


def example(name: str) -> str:
    """Return a short program that attaches the method with its defaults."""
    cls = METHODS[name]
    if cls.example:
        return cls.example
    before = more = ""
    needs = cls().needs if issubclass(cls, PerSite) else ""
    if needs:
        arguments = 'model, batches, targets=["0"]'
        if needs == "gradients":
            loss = "loss=lambda y, batch: y.square().mean()"
            arguments = f"\n    {arguments}, inputs=False, gradients=True, {loss}\n"
        before, more = CALIBRATE.format(arguments=arguments), ", calibration=calibration"
    return EXAMPLE.format(before=before, name=cls.__name__, more=more)


def page(name: str) -> str:
    """Return the Markdown page of a method."""
    c = card(name)
    title, _, sentence = c.title.partition(": ")
    lines = [f"# {c.cls.__name__}" + (f" (`{name}`)" if c.cls.__name__.lower() != name else "")]
    sentence = (sentence or title).replace("\n", " ")
    lines += [sentence[0].upper() + sentence[1:], f"![What is frozen and what trains in {name}]({name}.svg)"]
    if c.cls.latex:
        lines += [f"$$\n{c.cls.latex}\n$$"]
    if c.formula:
        lines += [f"```text\n{inspect.cleandoc(c.formula)}\n```"]
    lines += [c.summary]
    if c.sections.get("When to use"):
        lines += ["## When to use", c.sections["When to use"].replace("\n", " ")]
    lines += ["## At a glance", _glance(c)]
    lines += ["## Example", f"```python\n{example(name)}```"]
    if c.sections.get("Args"):
        lines += ["## Hyper-parameters", _list(c.sections["Args"])]
    if c.cls.reference is not None:
        differences = c.sections.get("Paper and code", "")
        lines += ["## Paper and code", _list(differences) if differences else "No difference is known."]
    if c.kinds:
        lines += ["## Layer kinds", _kinds(c)]
    if c.combines:
        lines += ["## Combinations", _table(("with", ""), c.combines)]
    if c.cls.reference is not None:
        lines += ["## Citation", c.citation, f"```bibtex\n{c.cls.reference.bibtex()}\n```"]
    lines += [WORDS]
    lines += [f"*Made from `{c.cls.__module__.replace('.', '/')}.py` by `make docs`.*"]
    return "\n\n".join(lines) + "\n"


def index() -> str:
    """Return the page that lists all methods."""
    lines = [
        "# The method zoo",
        f"{len(METHODS)} methods. Values are those of one {SIDE}×{SIDE} layer with the method's defaults. “LoRA rank” "
        "is the rank of the plain LoRA that holds the trained adapter exactly. A method's page says why it is not "
        "defined on a kind of layer. `svdpeft methods --search TEXT` finds one by a word of its description.",
    ]
    for each, what in FAMILIES.items():
        lines += [f"## {what[0].upper()}{what[1:]}", _rows(search(families=[each]))]
    lines += [OUT_OF_SCOPE]
    return "\n\n".join(lines) + "\n"


def _rows(cards: Sequence[Card]) -> str:
    """The table of a family."""
    rows = [
        "| method | trains | values | exact start | LoRA rank | works on | source |",
        "| --- | --- | ---: | --- | ---: | --- | --- |",
    ]
    for c in cards:
        source = c.cls.reference
        link = f"[{source.arxiv}](https://arxiv.org/abs/{source.arxiv})" if source and source.arxiv else ""
        rows.append(
            f"| [{c.cls.__name__}]({c.name}.md) | {c.trains} | {f'{c.values:,}' if c.values else ''} | "
            f"{'yes' if c.exact_start else 'no'} | {c.export_rank or '–'} | {c.works} | {link} |"
        )
    return "\n".join(rows)


def _glance(c: Card) -> str:
    rows = {
        "trains": c.trains,
        "values": c.parameters + (f" {c.values:,} at {SIDE}×{SIDE} with the defaults." if c.values else ""),
        "starts as the base model": "yes, bit for bit" if c.exact_start else "no",
        "exact as a LoRA": f"of rank {c.export_rank} at {SIDE}×{SIDE} with the defaults"
        if c.export_rank
        else "no: its update has full rank"
        if c.kinds
        else "no: a LoRA file has no word for the part of a weight that is one head"
        if c.combines
        else "no: it changes parameters of the base",
    }
    return _table(("", ""), rows)


def _kinds(c: Card) -> str:
    missing = {f"`{kind}`": why for kind, why in c.kinds.items() if why}
    defined = ", ".join(f"`{kind}`" for kind, why in c.kinds.items() if not why)
    text = f"Defined on {defined}." if defined else ""
    return text + ("\n\n" + _table(("not on", "why"), missing) if missing else "")


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {key} | {value} |".replace("\n", " ") for key, value in rows.items()])


def _list(entries: str) -> str:
    """The entries of a docstring section as a list."""
    return "\n".join("* " + re.sub(r"^(\w+):", r"`\1`:", entry) for entry in entries.split("\n"))


def write(folder: Path) -> None:
    """Write every page and picture, and remove those of methods that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"README.md": index()} | {f"{name}.md": page(name) for name in METHODS}
    for file in folder.iterdir():
        if file.name not in wanted and file.stem not in METHODS:
            file.unlink()
    for file, text in wanted.items():
        (folder / file).write_text(text)
    for name in METHODS:
        draw(name, example(name), folder / f"{name}.svg")


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(name: str, program: str, path: Path) -> None:
    """Run a method's example and draw its first site.

    Args:
        name: of the method.
        program: that leaves an ``adapter``.
        path: of the SVG file.
    """
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        exec(compile(program, name, "exec"), names)
    adapter: Adapter = names["adapter"]
    figure = Figure(figsize=(8, 2.7), facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.8))
    axes.set_axis_off()
    figure.text(0.5, 0.9, f"${drawable(METHODS[name].latex)}$", ha="center", va="center", fontsize=11, color=INK)
    pen = _Pen(axes)
    if adapter.sites:
        _site(pen, adapter)
    else:
        _base(pen, adapter)
    words = ((FROZEN, "frozen"), (TRAINED, "trained"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=INK, label=word) for colour, word in words]
    axes.legend(handles=handles, loc="lower right", frameon=False, ncols=2, fontsize=9)
    axes.set_xlim(-0.1, max(pen.x + 0.1, 8))
    axes.set_ylim(-1.75, 1.15)
    axes.set_aspect("equal")
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def drawable(latex: str) -> str:
    """The formula in the part of LaTeX that matplotlib knows."""
    plain = re.sub(r"\\[bB]ig+[lr]?\s*", "", latex)
    for there, here in {r"\tfrac": r"\frac", r"\lVert": r"\|", r"\rVert": r"\|", r"\operatorname": r"\mathrm"}.items():
        plain = plain.replace(there, here)
    return plain


class _Pen:
    """Draws from left to right."""

    def __init__(self, axes: Any) -> None:
        self.axes, self.x = axes, 0.0

    def text(self, word: str) -> None:
        width = 0.16 * len(word) + 0.1
        self.axes.text(self.x + width / 2, 0, word, ha="center", va="center", fontsize=13, color=INK)
        self.x += width + 0.12

    def box(self, label: str, width: float, height: float, trained: bool, pattern: str = "full") -> None:
        colour = TRAINED if trained else FROZEN
        face = "white" if pattern == "diagonal" else colour
        self.axes.add_patch(Rectangle((self.x, -height / 2), width, height, facecolor=face, edgecolor=INK, lw=1))
        if pattern == "diagonal":
            self.axes.plot([self.x, self.x + width], [height / 2, -height / 2], color=colour, lw=4)
        self.axes.text(self.x + width / 2, -height / 2 - 0.12, label, ha="center", va="top", fontsize=9, color=INK)
        self.x += width + 0.12


def _site(pen: _Pen, adapter: Adapter) -> None:
    site = next(iter(adapter.sites.values()))
    method, factors = site.method, site.factors
    pen.text("W′ =")
    if isinstance(method, Factored):
        now, start = method.now(factors), method.anchor(factors)
        pen.box("$W_0$", WIDTH, HEIGHT, False)
        pen.text("+")
        if now.scale != 1:
            pen.text("s")
        _product(pen, now.L, now.C, now.A, "")
        if start is not None:
            pen.text("−")
            _product(pen, start.L.detach(), None if start.C is None else start.C.detach(), start.A.detach(), "_0")
        return
    pen.text(f"{type(method).__name__}(")
    pen.box("$W_0$", WIDTH, HEIGHT, False)
    for name, parameter in factors.named_parameters():
        if name.endswith("0"):
            continue
        rows, columns = (*parameter.shape[-2:],) if parameter.ndim > 1 else (parameter.shape[0], 1)
        largest = max(rows, columns)
        shape = [max(THIN / 2, HEIGHT * side / largest) for side in (columns, rows)]
        if (rows, columns) == site.shape[-2:]:  # drawn as W0, whose sides are not to scale
            shape = [WIDTH, HEIGHT]
        pen.box(name.replace("_", " "), *shape, parameter.requires_grad)
    pen.text(")")


def _product(pen: _Pen, left: Tensor, core: Tensor | None, right: Tensor, mark: str) -> None:
    pen.box(f"$L{mark}$", THIN, HEIGHT, left.requires_grad)
    if core is not None:
        pattern = "diagonal" if core.ndim < left.ndim else "full"
        pen.box(f"$C{mark}$", THIN, THIN, core.requires_grad, pattern)
    pen.box(f"$A{mark}$", WIDTH, THIN, right.requires_grad)


def _base(pen: _Pen, adapter: Adapter) -> None:
    """A method that trains the base's own parameters: all of them in a row."""
    trained = {id(stored(*place)) for place in adapter.whole.values()}
    for name, p in adapter.model.named_parameters():
        tall = HEIGHT * (1 if p.shape[0] > 100 else 0.3)
        pen.box(name, THIN / 2 if p.ndim == 1 else WIDTH * 0.8, tall, id(p) in trained)
        pen.x += 0.45


if __name__ == "__main__":
    write(FOLDER)
