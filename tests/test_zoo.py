"""The zoo: every method has a card, a page and a picture, made from its class and not out of date."""

import inspect
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser
from typer.testing import CliRunner

import svdpeft
from svdpeft.cli import app
from svdpeft.methods.base import PerSite
from svdpeft.registry import KINDS, METHODS
from svdpeft.zoo import FAMILIES, card, family

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "methods"
build = runpy.run_path(str(ROOT / "docs" / "build.py"))
every_name = pytest.mark.parametrize("name", list(METHODS))


@every_name
def test_a_method_says_what_it_is(name):
    c = card(name)
    assert c.title.endswith((".", ")")), "a name and one sentence"
    assert "W' = " in c.formula
    assert len(c.sections["When to use"]) > 80
    assert c.cls.latex, "the formula for the page"
    MathTextParser("path").parse(f"${build['drawable'](c.cls.latex)}$")  # raises where it is not LaTeX
    for field in inspect.signature(c.cls).parameters:
        assert f"{field}:" in c.sections.get("Args", ""), f"{field} is not described"
    if c.cls.reference is None:
        assert name in ("full", "partial", "head-only")
        return
    assert c.cls.reference.bibtex().startswith("@")
    assert c.cls.reference.title.split(":")[0] in c.citation
    if issubclass(c.cls, PerSite):
        assert c.parameters.endswith("."), "the first line of count() is the formula"
        assert set(c.kinds) == (set() if c.cls.pairs else {kind.name for kind in KINDS.values()})


@every_name
def test_a_method_supports_the_kinds_that_its_card_lists(name):
    c = card(name)
    for kind, why in c.kinds.items():
        assert (c.cls().why_not(KINDS[kind]()) is None) == (not why)
        assert not why or kind in why, "the reason names the kind"


@every_name
def test_the_page_of_a_method_is_there_and_up_to_date(name):
    page, picture = PAGES / f"{name}.md", PAGES / f"{name}.svg"
    assert page.is_file(), f"{name} has no page: run make docs"
    assert picture.is_file(), f"{name} has no picture: run make docs"
    assert page.read_text() == build["page"](name), f"the page of {name} is out of date: run make docs"


def test_the_index_is_up_to_date_and_nothing_is_left_over():
    assert (PAGES / "README.md").read_text() == build["index"](), "run make docs"
    assert {file.stem for file in PAGES.iterdir()} == {*METHODS, "README"}


@every_name
def test_the_card_on_the_command_line(name):
    result = CliRunner().invoke(app, ["methods", name])
    assert result.exit_code == 0, result.output
    assert card(name).title.split()[0] in result.output


def test_the_card_of_a_method_that_says_nothing_of_itself(monkeypatch):
    """A plug-in's, say: no signature in the place of a description, no lines without words."""

    @dataclass(frozen=True)
    class Mine(svdpeft.LoRA):
        pass

    Mine.__module__ = "somebody.s"  # whose module is not there
    Mine.name = "mine"
    Mine.__doc__ = "Mine(rank: 'int' = 8)"  # what a dataclass writes where nothing is written
    monkeypatch.setitem(METHODS._classes, "mine", Mine)
    result = CliRunner().invoke(app, ["methods", "mine"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Mine\n\nAt a glance\n")
    assert "\n\n\n" not in result.output


def test_the_table_on_the_command_line():
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    for name in METHODS:
        assert name in result.output
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).output)
    assert sorted(row["name"] for row in listed) == sorted(METHODS)
    assert [row["family"] for row in listed] == sorted((row["family"] for row in listed), key=list(FAMILIES).index)
    lora = next(row for row in listed if row["name"] == "lora")
    assert (lora["values"], lora["export_rank"], lora["exact_start"]) == (8 * 8192, 8, True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["--family", "shared", "--search", "random"], ["randlora", "vera"]),
        (["--search", "givens butterfly"], []),
        (["--search", "BUTTERFLY"], ["boft"]),
        (["--search", "2409.00055"], ["sorsa"]),
    ],
    ids=str,
)
def test_methods_are_found_by_family_and_by_words(asked, expected):
    result = CliRunner().invoke(app, ["methods", "--json", *asked])
    if not expected:
        assert result.exit_code == 2
        assert "no method has 'givens butterfly'" in result.output
        return
    assert {row["name"] for row in json.loads(result.output)} >= {*expected}
    assert len(json.loads(result.output)) < 5


def test_a_family_that_does_not_exist_is_named():
    result = CliRunner().invoke(app, ["methods", "--family", "cores"])
    assert result.exit_code == 2
    assert "no family is called 'cores': did you mean 'core'?" in result.output


def test_every_method_has_a_family_that_its_tensors_tell():
    families = {name: family(METHODS[name]) for name in METHODS}
    assert {*families.values()} == {*FAMILIES}
    for name in METHODS:
        cls = METHODS[name]
        if families[name] in ("split", "low-rank"):
            assert {"L", "A"} & set(cls().trains)
        if families[name] == "data":
            assert cls().needs


def test_citations_on_the_command_line():
    result = CliRunner().invoke(app, ["cite", "sorsa", "pissa", "sorsa"])
    assert result.exit_code == 0
    assert result.output.strip() == svdpeft.cite("sorsa", "pissa")
    assert result.output.count("@") == 2
    wrong = CliRunner().invoke(app, ["cite", "sorza"])
    assert wrong.exit_code == 2
    assert "did you mean 'sorsa'" in wrong.output
