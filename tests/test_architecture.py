"""The shape of the code: imports point one way, a method is a short file, importing the library is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from svdpeft.registry import METHODS

PACKAGE = Path(__file__).parent.parent / "svdpeft"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down: a file may import from its own tier and from every tier below.
TIERS = [
    {"cli"},
    {"compare"},
    {"training", "tasks", "analysis", "interop", "zoo"},
    {"models"},
    {"checkpoint"},
    {"install", "calibration"},
    {"adapter"},
    {"targets"},
    {"summary"},
    {"inventory", "reach", "steering", "pairs"},
    {"sites"},
    {"per_example"},
    {"reads"},
    {"readers"},
    {"weights"},
    {"methods", "layers"},
    {"allocation", "schedules"},
    {"factors"},
    {"decomposition"},
    {"registry", "patterns"},
]
# Imports against the flow: for a type annotation alone, and the adapter's convenience `save`.
AGAINST = {("summary", "adapter"), ("per_example", "adapter"), ("reads", "sites"), ("adapter", "checkpoint")}


def part(file: Path) -> str:
    """``svdpeft/methods/lora.py`` -> ``methods``."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> set[str]:
    """The parts of svdpeft that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("svdpeft.")}
    return found


def tier(name: str) -> int:
    return next(i for i, names in enumerate(TIERS) if name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    here = part(file)
    if here == "__init__":
        return
    for there in imported(file) - {"__version__"}:
        if there == here or (here, there) in AGAINST:
            continue
        assert tier(there) >= tier(here), f"{here} imports {there}, which is above it"
        assert {here, there} != {"methods", "layers"}


def test_every_file_has_a_tier():
    assert {part(file) for file in FILES} - {"__init__"} == set().union(*TIERS)


def test_methods_and_kinds_are_short_and_files_can_be_read():
    for file in FILES:
        lines = len(file.read_text().splitlines())
        method = part(file) in ("methods", "layers") and file.name not in ("base.py", "__init__.py")
        assert lines <= (200 if method else 430), f"{file.name} has {lines} lines"


def test_a_method_begins_with_its_formula_and_its_source():
    for cls in METHODS.values():
        text = ast.get_docstring(ast.parse(Path(sys.modules[cls.__module__].__file__).read_text()))
        if cls.factored:
            assert "W' = " in text.split("\n\n")[1], f"{cls.__name__}: the formula comes first"
            assert cls.reference.arxiv in text
            assert cls.reference.title.split(":")[0] in text
            assert cls.reference.key in cls.reference.bibtex()


def test_importing_the_library_is_light():
    code = "import sys, svdpeft; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "timm", "matplotlib", "accelerate", "onnx", "torchvision"} & set(loaded)


def test_the_command_line_starts_light():
    code = "import sys, svdpeft.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "timm", "matplotlib"} & set(loaded)
