"""Plan, merge, export, extract and decompose on a random model of the shape of Llama-2-7B: memory and time.

    python -m benchmarks.large [--layers 4] [--folder /somewhere] [--threads 2]

Writes a bfloat16 checkpoint (13.5 GB with all 32 layers, the default where 45 GB of disk are free; else as many layers
as fit) and a LoRA of rank 16 on all linear layers, works on them each time in a process of its own, and removes all of
it. The bound that is checked: a peak of at most twice the largest shard.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

LAYERS, FREE = 32, 45e9
SHARD = "5GB"
RANK = 16
RESULT = Path(__file__).parent / "results" / "large.md"


def configuration(layers: int) -> Any:
    """Of Llama-2-7B, which transformers' own defaults are."""
    import transformers

    return transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")


def write_base(folder: Path, layers: int) -> None:
    """Write the checkpoint: values as a fresh model has them."""
    import torch
    import transformers

    from svdpeft.folders import shards
    from svdpeft.folders.folder import Entry
    from svdpeft.folders.output import write_index

    config = configuration(layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config)
    entries = {n: Entry("", "BF16", tuple(t.shape), 2 * t.numel()) for n, t in model.state_dict().items()}
    entries = shards.partition(entries, SHARD)
    draws = torch.Generator().manual_seed(0)

    def value(name: str) -> torch.Tensor:
        shape = entries[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=draws).mul_(config.initializer_range).bfloat16()

    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        its = {name: entry for name, entry in entries.items() if entry.file == file}
        shards.write(folder / file, its, lambda name: [value(name)], {"format": "pt"})
    write_index(folder, entries)


def write_adapter(base: Path, folder: Path) -> None:
    """Write a LoRA whose update is small beside the weights, without the model in memory."""
    import torch

    from svdpeft.adapter.attach import site_of
    from svdpeft.adapter.saving import Contents, save
    from svdpeft.folders.folder import Folder
    from svdpeft.folders.skeleton import Skeleton
    from svdpeft.methods.base import Factors
    from svdpeft.methods.lora import LoRA
    from svdpeft.targets.select import select

    skeleton, method, draws = Skeleton(Folder(base)), LoRA(rank=RANK), torch.Generator().manual_seed(1)
    sites = {}
    for choice in select(skeleton.model, [("all-linear", method)], (), ()).choices:
        record = skeleton.record(choice.places[0].module, choice.places[0].parameter)
        m, n = record.size
        tensors = {
            "L": 0.01 * torch.randn(m, RANK, generator=draws),
            "A": 0.03 * torch.randn(RANK, n, generator=draws),
        }
        sites[choice.name] = site_of(choice, method, Factors(tensors, method.trains, shape=(1, m, n)), record)
    save(Contents("default", skeleton.model, [("all-linear", method)], sites, [], {}, {}, "train"), folder, "stored")


def copy(folder: Path) -> str:
    """What any of it is measured against."""
    from svdpeft.atomic import replacing

    with replacing(folder / "copy") as new:
        shutil.copytree(folder / "base", new)
    shutil.rmtree(folder / "copy")
    return ""


def plan(folder: Path) -> str:
    from svdpeft import PiSSA
    from svdpeft.finetuning.plan import plan
    from svdpeft.training.recipe import Recipe

    made = plan(str(folder / "base"), PiSSA(rank=RANK), Recipe(lr=1e-4, batch_size=1), length=512, dtype="bfloat16")
    return f"{made.sites} sites, {made.memory}"


def merge(folder: Path) -> str:
    from svdpeft import folders

    return str(folders.merge(folder / "base", folder / "adapter", folder / "merged"))


def export(folder: Path) -> str:
    import svdpeft
    from svdpeft.folders import opened

    written = svdpeft.export_lora(opened(folder / "base", folder / "adapter"), folder / "lora")
    return str(written).replace(f"{folder}/", "")


def extract(folder: Path) -> str:
    from svdpeft import folders

    return str(folders.extract(folder / "base", folder / "merged", folder / "difference", rank=RANK))


def decompose(folder: Path) -> str:
    from svdpeft import folders

    return str(folders.decompose(folder / "base", RANK, folder / "svd"))


STAGES = (copy, plan, merge, export, extract, decompose)


def measured(stage: Any, folder: Path, threads: int, pipe: Any) -> None:
    """Run a stage and send seconds, bytes at its start, bytes at its peak, and what it says."""
    import torch
    import transformers  # noqa: F401, it is no part of what a stage needs

    import svdpeft.folders  # noqa: F401
    from svdpeft.training.memory import peak_memory, reset_peak_memory

    torch.set_num_threads(threads)
    before = reset_peak_memory()
    started = time.perf_counter()
    said = stage(folder)
    pipe.send((time.perf_counter() - started, before, peak_memory(), said))


def run(stage: Any, folder: Path, threads: int) -> tuple[float, int, int, str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(stage, folder, threads, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it is the memory of the process that is measured
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    free = shutil.disk_usage(options.folder).free
    layers = options.layers or max(1, min(LAYERS, int(LAYERS * free / FREE)))
    folder = Path(tempfile.mkdtemp(prefix="svdpeft-large-", dir=options.folder))
    try:
        write_base(folder / "base", layers)
        write_adapter(folder / "base", folder / "adapter")
        files = [file.stat().st_size for file in (folder / "base").glob("*.safetensors")]
        rows = {stage.__name__: run(stage, folder, options.threads) for stage in STAGES}
        adapter = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    finally:
        shutil.rmtree(folder)
    import torch
    import transformers

    copied = rows["copy"][0]
    lines = [
        f"# A model of the shape of Llama-2-7B on the disk, {layers} of {LAYERS} layers",
        "",
        f"`python -m benchmarks.large{f' --layers {layers}' if layers < LAYERS else ''}` on {date.today()}; "
        f"{options.threads} threads of a shared {platform.machine()} machine, Python {platform.python_version()}, "
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}.",
        "",
        f"Base: {sum(files) / 1e9:.2f} GB of bfloat16 in {len(files)} file{'s' if len(files) > 1 else ''}, the largest "
        f"of {max(files) / 1e9:.2f} GB; adapter: LoRA of rank {RANK}, {adapter / 1e9:.2f} GB of float32. Each row is a "
        "process of its own; its memory at the start is that of Python with torch and transformers. On a shared "
        "machine seconds vary several times over from run to run; memory does not.",
        "",
        "| | seconds | against copying | resident at the start, GB | peak, GB | of the largest file |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (seconds, before, peak, _) in rows.items():
        lines.append(
            f"| {name} | {seconds:.1f} | {seconds / copied:.1f}× | {before / 1e9:.2f} | {peak / 1e9:.2f} | "
            f"{peak / max(files):.2f}× |"
        )
    lines += ["", *(f"* {name}: {said}" for name, (*_, said) in rows.items() if said), ""]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))
    over = [name for name, (_, _, peak, _) in rows.items() if peak > 2 * max(files)]
    if over:
        raise SystemExit(f"more than twice the largest file: {', '.join(over)}")


if __name__ == "__main__":
    main()
