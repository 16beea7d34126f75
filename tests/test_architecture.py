"""The shape of the code: imports point one way, a method is a short file, importing the library is light."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from svdpeft.registry import METHODS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "svdpeft").rglob("*.py"))

# From the top down: a file may import from its own part, and from the parts of every tier below. Parts of one tier know
# nothing of each other.
TIERS = [
    ("cli",),
    ("compare",),
    ("finetuning",),
    ("",),  # the face of the library: what lies above uses it as anybody does
    ("interop", "folders"),
    ("tasks",),
    ("training", "models", "analysis", "calibration", "zoo"),
    ("adapter",),
    ("targets",),
    ("sites",),
    ("methods", "layers"),
    ("decomposition",),
    ("patterns",),
    ("atomic", "bars", "registry"),
]
ARROWS = 109  # between parts: a new one is a decision, and docs/architecture.md says the number
LONGEST = 350  # lines of a file
LONGER = {"svdpeft.adapter.adapter": 515}  # half of it are the docstrings of what users call


def module(file: Path) -> str:
    """``svdpeft/methods/lora.py`` -> ``svdpeft.methods.lora``; a package goes by its own name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def part(name: str) -> str:
    """``svdpeft.methods.lora`` -> ``methods``."""
    return name.split(".")[1] if "." in name else ""


@cache
def imported(name: str) -> frozenset[str]:
    """The modules of the library that one imports: inside functions, and for annotations alone, too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found & MODULES.keys())


def arrows() -> set[tuple[str, str]]:
    """(importing part, imported part), each once; the face of the library is no part."""
    return {(part(a), part(b)) for a in MODULES if part(a) for b in imported(a) if part(b) and part(a) != part(b)}


def tier(name: str) -> int:
    return next(i for i, names in enumerate(TIERS) if name in names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    for there in imported(name):
        below = tier(part(there)) > tier(part(name)) or part(there) == part(name)
        assert below, f"{name} imports {there}, which is not below it"


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imported(name) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_arrow_between_parts_comes_unnoticed():
    found = {arrow for arrow in arrows() if all(arrow)}
    assert len(found) == ARROWS
    assert f"{ARROWS} arrows" in (ROOT / "docs" / "architecture.md").read_text()


def test_every_part_has_a_tier_and_nothing_lies_loose():
    assert {part(name) for name in MODULES} == {name for names in TIERS for name in names}
    loose = {file.stem for file in FILES if file.parent == ROOT / "svdpeft"}
    assert loose == {"__init__", "atomic", "bars", "registry", "patterns", "zoo"}


def test_methods_and_kinds_are_short_and_files_can_be_read():
    for name, file in MODULES.items():
        lines = len(file.read_text().splitlines())
        method = name.startswith(("svdpeft.methods.", "svdpeft.layers.")) and ".base" not in name
        assert lines <= (200 if method else LONGER.get(name, LONGEST)), f"{name} has {lines} lines"


def test_a_method_begins_with_its_formula_and_its_source():
    for cls in METHODS.values():
        text = ast.get_docstring(ast.parse(Path(sys.modules[cls.__module__].__file__).read_text()))
        if cls.factored:
            assert "W' = " in text.split("\n\n")[1], f"{cls.__name__}: the formula comes first"
            assert cls.reference.arxiv in text
            assert cls.reference.title.split(":")[0] in text
            assert cls.reference.key in cls.reference.bibtex()


def test_a_package_and_the_function_that_lists_it_go_by_one_name():
    code = "import svdpeft, svdpeft.methods.lora; print(svdpeft.methods.lora.LoRA is svdpeft.LoRA, *svdpeft.methods())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["True", *METHODS]


def test_importing_the_library_is_light():
    code = "import sys, svdpeft; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "svdpeft" in loaded
    assert not {"torch", "transformers", "timm", "matplotlib", "accelerate", "onnx", "torchvision"} & set(loaded)


def test_attaching_is_light():
    code = "import sys, svdpeft; svdpeft.attach; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "timm", "matplotlib", "accelerate", "onnx", "torchvision"} & set(loaded)


def test_the_command_line_starts_light():
    code = "import sys, svdpeft.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "timm", "matplotlib"} & set(loaded)
