"""The method zoo: one card per method, made from its class, for the command line and for the pages in docs/methods."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svdpeft.methods.base import Factored, Given, Method, PerSite, Transform
from svdpeft.methods.base.allocation import Budget
from svdpeft.methods.dora import DoRA
from svdpeft.methods.lora import LoRA
from svdpeft.methods.whole import Whole
from svdpeft.registry import KINDS, METHODS, near_miss

SIDE = 4096  # of the square layer whose values the tables count
QUANTISED = "a quantised base"
FAMILIES = {
    "split": "the factors of a split of the weight",
    "core": "a core between frozen bases",
    "data": "factors started from data",
    "low-rank": "a low-rank update that starts at zero, or beside the weight",
    "shared": "tensors that several sites share",
    "transform": "another function of the weight",
    "base": "parameters of the base, or values in their place",
}
SECTIONS = ("When to use", "Paper and code", "Args", "Returns", "Raises", "Example")


@dataclass(frozen=True)
class Card:
    """What is said of a method: everything comes from its class.

    Args:
        name: in the registry.
        family: one of ``FAMILIES``, by what trains.
        title: its name and one sentence.
        formula: in plain text, as the file begins.
        citation: the source in one line.
        summary: first line of the class, and the paragraphs after it.
        sections: of the class's docstring: "When to use", "Paper and code", "Args".
        trains: names of what trains.
        parameters: the formula of the number of values.
        values: their number at one 4096×4096 layer with the defaults; ``None`` where a single layer has none.
        exact_start: whether the adapted model starts as the base model.
        export_rank: of the LoRA that holds the trained adapter, at 4096×4096; ``None`` where none does.
        kinds: layer kind -> why the method is not defined there, or ""; empty for methods that are not about kinds.
        works: on which kinds, in a few words.
        combines: what it can be combined with -> "yes", or why not.
    """

    name: str
    family: str
    cls: type[Method]
    title: str
    formula: str
    citation: str
    summary: str
    sections: dict[str, str]
    trains: str
    parameters: str
    values: int | None
    exact_start: bool
    export_rank: int | None
    kinds: dict[str, str]
    works: str
    combines: dict[str, str]


def card(name: str) -> Card:
    """Return the card of a method.

    Raises:
        ValueError: no method has that name.

    Example:
        >>> card("lora").values, card("lora").export_rank
        (65536, 8)
    """
    cls = METHODS[name]
    own = cls.__doc__ or ""
    own = "" if own.startswith(f"{cls.__name__}(") else inspect.cleandoc(own)  # what a dataclass writes for itself
    module = inspect.getmodule(cls)
    about = ((module and module.__doc__) or "").strip()
    paragraphs = (about or cls.__name__).split("\n\n")
    summary, sections = _sections(own)
    shared: dict[str, Any] = {
        "name": name,
        "family": family(cls),
        "cls": cls,
        "title": paragraphs[0],
        "formula": paragraphs[1] if len(paragraphs) > 1 else "",
        "citation": paragraphs[-1].replace("\n", " ") if cls.reference and about else "",
        "summary": summary,
        "sections": sections,
    }
    if not issubclass(cls, PerSite):
        return Card(
            **shared,
            trains="the base",
            parameters="the sizes of what trains",
            values=None,
            exact_start=True,
            export_rank=None,
            kinds={},
            works="",
            combines={},
        )
    method = cls()
    site = Given("a weight", (1, SIDE, SIDE), 0, lambda: None)  # type: ignore[arg-type, return-value]
    kinds = {} if method.pairs else {kind.name: method.why_not(kind()) or "" for kind in KINDS.values()}
    missing = ", ".join(kind for kind, why in kinds.items() if why)
    resolved = method.at("a weight", SIDE, SIDE, clip=True)
    return Card(
        **shared,
        trains=", ".join(method.trains),
        parameters=_count(method),
        values=None if method.pairs else method.total([site]),
        exact_start=method.exact_start,
        export_rank=None if method.pairs else resolved.export_rank(SIDE, SIDE),
        kinds=kinds,
        works="pairs of attention weights" if method.pairs else f"all but {missing}" if missing else "all kinds",
        combines=_combines(cls),
    )


def family(cls: type[Method]) -> str:
    """Return the family that a method is filed under: what it says, or what follows from its tensors.

    Example:
        >>> from svdpeft.registry import METHODS
        >>> [family(METHODS[name]) for name in ("pissa", "svft", "vera", "oft", "full")]
        ['split', 'core', 'shared', 'transform', 'base']
    """
    if not issubclass(cls, PerSite) or issubclass(cls, Whole):
        return "base"
    method = cls()
    if method.family:
        return method.family
    if method.needs:
        return "data"
    if issubclass(cls, Transform):
        return "transform"
    if cls.group is not PerSite.group:
        return "shared"
    if not {"L", "A"} & set(method.trains):
        return "core"
    return "low-rank" if method.draws else "split"


def search(text: str = "", families: Sequence[str] = ()) -> list[Card]:
    """Return the cards of the methods whose name, description or source has a text, family by family.

    Args:
        text: in any case; every word of it must be there.
        families: the only ones that are looked at; all unless said.

    Raises:
        ValueError: there is no such family.

    Example:
        >>> [c.name for c in search("butterfly")]
        ['boft']
    """
    for each in families:
        if each not in FAMILIES:
            raise ValueError(f"no family is called {each!r}: {near_miss(each, FAMILIES)}")
    words, cards = text.casefold().split(), [card(name) for name in METHODS]
    found = [c for c in cards if all(word in _text(c) for word in words) and c.family in (families or FAMILIES)]
    return sorted(found, key=lambda c: list(FAMILIES).index(c.family))


def _text(c: Card) -> str:
    """What is searched."""
    return " ".join((c.name, c.cls.__name__, c.title, c.summary, c.citation, *c.sections.values())).casefold()


def _quantised(cls: type[PerSite]) -> str:
    """What becomes of it where the weights of linear layers are quantised."""
    if cls.pairs or cls().why_not(KINDS["linear"]()):
        return "it is not defined on a linear layer alone, the only one that is quantised"
    if cls.needs == "gradients":
        return "yes, calibrated before the model is quantised"
    return "yes, on the dequantised weight" + (", which every forward makes" if not issubclass(cls, Factored) else "")


def _count(method: PerSite) -> str:
    """The number of values as a formula: a method's own words, or what follows from the factors that train."""
    if type(method).count is not Factored.count:
        return (inspect.getdoc(type(method).count) or "").split("\n")[0]
    sizes = [size for factor, size in {"L": "m", "A": "n", "C": "1"}.items() if factor in method.trains]
    each = f"r ({' + '.join(sizes)})" if len(sizes) > 1 else f"r {sizes[0]}".removesuffix(" 1")
    default = getattr(method, "rank", 0) is None and type(method).default_rank is Factored.default_rank  # type: ignore[attr-defined]
    return f"{each} per matrix{', min(m, n) with the default' if default else ''}."


def _sections(doc: str) -> tuple[str, dict[str, str]]:
    """Take a docstring apart: what comes first, and its sections, an entry to a line."""
    found: dict[str, list[str]] = {"": []}
    here = ""
    for line in doc.replace("``", "`").split("\n"):
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            here = line[:-1]
            found[here] = []
        else:
            found[here].append(line)
    texts = {name: inspect.cleandoc("\n" + "\n".join(lines)).strip() for name, lines in found.items()}
    summary = "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in texts.pop("").split("\n\n"))
    return summary, {name: "\n".join(_entries(text)) for name, text in texts.items()}


def _entries(text: str) -> list[str]:
    """Join lines that were broken: a deeper one, and one after a line that does not end a sentence."""
    entries: list[str] = []
    for line in text.split("\n"):
        if entries and (line.startswith(" ") or not entries[-1].endswith((".", ")", "`"))):
            entries[-1] += " " + line.strip()
        elif line.strip():
            entries.append(line.strip())
    return entries


def _combines(cls: type[PerSite]) -> dict[str, str]:
    """Try each combination."""
    fields = {f.name for f in inspect.signature(cls).parameters.values()}

    def attempt(make: Any) -> str:
        try:
            make()
        except (TypeError, ValueError) as error:
            return str(error).removeprefix("rs=True: ")
        return "yes"

    if "inner" in fields:
        own = {"DoRA(…) on top": attempt(lambda: DoRA(cls())), QUANTISED: _quantised(cls)}
        return {**dict.fromkeys(_combines(LoRA), "as its inner method"), **own}

    ranked = "rank" in fields
    return {
        "DoRA(…) on top": attempt(lambda: DoRA(inner=cls())),
        "a rank per site, rank={pattern: r}": attempt(lambda: cls(rank={".*": 4})) if ranked else "it has no rank",  # type: ignore[call-arg]
        "rank-stabilised scale, rs=True": attempt(lambda: cls(rs=True)) if "rs" in fields else "it has no scale",  # type: ignore[call-arg]
        "allocate=Budget(…)": attempt(lambda: cls(allocate=Budget(target_rank=2)))  # type: ignore[call-arg]
        if "allocate" in fields
        else "its update is not a sum of triplets that can be dropped one by one",
        QUANTISED: _quantised(cls),
        "weights tied in the model": "yes, one shared adapter where all users are named",
    }
