"""The bill of materials: every file of others in the package, with version, licence, origin and hash, as CycloneDX."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from svdpeft.finetuning.words import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "svdpeft"
BILL = json.loads((ROOT / "sbom.cdx.json").read_text())
LIBRARIES = {each["bom-ref"]: each for each in BILL["components"]}
# What is ours and not Python; another file is to be named here or in the bill.
PAGE = "compare/report/page"
OURS = {
    *("py.typed", "compare/defaults.toml", f"{PAGE}/vendor/README.md"),
    *(f"{PAGE}/{name}" for name in ("app.js", "charts.js", "style.css", "template.html")),
}

every_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda each: each["name"])


def parts(library: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each for each in library["components"] if each["type"] == kind]


def test_every_file_of_others_is_named_with_its_hash():
    files = [each for library in LIBRARIES.values() for each in parts(library, "file")]
    named = {each["name"]: each["hashes"] for each in files}
    assert len(named) == len(files)
    there = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.relative_to(PACKAGE).as_posix() not in OURS
    }
    assert named == {name: [{"alg": "SHA-256", "content": digest}] for name, digest in there.items()}
    assert all((PACKAGE / name).is_file() for name in OURS)


@every_library
def test_a_library_has_a_version_a_licence_and_an_origin(library: dict[str, Any]):
    name = "/".join(filter(None, (library.get("group"), library["name"])))
    assert library["purl"] == f"pkg:npm/{name.replace('@', '%40')}@{library['version']}"
    assert {each["type"] for each in library["externalReferences"]} == {"vcs", "website"}
    ours = [ROOT / each["name"] for each in parts(library, "file")]
    (script,) = (path for path in ours if path.suffix == ".js")
    banner = script.read_text().partition("\n")[0]
    assert banner.endswith(f"v{library['version']} {library['copyright']}")
    (licence,) = (path for path in ours if path.name == f"LICENSE-{library['name']}")
    assert licence.read_text().startswith(f"{library['copyright']}\n\nPermission to use, copy, modify")


@every_library
def test_what_is_inside_a_library_has_its_licence_beside_it(library: dict[str, Any]):
    text = (PACKAGE / PAGE / "vendor" / "LICENSE-bundled").read_text()
    (script,) = (Path(each["name"]).name for each in parts(library, "file") if each["name"].endswith(".js"))
    inside = [each["name"] for each in parts(library, "library")]
    assert [f"{name}, in {script}" for name in inside] == [
        line for line in text.splitlines() if line.endswith(f", in {script}")
    ]


def test_it_is_cyclonedx():
    """What the schema of 1.6 asks for; all of it was held against that schema when it was written."""
    assert (BILL["bomFormat"], BILL["specVersion"], BILL["version"]) == ("CycloneDX", "1.6", 1)
    components = [BILL["metadata"]["component"], *BILL["components"]]
    components += [part for library in BILL["components"] for part in library["components"]]
    for each in components:
        assert each["name"]
        assert each["type"] in ("library", "file")
        assert each["type"] == "file" or all({"license", "expression"} & set(licence) for licence in each["licenses"])
    known = {each["bom-ref"] for each in components if "bom-ref" in each}
    assert {each["ref"] for each in BILL["dependencies"]} == known
    assert {ref for each in BILL["dependencies"] for ref in each.get("dependsOn", [])} <= known


def test_a_wheel_has_it():
    """``.dist-info/sboms``, from hatchling 1.28 on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["sbom-files"] == ["sbom.cdx.json"]
    assert project["build-system"]["requires"] == ["hatchling>=1.28"]


def test_it_has_the_licence_of_the_project():
    """An SPDX expression in the package's metadata (PEP 639), the same in the bill, and the files with the words."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert BILL["metadata"]["component"]["licenses"] == [{"license": {"id": project["license"]}}]
    files = {file.relative_to(ROOT) for pattern in project["license-files"] for file in ROOT.glob(pattern)}
    assert files - {Path("LICENSE")} == {
        Path(each["name"])
        for library in BILL["components"]
        for each in parts(library, "file")
        if "LICENSE" in each["name"]
    }
