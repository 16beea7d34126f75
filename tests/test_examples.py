"""The scripts in examples/ run, without a warning, and do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LIGHT, perturb
from rows import EVERYTHING
from test_commands import one_block

import svdpeft

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["one_block"]  # a fixture
EXAMPLES = Path(__file__).parent.parent / "examples"
others = pytest.mark.filterwarnings("ignore")  # what the trainers of others warn of
pytestmark = pytest.mark.apart  # the libraries and models of others go with the process
Here = Callable[..., str]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Here:
    """Run a script in this process, where torch and transformers are imported already; what it has printed."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_scientific_computing(here: Here, tmp_path: Path):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    printed = here("scientific_computing.py", "--quick", "--json", numbers, "--plot", picture)
    record = json.loads(numbers.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    pretrained = rows.pop("pretrained")
    assert rows.keys() == {"SORSA", "PiSSA", "LoRA", "SVFT", "full"}
    for row in rows.values():
        assert row["new"][0] < pretrained["new"][0]
    factored = [row["trainable"] for name, row in rows.items() if name != "full"]
    assert max(factored) < 1.02 * min(factored)
    assert max(record["reference"].values()) < 1e-6  # two ways to solve the equation agree
    (difference,) = re.findall(r"largest difference in float64: (\S+)", printed)
    assert float(difference) < 1e-12
    assert record["promises"]["detached"]
    assert record["promises"]["loaded"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "picture.png"]


def test_ship(here: Here, tmp_path: Path):
    printed = here("ship.py", "--out", tmp_path)
    told = re.findall(r"^(.*): largest difference (\S+)$", printed, re.M)
    assert len(told) == 5
    assert max(float(difference) for _, difference in told) < 1e-4
    assert {"model.pth", "model.pt2"} <= {path.name for path in tmp_path.iterdir()}


def test_own_pictures(here: Here, tmp_path: Path):
    printed = here("own_pictures.py", "--out", tmp_path / "adapter")
    (accuracy,) = re.findall(r"seen: (\S+);", printed)
    assert float(accuracy) > 0.9
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter.json", "adapter.safetensors"}


def losses(printed: str) -> list[float]:
    """Of the steps of ``svdpeft train``."""
    return [float(loss) for loss in re.findall(r"^step \d+/\d+: loss ([\d.]+)", printed, re.MULTILINE)]


def test_the_page_has_every_example():
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text()
    for script in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("trainers/*.py"), *EXAMPLES.glob("*/pyproject.toml")):
        assert f"](../examples/{script.relative_to(EXAMPLES)})" in page


# -- recipes


def test_own_jsonl(here: Here, one_block: Callable[[str], Path], tmp_path: Path):
    model = [] if EVERYTHING else ["--model", one_block("smollm2-135m")]
    printed = here("own_jsonl.py", *model, "--out", tmp_path, "--steps", 12)
    found = losses(printed)
    assert found[-1] < 0.9 * found[0]
    assert re.search(r"^loss +[\d.]+ .* 4 *$", printed, re.MULTILINE)  # of the held-out questions
    before, after = re.findall(r"(?:Before|After): (.*)$", printed, re.MULTILINE)
    assert before != after


def test_classify_texts(here: Here, tmp_path: Path):
    printed = here("classify_texts.py", "--out", tmp_path, "--epochs", 3)
    ((accuracy, count),) = re.findall(r"^accuracy +([\d.]+) .* (\d+) *$", printed, re.MULTILINE)
    assert float(accuracy) > 0.8
    assert int(count) == 24


def test_rwkv_file(here: Here, tmp_path: Path):
    printed = here("rwkv_file.py", "--out", tmp_path)
    found = losses(printed)
    assert found[-1] < found[0] - 0.5
    assert "the 42 tensors of the base, by their names" in printed
    assert (tmp_path / "merged.pth").is_file()


def test_several_adapters(here: Here, tmp_path: Path):
    printed = here("several_adapters.py", "--out", tmp_path)
    assert {name: float(a) for name, a in re.findall(r"^(\w+): accuracy ([\d.]+)$", printed, re.MULTILINE)} == {
        "colour": 1.0,
        "bright": 1.0,
    }
    assert "as each alone" in printed
    assert "'both', LoRA(rank=12)" in printed  # 2 × 4 of SORSA and 4, or fewer, of PiSSA and LoRA


@others
def test_serve(here: Here, tmp_path: Path):
    printed = here("serve.py", "--out", tmp_path)
    off, change = map(
        float, re.findall(r"at most (\S+), where the adapter changes them by (\S+)$", printed, re.MULTILINE)[0]
    )
    assert change > 0.05
    assert off < 1e-3 * change
    assert "rank 16 to 16" in printed
    assert (tmp_path / "adapter.gguf").read_bytes().startswith(b"GGUF")
    assert f"--max-lora-rank 16 --lora-modules mine={tmp_path / 'lora'}" in printed


def installed(folder: Path) -> dict[str, str]:
    """An environment in which the plug-in is found as pip would have installed it: its code, and its entry points."""
    project = tomllib.loads((EXAMPLES / "plugin" / "pyproject.toml").read_text())["project"]
    about = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    )
    (about / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(LIGHT), str(folder), str(EXAMPLES / "plugin"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_plug_in_is_found_without_editing_anything(tmp_path: Path):
    environment = installed(tmp_path)
    program = "import sys; from svdpeft.cli import app; app(sys.argv[1:], prog_name='svdpeft')"

    def say(*words: str, **more: str) -> str:
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ask = {"_SVDPEFT_COMPLETE": "complete_bash", "COMP_WORDS": "svdpeft methods mino", "COMP_CWORD": "2"}
    assert say(**ask).split() == ["minor"]
    told = say(
        *("train", "--model", "svdpeft_example.sides:net", "--task", "sides"),
        *("--method", "minor:rank=2", "--epochs", "4", "--out", "mine", "--json"),
    )
    assert json.loads(told.splitlines()[-1])
    assert json.loads((tmp_path / "mine" / "adapter.json").read_text())


# -- trainers of others


def test_bare_loop(here: Here):
    printed = here("trainers/bare_loop.py")
    first, last = map(float, re.findall(r"^step \d+: loss ([\d.]+)$", printed, re.MULTILINE))
    assert last < 0.8 * first
    assert "right: 8 of 8" in printed


def test_stock_trainer(here: Here, tmp_path: Path):
    printed = here("trainers/stock_trainer.py", "--out", tmp_path)
    assert "after 3 4 5 6: 7" in printed
    assert "checkpoint-40/adapter: adapter.json, adapter.safetensors" in printed


@others
def test_trl(here: Here, tmp_path: Path):
    pytest.importorskip("trl", reason="trl is not installed")
    printed = here("trainers/trl_sft_dpo.py", "--out", tmp_path)
    rows = re.findall(r"^(\w+): +red ([\d.]+), blue ([\d.]+), green ([\d.]+)$", printed, re.MULTILINE)
    chances = {name: [float(c) for c in row] for name, *row in rows}
    assert list(chances) == ["base", "sft", "dpo"]
    assert min(chances["sft"][:2]) > 0.3  # both answers were shown
    assert chances["sft"][2] < 0.05
    assert chances["dpo"][1] > 0.7  # and blue was preferred


@others
def test_the_reference_of_dpo_is_the_model_without_the_adapter(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    names = runpy.run_path(str(EXAMPLES / "trainers" / "trl_sft_dpo.py"))
    rows = [{"prompt": "say a colour", "chosen": " blue <eos>", "rejected": " red <eos>"}] * 6
    given = {
        "args": trl.DPOConfig(**names["settings"](tmp_path), precompute_ref_log_probs=True),
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": names["tokenizer"](),
    }
    adapter = svdpeft.attach(names["llama"](), svdpeft.LoRA(rank=4), "all-linear")
    perturb(adapter)
    adapted, base = names["DPO"](adapter, **given), trl.DPOTrainer(names["llama"](), **given)
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        found, expected = (next(iter(trainer.get_train_dataloader()))[side] for trainer in (adapted, base))
        torch.testing.assert_close(found, expected)


@others
def test_lightning(here: Here, tmp_path: Path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    printed = here("trainers/lightning_loop.py", "--out", tmp_path)
    assert "accuracy 1.00" in printed
    saved, whole = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) KiB", printed))
    assert saved < whole / 5


def test_timm(here: Here, tmp_path: Path):
    printed = here("trainers/timm_loop.py", "--out", tmp_path / "adapter")
    assert "accuracy of the average 1.00" in printed
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter.json", "adapter.safetensors"}


@others
def test_diffusion(here: Here, tmp_path: Path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    printed = here("trainers/diffusion_unet.py", "--out", tmp_path)
    start, end = map(float, re.findall(r"loss ([\d.]+) at the start, ([\d.]+) at the end", printed)[0])
    assert end < 0.6 * start
    assert (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
