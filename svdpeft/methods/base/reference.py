"""Where a method was published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """Where a method was published.

    Args:
        key: BibTeX key.
        authors: names joined by " and ", as BibTeX wants them.
        title: title of the paper.
        year: year of publication.
        venue: conference or journal; "arXiv preprint" for a preprint.
        arxiv: arXiv identifier, or "" where there is none.
    """

    key: str
    authors: str
    title: str
    year: int
    venue: str = "arXiv preprint"
    arxiv: str = ""

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        kind, field = ("article", "journal") if self.venue == "arXiv preprint" else ("inproceedings", "booktitle")
        rows = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            field: self.venue,
            "year": str(self.year),
        }
        if self.arxiv:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in rows.items())
        return f"@{kind}{{{self.key},\n{body}\n}}"
