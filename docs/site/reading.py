"""What is read otherwise than it stands: links of the README, which pages include, docstrings, heads of tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes

LINK = re.compile(r"\]\((?!http|#)")
PROGRAM = re.compile(r"^(?=\s*>>>)", re.MULTILINE)
MARKUP = re.compile(r"``.+?``|[*|]|_\b", re.DOTALL)


def _links(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """The README is above the pages that include it."""
    content[0] = LINK.sub("](../", content[0])


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Shapes such as (*b, m, r) are no markup, and a formula that stands alone keeps its columns."""
    blocks, before = "\n".join(lines).split("\n\n"), " "
    for i, block in enumerate(blocks):
        if block.startswith("    ") and not before.startswith(" "):
            blocks[i] = f".. code-block:: text\n\n{block}"
        else:
            text, *program = PROGRAM.split(block, maxsplit=1)
            blocks[i] = "".join([MARKUP.sub(_plain, text), *program])
        before = block.rpartition("\n")[2]
    if what in ("attribute", "property"):
        blocks[0] = f"\\\n{blocks[0]}"  # nothing, where napoleon looks for "type: text"
    lines[:] = "\n\n".join(blocks).split("\n")


def _plain(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith("`") else f"\\{found[0]}"


def _headless(app: Any, doctree: nodes.document) -> None:
    """Markdown has no table without a head: one that says nothing is none, and an empty cell of one heads nothing."""
    for head in list(doctree.findall(nodes.thead)):
        if not head.astext().strip():
            head.parent.remove(head)
            continue
        for cell in list(head.findall(nodes.entry)):
            if not cell.astext().strip():
                cell.replace_self(nodes.raw("", "<td></td>", format="html"))


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("include-read", _links)
    app.connect("doctree-read", _headless)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
