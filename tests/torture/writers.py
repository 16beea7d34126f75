"""Each writer of the library, killed within a write again and again, or hindered by a full disk and a folder that may
not be written: every file is the old or the new, and is read.

    python tests/torture/writers.py FOLDER KILLS [WRITER ...]

Adapters, trainings and comparisons have programs of their own, ``saving``, ``training`` and ``comparing``.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot  # noqa: F401, before a fork that may write nowhere imports it
import torch
from folder_models import llama, moved, saved
from gguf import GGUFReader
from safetensors import SafetensorError, safe_open
from torch import nn
from torture.kills import Span, attempt, draws, no_room, read_only
from transformers import RwkvConfig, RwkvForCausalLM

import svdpeft
from svdpeft import folders
from svdpeft.analysis.plots import plot_spectrum
from svdpeft.analysis.tables import write_csv
from svdpeft.compare.store import Store
from svdpeft.decomposition import svd_cache, truncated_svd
from svdpeft.finetuning import train
from svdpeft.folders.folder import Folder
from svdpeft.models import cache, rwkv
from svdpeft.training.resume import load_checkpoint, save_checkpoint

LEFT = re.compile(r"\..+\.[a-z0-9_]{8}|\.comparison\.lock")  # what a write that was killed may leave, and a lock
DTYPES = {1: torch.float32, 2: torch.bfloat16}
HINDERED = 5  # times by a full disk, and as often by a folder that may not be written
WIDTH = 192  # of what is written: some hundred kilobytes


@dataclass(frozen=True)
class Writer:
    """What writes.

    Args:
        write: number 1 or 2 into a folder, in the place of the other where that is there.
        read: what is in it, as anybody would; raises where that is damaged.
        anew: it takes the place of nothing, so that what is there is deleted before it.
        whole: all files of it come at once.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]
    anew: bool = False
    whole: bool = False


def linear(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width)).requires_grad_(False)


@functools.cache
def adapted(number: int) -> svdpeft.Adapter:
    adapter = svdpeft.attach(linear(), svdpeft.SORSA(rank=8, gamma={"target": 0.1}), ["0"])
    with torch.no_grad():
        for site in adapter.sites.values():
            site.factors.L.add_(number)
            site.factors.memory["x"] = torch.full((1,), float(number))
    return adapter


@functools.cache
def seen(number: int) -> svdpeft.Calibration:
    return svdpeft.calibrate(linear(), [torch.full((3, WIDTH), float(number))])


@functools.cache
def language() -> svdpeft.Adapter:
    return moved(llama(), svdpeft.LoRA(rank=2), targets=["q_proj"])


def loaded(path: Path, number: int) -> nn.Module:
    """The model of ``language`` with an adapter in it, as it is before its ``save_pretrained``."""
    model = llama()
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=number), ["q_proj"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(number)
    return model


@functools.cache
def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2))


def files_of(path: Path) -> dict[str, str]:
    """What is in a folder, by name; the metadata of safetensors have no order."""
    return {
        str(each.relative_to(path)): _digest(each)
        for each in sorted(path.rglob("*"))
        if each.is_file() and each.suffix != ".lock" and not any(p[0] == "." for p in each.relative_to(path).parts)
    }


def _digest(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        with suppress(SafetensorError), safe_open(file, "pt") as opened:
            head = 8 + int.from_bytes(data[:8], "little")
            data = repr((sorted((opened.metadata() or {}).items()), sorted(opened.keys()))).encode() + data[head:]
    return hashlib.sha256(data).hexdigest()


def asset(path: Path, number: int) -> None:
    def fill(folder: Path) -> None:
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(bytes([number]) * 100_000)

    cache.root = lambda: path  # type: ignore[assignment]  in the fork alone
    cache.once("asset", fill)


def matrix(number: int) -> torch.Tensor:
    return torch.arange(WIDTH * (WIDTH - 50.0)).reshape(WIDTH, -1).add(number).sin()


def cached(path: Path, number: int) -> None:
    with svd_cache(path):
        truncated_svd(matrix(number), 4)


def cache_read(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (1, 2):
            cached(path, number)


def spec(number: int) -> dict[str, Any]:
    return {"spec": {"seeds": list(range(4)), "methods": [], "confidence": number / 10}}


def record(path: Path, number: int) -> None:
    Store(path).write("runs", "a", {"label": "a", "identity": {"seed": 0}, "values": [number] * 20_000})


def rows(number: int) -> list[dict[str, Any]]:
    return [{"site": f"s{i}", "step": i, "size": i * number} for i in range(3000)]


def drawn(path: Path, number: int) -> None:
    plot_spectrum({"a": torch.arange(9.0).add(number)}, path / "a.png")


WRITERS = {
    "Adapter.save": Writer(
        lambda path, n: adapted(n).save(path / "a"),
        lambda path: svdpeft.load(linear(), path / "a", verify=True),
    ),
    "save_pretrained, with a card": Writer(
        lambda path, n: svdpeft.save_pretrained(adapted(n), path / "a"),
        lambda path: (path / "a" / "README.md").exists() or svdpeft.load(linear(), path / "a", verify=True),
        anew=True,
    ),
    "save_pretrained of a model": Writer(
        lambda path, n: loaded(path, n).save_pretrained(path / "a"),
        lambda path: svdpeft.load(llama(), path / "a", verify=True) if (path / "a/adapter").exists() else None,
        anew=True,
    ),
    "a checkpoint's adapter and state": Writer(
        lambda path, n: save_checkpoint(adapted(n), path / "c"),
        lambda path: (
            load_checkpoint(adapted.__wrapped__(1), path / "c") if (path / "c/training.safetensors").exists() else None
        ),
    ),
    "Calibration.save": Writer(
        lambda path, n: seen(n).save(path / "seen.safetensors"),
        lambda path: svdpeft.Calibration.load(path / "seen.safetensors"),
    ),
    "svd_cache": Writer(cached, cache_read, anew=True),
    "folders.decompose": Writer(
        lambda path, n: folders.decompose(path.parent / "base", 2, path / "svd", targets=["qk"[n - 1] + "_proj"]),
        lambda path: folders.decompose(path.parent / "base", 2, path / "svd", targets=["q_proj", "k_proj"]),
        anew=True,
    ),
    "an asset of the cache": Writer(asset, lambda path: None, anew=True, whole=True),
    "a record of a comparison": Writer(record, lambda path: Store(path).load("runs", "a")),
    "comparison.json": Writer(lambda path, n: Store(path).claim(spec(n)), lambda path: Store(path).comparison()),
    "folders.merge": Writer(
        lambda path, n: folders.merge(path.parent / "base", [(path.parent / "adapter", float(n))], path / "merged"),
        lambda path: Folder(path / "merged"),
        anew=True,
        whole=True,
    ),
    "folders.extract": Writer(
        lambda path, n: folders.extract(path.parent / "base", path.parent / "tuned", path / "a", rank=n),
        lambda path: svdpeft.load(llama(), path / "a", verify=True),
    ),
    "export_lora": Writer(
        lambda path, n: svdpeft.export_lora(adapted(n), path / "lora", max_rank=3 + n),
        lambda path: svdpeft.import_peft(linear(), path / "lora"),
        anew=True,
        whole=True,
    ),
    "export_gguf": Writer(
        lambda path, n: svdpeft.export_gguf(language(), path / "a.gguf", dtype=f"f{16 * n}"),
        lambda path: GGUFReader(path / "a.gguf"),
        anew=True,
    ),
    "rwkv.write": Writer(
        lambda path, n: rwkv.write(recurrent(), path / "m.pth", DTYPES[n]),
        lambda path: rwkv.read(path / "m.pth"),
    ),
    "rwkv.write of safetensors": Writer(
        lambda path, n: rwkv.write(recurrent(), path / "m.safetensors", DTYPES[n]),
        lambda path: rwkv.read(path / "m.safetensors"),
    ),
    "write_csv": Writer(lambda path, n: write_csv(rows(n), path / "a.csv"), lambda path: None),
    "a picture with its table": Writer(drawn, lambda path: None),
    "the record of svdpeft train": Writer(
        lambda path, n: train._write(path / "training.json", {"log": rows(n)}), lambda path: None
    ),
}


def prepare(folder: Path) -> None:
    """Folders that some read: a model, another one, and an adapter."""
    saved(llama(), folder / "base")
    language().save(folder / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding
        folders.merge(folder / "base", folder / "adapter", folder / "tuned")


def check(writer: Writer, before: Mapping[str, str], found: Mapping[str, str], expected: list[dict[str, str]]) -> None:
    """Each file is that of one of the two numbers; where all come at once all are of the same, or as they were."""
    if writer.whole:
        assert found in (before, *expected), "parts of a folder"
        return
    for name, digest in found.items():
        assert any(digest == each.get(name) for each in expected), f"{name} is neither the old nor the new"
    assert before.keys() <= found.keys(), "something is gone"


def torn(source: str, target: Path) -> None:
    """A move that is none: half of a file is at its place when the process dies."""
    file = next(each for each in [Path(source), *sorted(Path(source).rglob("*"))] if each.is_file())
    there = target / file.relative_to(source)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(file.read_bytes()[:-20])
    os.kill(os.getpid(), signal.SIGKILL)


def notices(writer: Writer, path: Path, expected: list[dict[str, str]]) -> None:
    """See that the check of a writer can fail."""

    def work() -> None:
        os.replace = torn  # type: ignore[assignment]  in the fork alone
        writer.write(path, 1)

    path.mkdir()
    assert attempt(work).killed
    try:
        check(writer, {}, files_of(path), expected)
    except AssertionError:
        shutil.rmtree(path)
        return
    raise AssertionError("the check has not noticed half of a file")


def refuses(writer: Writer, path: Path, number: int, hindrance: AbstractContextManager[None]) -> None:
    """It says that it cannot write: by an error, or a cache by a warning."""

    def work() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                with hindrance:
                    writer.write(path, number)
            except Exception:  # whose words tests of each writer hold
                return
        assert any("could not be" in str(each.message) for each in told), "it could not write, and has not said so"

    assert not attempt(work).killed


def hindered(writer: Writer, path: Path, expected: list[dict[str, str]], sizes: list[int], draw: random.Random) -> int:
    """A disk that is full at drawn sizes, and a folder that may not be written: what was there stays; how often."""
    for _ in range(HINDERED):
        if writer.anew and path.exists():
            shutil.rmtree(path)
        path.mkdir(exist_ok=True)
        before = files_of(path)
        number = 2 if before == expected[0] else 1  # what is there already need not be written
        refuses(writer, path, number, no_room(draw.randrange(sizes[number - 1] * 9 // 10)))
        check(writer, before, found := files_of(path), expected)
        if found:
            writer.read(path)
        refuses(writer, path, 2 if found == expected[0] else 1, read_only(path))
        assert files_of(path) == found
    return 2 * HINDERED


def kills(writer: Writer, folder: Path, count: int, draw: random.Random) -> str:
    """So many kills of one writer; what is told of them."""
    begun, expected, spans, sizes, path = time.monotonic(), [], [], [], folder / "at"
    for number in (1, 2):  # left alone
        path.mkdir()
        spans.append(attempt(lambda number=number: writer.write(path, number)).span)
        expected.append(files_of(path))
        sizes.append(max((path / name).stat().st_size for name in expected[-1]))
        shutil.rmtree(path)
    assert expected[0] != expected[1]
    notices(writer, path, expected)
    whole = Span(max(span.operations for span in spans), max(span.seconds for span in spans))
    number, killed, new = 1, 0, 0
    while killed < count:
        number = 3 - number
        if writer.anew and path.exists():
            shutil.rmtree(path)
        path.mkdir(exist_ok=True)
        before = files_of(path)
        outcome = attempt(lambda number=number: writer.write(path, number), **draws(whole, draw))
        found = files_of(path)
        check(writer, before, found, expected)
        came = found == expected[number - 1]
        assert came or outcome.killed, "it has ended, and something else is there"
        if found:
            writer.read(path)
        hidden = [each for each in path.rglob(".*") if not any(map(LEFT.fullmatch, each.relative_to(path).parts))]
        assert not hidden, f"nobody sweeps {hidden}"
        killed, new = killed + outcome.killed, new + (came and outcome.killed)
    told = f"the new is there after {new}; {hindered(writer, path, expected, sizes, draw)} times hindered, and said so"
    return f"{killed} kills in {time.monotonic() - begun:.0f} s, {told}; nothing is lost"


def main(folder: Path, count: int, *names: str) -> None:
    """So many kills of each; ends with an error where one has lost something, or something reads wrongly."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # a user who may not write may look
    prepare(folder)
    gc.freeze()  # what is here already is walked, and so copied, in no fork
    begun, total = time.monotonic(), 0
    for name in names or WRITERS:
        where = folder / re.sub(r"\W+", "-", name)
        where.mkdir()
        for shared in ("base", "adapter", "tuned"):
            (where / shared).symlink_to(folder / shared)
        print(f"{name}: {kills(WRITERS[name], where, count, random.Random(name))}", flush=True)
        total += count
        shutil.rmtree(where)
    print(f"writers: {total} kills of {len(names or WRITERS)}, nothing is lost, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
