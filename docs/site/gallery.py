"""The gallery: a card per method, made from its class while the site is built. `static/gallery.js` filters them."""

from __future__ import annotations

from typing import Any

from svdpeft.zoo import FAMILIES, Card, search

CARD = """\
:::{{grid-item-card}} {name}
:link: methods/{page}
:link-type: doc
:img-top: methods/{page}.svg
:img-alt: ""
:class-item: method {family} {start} {rank}

{sentence}

{facts}
:::
"""


def cards() -> str:
    """All of them in MyST, family by family."""
    lines = []
    for family, what in FAMILIES.items():
        lines += [f"## {what[0].upper()}{what[1:]}", "::::{grid} 1 2 2 3", ":gutter: 3", ""]
        lines += [*map(_card, search(families=[family])), "::::", ""]
    return "\n".join(lines)


def _card(c: Card) -> str:
    title, _, sentence = c.title.partition(": ")
    sentence = (sentence or title).replace("\n", " ")
    source = c.cls.reference
    facts = [
        f"{c.trains}: {c.values:,} values" if c.values else c.trains,
        f"a LoRA of rank {c.export_rank}" if c.export_rank else "no LoRA",
        f"{source.authors.split(',')[0]} {source.year}" if source else "",
    ]
    return CARD.format(
        name=c.cls.__name__,
        page=c.name,
        family=c.family,
        start="exact" if c.exact_start else "moved",
        rank=f"rank-{c.export_rank or 'none'}",
        sentence=sentence[0].upper() + sentence[1:],
        facts="; ".join(filter(None, facts)),
    )


def _fill(app: Any, name: str, source: list[str]) -> None:
    if name == "docs/gallery":
        options = "".join(f'<option value="{family}">{what}</option>' for family, what in FAMILIES.items())
        text = source[0].replace("<!-- an option per family -->", options)
        source[0] = text.replace("<!-- a card per method -->", cards())


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
