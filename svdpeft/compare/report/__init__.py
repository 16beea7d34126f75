"""From a store to a table, Markdown, CSV, pictures and one page: what was measured, and what it does not show."""

from __future__ import annotations

from svdpeft.compare.records import finished
from svdpeft.compare.report.page import page
from svdpeft.compare.report.pictures import curves, picture
from svdpeft.compare.report.results import Results, Row, read
from svdpeft.compare.report.tables import table_csv
from svdpeft.compare.report.text import markdown, terminal
from svdpeft.compare.store import Store

__all__ = [
    "Results",
    "Row",
    "curves",
    "finished",
    "markdown",
    "page",
    "picture",
    "read",
    "table_csv",
    "terminal",
    "write",
]


def write(store: Store, metric: str | None = None) -> Results:
    """Write the report of a comparison beside its runs, and return what it was made from.

    ``report.md``, ``report.html``, ``results.csv`` and, where a run ended well, ``report.png`` and ``loss.png``. The
    same records give the same bytes.

    Args:
        store: of the comparison.
        metric: that methods are ranked by; ``None`` is the task's own.

    Raises:
        ValueError: the store holds no run, or none was judged by the metric.
    """
    results = read(store, metric)
    store.write_text("results.csv", table_csv(results))
    store.write_text("report.md", markdown(results))
    store.write_text("report.html", page(results))
    if results.rows:
        store.write_bytes("report.png", picture(results))
        store.write_bytes("loss.png", curves(results))
    return results
