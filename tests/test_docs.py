"""The code in the README and in the documentation runs as it is printed."""

import re
import sys
from pathlib import Path

import pytest

from svdpeft.registry import KINDS, METHODS, TASKS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, KINDS, TASKS):  # what a page registers or writes does not outlive it
        list(registry)
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    names = {"__name__": page.stem}
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, page.name, "exec"), names)
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


def test_links_to_files_are_not_dead():
    for page in PAGES:
        text = re.sub(r"`[^`\n]+`", "", page.read_text())  # layers[0](x) is no link
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_number_of_methods_is_of_today(page):
    words = {"fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
    (said,) = re.findall(r"more than (\w+)(?: other)? methods", (ROOT / page).read_text())
    assert words[said] < len(list(METHODS)) <= words[said] + 10
