"""Files of every other reader with something wrong in them: each is read, or refused by the error that is documented.

    python tests/torture/readers.py EXAMPLES [READER ...]

GGUF is written and never read.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import assert_same, snapshot
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from report_records import store
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torture.damage import MEMORY, changed, peak

import svdpeft
from svdpeft.compare import report
from svdpeft.compare.reading import read_spec
from svdpeft.compare.store import Store
from svdpeft.decomposition import svd_cache, truncated_svd
from svdpeft.finetuning.order import read_order
from svdpeft.folders.folder import Folder
from svdpeft.models import rwkv
from svdpeft.training.resume import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Args:
        write: puts whole files into a folder, which it makes.
        read: reads them; what it raises for damaged ones is a ``ValueError``, or an ``OSError`` of a file that cannot
            be opened.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]


def plain() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4))


def remembering() -> svdpeft.Adapter:
    adapter = svdpeft.attach(plain(), svdpeft.SORSA(rank=2, gamma={"target": 0.1}), ["0"])
    adapter.sites["0"].factors.memory["x"] = torch.ones(1)
    return adapter


def calibration(path: Path) -> None:
    path.mkdir()
    seen = svdpeft.calibrate(plain(), [torch.ones(3, 6)], gradients=True, loss=lambda y, _: y.square().sum())
    seen.save(path / "seen.safetensors")


def cached(path: Path) -> None:
    with svd_cache(path):
        found = truncated_svd(matrix(), 2)
    assert all(map(torch.equal, found, truncated_svd(matrix(), 2)))


def matrix() -> torch.Tensor:
    return torch.arange(20.0).reshape(5, 4).sin()


def report_of(path: Path) -> None:
    results = report.read(Store(path))
    report.markdown(results), report.page(results), report.table_csv(results)


def model_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.ones(3, 4)}, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 96}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def text(name: str, content: str, path: Path) -> None:
    path.mkdir()
    (path / name).write_text(content)


def tensors_of(path: Path) -> None:
    folder = Folder(path)
    for name in folder.entries:
        folder.tensor(name)


def official(path: Path) -> None:
    path.mkdir()
    state = {"emb.weight": torch.ones(9, 4), "blocks.0.att.key.weight": torch.ones(4, 4)}
    torch.save(
        state | {"blocks.0.ffn.key.weight": torch.ones(8, 4), "blocks.0.att.r_k": torch.ones(2, 2)}, path / "x.pth"
    )


def keeping(read: Callable[[nn.Module, Path], object], build: Callable[[], nn.Module]) -> Callable[[Path], None]:
    """A reader into a model, which is as it was after an error."""

    def look(path: Path) -> None:
        model = build()
        before = snapshot(model)
        try:
            read(model, path)
        except ValueError:
            assert_same(before, snapshot(model))
            raise

    return look


def training(path: Path) -> None:
    adapter = remembering()
    keeping(lambda _, where: load_checkpoint(adapter, where), lambda: adapter.model)(path)


ORDER = """
model = "smollm2-135m"
task = "wordproblems"
lr = 1e-3
epochs = 2
method = "lora:rank=8"
option = {train_size = 10}
"""
COMPARED = """
model = "efficientnet-lite0"
seeds = [0, 1]
budgets = ["1%"]
methods = ["lora:alpha=4", {name = "sorsa", gamma = 1e-4}]
[search]
trials = 5
[task_options]
train_size = 50
"""
READERS = {
    "calibration": Reader(calibration, lambda path: svdpeft.Calibration.load(path / "seen.safetensors")),
    "training": Reader(lambda path: save_checkpoint(remembering(), path), training),
    "cache": Reader(cached, cached),
    "comparison": Reader(lambda path: store(path, count=2, seeds=2, steps=4, items=5), report_of),
    "order": Reader(partial(text, "order.toml", ORDER), lambda path: read_order(path / "order.toml", {})),
    "specification": Reader(partial(text, "spec.toml", COMPARED), lambda path: read_spec(path / "spec.toml")),
    "rwkv": Reader(official, lambda path: rwkv.read(path / "x.pth")),
    "peft": Reader(
        lambda path: svdpeft.export_lora(svdpeft.attach(plain(), svdpeft.LoRA(rank=2), ["0"]), path),
        keeping(svdpeft.import_peft, plain),
    ),
    "model-folder": Reader(model_folder, tensors_of),
}


def damage(draw: Any, file: Path) -> None:
    """Change values of JSON, of the file or of its metadata, or bytes, in place."""
    if file.suffix == ".json" and draw(st.booleans()) and isinstance(value := _json(file), dict | list):
        for _ in range(draw(st.integers(1, 3))):
            changed(draw, value)
        file.write_text(json.dumps(value))
        return
    if file.suffix == ".safetensors" and draw(st.booleans()) and (metadata := _metadata(file)):
        key = draw(st.sampled_from(sorted(metadata)))
        try:
            value = {"": json.loads(metadata[key])}
        except ValueError:
            value = {"": metadata[key]}
        for _ in range(draw(st.integers(1, 3))):
            changed(draw, value)
        save_file(load_file(file), file, metadata=metadata | {key: json.dumps(value.get(""))})
        return
    data = bytearray(file.read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, 200) | st.integers(0, len(data)))
        how = draw(st.sampled_from(["turn", "turn", "text", "cut", "more"]))
        if how == "cut":
            del data[place:]
        elif how == "more":
            data[place:place] = draw(st.binary(max_size=20))
        elif place < len(data):
            data[place] = (
                draw(st.integers(0, 255)) if how == "turn" else draw(st.sampled_from(b'0123456789"[]{},:=.e-'))
            )
    file.write_bytes(data)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError:  # damaged before
        return None


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError:  # damaged before
        return {}


def files_of(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file() and each.stat().st_size)


def survives(reader: Reader, whole: Path, draw: Any) -> None:
    """One folder with one or two damaged files."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(temporary) / "files"
        shutil.copytree(whole, path)
        for _ in range(draw(st.integers(1, 2))):
            if files := files_of(path):
                damage(draw, draw(st.sampled_from(files)))
        with suppress(ValueError, OSError):
            reader.read(path)


def damaged(reader: Reader, whole: Path, examples: int) -> None:
    """So many examples of one reader."""

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.data())
    def run(data: Any) -> None:
        survives(reader, whole, data.draw)

    run()


def main(examples: int, *names: str) -> None:
    """So many for each reader; what was drawn is told where one fails."""
    least, failed, began = peak(), [], time.monotonic()
    for name in names or READERS:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            READERS[name].write(whole := Path(temporary) / "files")
            try:
                damaged(READERS[name], whole, examples)
            except Exception:
                failed.append(name)
                traceback.print_exc()
        print(f"{name}: {examples} examples in {time.monotonic() - begun:.0f} s", flush=True)
    assert not failed, failed
    assert peak() < least + MEMORY, f"{(peak() - least) / 2**20:.0f} MiB for a small file"
    told = f"{time.monotonic() - began:.0f} s, each read or refused, {(peak() - least) / 2**20:.0f} MiB at most"
    print(f"{len(names or READERS)} other readers: {examples} damaged of each in {told}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), *sys.argv[2:])
