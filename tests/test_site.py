"""The site: it is built without a warning, its links lead somewhere, and in a browser its gallery searches and filters.

Where Sphinx is not installed nothing is built, and without the system's Chromium nothing is looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import browser, seen
from rows import covering

import svdpeft
from svdpeft.registry import METHODS
from svdpeft.zoo import card, family

for package in ("sphinx", "myst_parser", "sphinx_design", "pydata_sphinx_theme"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "svdpeft[docs]"')

ROOT = Path(__file__).parent.parent
__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.xdist_group("browser")  # one worker has it, and the site is built once
PAGES = ("index", "gallery", "methods/pissa", "api/attach")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where it is built."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-c", "docs", ".", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "SVDPEFT_INTERSPHINX"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr[-4000:]
    return out


class Links(HTMLParser):
    """The addresses in a page, and the places in it that one can lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses, self.places = set[str](), {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses |= {value for key, value in attrs if key in ("href", "src") and value}
        self.places |= {value for key, value in attrs if key == "id" and value}


def test_every_link_within_the_site_leads_somewhere(site):
    pages = {path: Links(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 100
    dead = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file() or (there in pages and unquote(parts.fragment) not in pages[there].places):
                dead.append(f"{path.relative_to(site)}: {address}")
    assert dead == []


def test_every_public_name_is_in_the_reference(site):
    places = set().union(*(Links(path).places for path in (site / "docs" / "api").glob("*.html")))
    missing = {*svdpeft.__all__, *svdpeft._LATE} - {place.rpartition(".")[2] for place in places}
    assert missing == set(), "name them in a page of docs/api"


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, site):
    """Open a page; at the end nothing may have gone wrong in it, and nothing been asked of another machine."""
    contexts, wrong, asked = [], [], []

    def open_page(name, query="", *, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "docs" / f"{name}.html").as_uri() + query)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def shown(page):
    """The methods whose cards are to be seen."""
    return {name.strip() for name in page.locator(".method:visible .sd-card-title").all_inner_texts()}


def field(page, label):
    return page.locator("#filter").get_by_label(label, exact=True)


def named(*wanted):
    return {METHODS[name].__name__ for name in wanted}


@seen
def test_the_gallery_has_a_card_for_every_method_and_filters_as_the_cards_of_the_zoo_say(opened):
    page = opened("gallery")
    assert shown(page) == named(*METHODS)
    field(page, "What trains").select_option("core")
    core = {name for name in METHODS if family(METHODS[name]) == "core"}
    assert shown(page) == named(*core)
    field(page, "Start").select_option("moved")
    moved = {name for name in core if not card(name).exact_start}
    assert shown(page) == named(*moved) != set()
    page.get_by_role("button", name="Reset").click()
    field(page, "Export").select_option("16")
    low = {name for name in METHODS if 0 < (card(name).export_rank or 0) <= 16}
    assert shown(page) == named(*low) != set()
    field(page, "Export").select_option("none")
    assert shown(page) == named(*(name for name in METHODS if card(name).export_rank is None)) != set()
    assert page.locator("output").inner_text() == f"{len(shown(page))} of {len(METHODS)} methods"


@seen
def test_the_gallery_is_searched_by_words_and_hides_families_of_which_nothing_is_left(opened):
    page = opened("gallery")
    families = page.locator("article section section:visible").count()
    assert families == 7
    field(page, "Search").fill("NYSTRÖM sketch")
    assert shown(page) == {"NLoRA"}
    assert page.locator("article section section:visible").count() == 1
    field(page, "Search").fill("meng 2024")
    assert shown(page) == {"PiSSA"}
    field(page, "Search").fill("no such method")
    assert shown(page) == set()
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("document.querySelectorAll('.method:not([hidden])').length > 1")
    assert shown(page) == named(*METHODS)


@seen
def test_a_filter_can_be_linked_to_and_a_card_leads_to_its_page(opened):
    page = opened("gallery", "?words=milora&start=exact")
    assert shown(page) == {"MiLoRA"}
    field(page, "Search").fill("psoft")
    page.wait_for_url("**/gallery.html?words=psoft&start=exact")
    page.locator(".method:visible .sd-card").click()
    assert page.locator("h1").inner_text().startswith("PSOFT")


@seen
def test_the_gallery_is_used_by_keyboard(opened):
    page = opened("gallery")
    field(page, "Search").focus()
    page.keyboard.type("sorsa")
    assert shown(page) == {"SORSA"}
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.textContent"))
    assert reached[:4] == ["family", "start", "rank", "Reset"]
    page.keyboard.press("Enter")
    page.wait_for_url("**/methods/sorsa.html")


@seen
@pytest.mark.parametrize(("name", "look"), covering(PAGES, [("light", 1280), ("dark", 360)]), ids=str)
def test_axe_finds_nothing_and_a_phone_scrolls_down_only(opened, name, look):
    scheme, width = look
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(name, width=width, scheme=scheme)
    found = axe.Axe().run(page, options={"preload": False}).response["violations"]  # a file is not asked for again
    assert [(v["id"], v["impact"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
