"""What is timed: attaching, a training step and the ways to run it, files, merging, a token, an import."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import svdpeft
from benchmarks.speed.models import PEFT_STARTS, Bench, copied, linears, multiplied_out, packaged_sorsa, peft
from benchmarks.speed.rounds import Candidate

BAND = 2  # off-diagonals of SVFT banded


@dataclass(frozen=True)
class Case:
    """Candidates that are timed in the same rounds.

    Args:
        title: a heading.
        reference: the candidate that ratios are to.
        candidates: by name.
        rounds: of which quartiles can be had.
        sizes: bytes on the disk, by candidate.
    """

    title: str
    reference: str
    candidates: Mapping[str, Candidate]
    rounds: int
    sizes: dict[str, int] = field(default_factory=dict)


def attaching(bench: Bench) -> Case:
    """From a base to a model that trains; the floor of SVFT is LAPACK's SVD of the same weights in float32."""
    base, rank = bench.base(), bench.rank
    kept = tempfile.TemporaryDirectory()  # of decompositions

    def cached(model: nn.Module, _: Any = kept) -> Any:
        with svdpeft.svd_cache(kept.name):
            return svdpeft.attach(model, svdpeft.SORSA(rank=rank))

    cached(copied(base))
    ours = {
        "LoRA": svdpeft.LoRA(rank=rank),
        "PiSSA": svdpeft.PiSSA(rank=rank),
        "PiSSA, exact": svdpeft.PiSSA(rank=rank, driver="exact"),
        "SVFT banded": svdpeft.SVFT(pattern="banded", off_diagonals=BAND),
    }
    ready = functools.partial(copied, base)
    return Case(
        "Attach",
        "peft PiSSA, 4 iterations",
        {
            **{
                name: (ready, lambda model, method=method: svdpeft.attach(model, method))
                for name, method in ours.items()
            },
            "SORSA, of cached triplets": (ready, cached),
            "torch.linalg.svd of all weights": (
                ready,
                lambda model: [_svd(layer) for layer in linears(model).values()],
            ),
            **{name: (ready, lambda model, name=name: peft(model, name, rank)) for name in PEFT_STARTS},
        },
        rounds=3,
    )


def _svd(layer: nn.Linear) -> None:
    torch.linalg.svd(layer.weight.float(), full_matrices=False)


def steps(bench: Bench) -> Case:
    """Forward and backward of one batch."""
    base, rank = bench.base(), bench.rank

    def adapted(method: svdpeft.Method, fold: bool = False) -> nn.Module:
        model = copied(base)
        adapter = svdpeft.attach(model, method)
        if fold:
            adapter.fold()
        return model

    frozen = copied(base)  # what no method can be faster than, but for one that folds
    frozen.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())  # pyright: ignore
    sorsa, banded = svdpeft.SORSA(rank=rank), svdpeft.SVFT(pattern="banded", off_diagonals=BAND)
    models = {
        "peft LoRA": peft(copied(base), "peft LoRA", rank),
        "frozen base": frozen,
        "LoRA": adapted(svdpeft.LoRA(rank=rank)),
        "PiSSA": adapted(svdpeft.PiSSA(rank=rank)),
        "SORSA": adapted(sorsa),
        "SORSA, folded": adapted(sorsa, fold=True),
        "SVFT plain": adapted(svdpeft.SVFT()),
        "SVFT banded": adapted(banded),
        "SVFT banded, folded": adapted(banded, fold=True),
        "SVFT banded, multiplied out": multiplied_out(copied(base), BAND),
    }
    if importlib.util.find_spec("sorsa") is not None:
        models["SORSA of its own package"] = packaged_sorsa(copied(base), rank)
    return Case(
        f"Forward and backward, {bench.batch}×{bench.tokens} tokens",
        "peft LoRA",
        _stepping(bench, models),
        rounds=7,
    )


def ways(bench: Bench) -> Case:
    """The same step eager, compiled and with activations that are computed again, of the first two blocks."""
    base: Any = bench.base()
    base.model.layers = base.model.layers[:2]  # a compiler takes minutes for thirty
    base.config.num_hidden_layers = 2
    rank = bench.rank

    def adapted(name: str, reentrant: bool | None = None) -> nn.Module:
        model: Any = copied(base)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if name in PEFT_STARTS:
            return peft(model, name, rank)
        svdpeft.attach(model, svdpeft.SORSA(rank=rank))
        return model

    models: dict[str, nn.Module] = {}
    for name in ("peft LoRA", "SORSA"):
        models |= {
            name: adapted(name),
            f"{name}, compiled": torch.compile(adapted(name)),  # pyright: ignore
            f"{name}, checkpoints": adapted(name, reentrant=False),
            f"{name}, reentrant checkpoints": adapted(name, reentrant=True),
        }

    return Case(
        f"Eager, compiled and with checkpoints: two blocks, {bench.batch}×{bench.tokens} tokens",
        "peft LoRA",
        _stepping(bench, models),
        rounds=5,
    )


def _stepping(bench: Bench, models: Mapping[str, nn.Module]) -> dict[str, Candidate]:
    ids = bench.ids()

    def step(model: nn.Module) -> None:
        # As trainers do: factors are in float32.
        with torch.autocast(bench.device, bench.dtype, enabled=bench.dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    return {name: (functools.partial(_same, model), step) for name, model in models.items()}


def _same(model: nn.Module) -> nn.Module:
    return model


def saving(bench: Bench) -> Case:
    """A trained adapter into a new folder, for the first time: the base is hashed, too."""
    return _files(bench, "Save", timed=lambda model, folder: _save(model, folder), merge=False)


def loading(bench: Bench) -> Case:
    """From a folder to a base, which is checked to be the right one."""
    base, rank, folder = bench.base(), bench.rank, Path(tempfile.mkdtemp())
    candidates: dict[str, Candidate] = {}
    for name, model in _trained(base, rank).items():
        _save(model, folder / name)
        load = _load_peft if name.startswith("peft") else svdpeft.load
        candidates[name] = (functools.partial(copied, base), functools.partial(_load, load, folder / name))
    return Case("Load", "peft LoRA", candidates, rounds=5)


def merging(bench: Bench) -> Case:
    """Into the weights of the model, with the report of what rounding lost."""
    return _files(bench, "Merge", timed=lambda model, folder: _merge(model), merge=True)


def _files(bench: Bench, title: str, timed: Callable[[nn.Module, Path], Any], merge: bool) -> Case:
    base, folder = bench.base(), Path(tempfile.mkdtemp())
    candidates: dict[str, Candidate] = {}
    sizes = {}
    for name, model in _trained(base, bench.rank).items():
        _save(model, folder / name)
        sizes[name] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())

        def ready(model: nn.Module = model, name: str = name) -> Any:
            shutil.rmtree(folder / name, ignore_errors=True)
            return copied(model), folder / name

        candidates[name] = (ready, lambda given: timed(*given))
    return Case(title, "peft LoRA", candidates, rounds=5, sizes={} if merge else sizes)


def _trained(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    """Adapted models that have moved off their start."""
    found = {"peft LoRA": peft(copied(base), "peft LoRA", rank)}
    for name, method in {
        "LoRA": svdpeft.LoRA(rank=rank),
        "PiSSA": svdpeft.PiSSA(rank=rank),
        "SVFT banded": svdpeft.SVFT(pattern="banded", off_diagonals=BAND),
    }.items():
        found[name] = copied(base)
        svdpeft.attach(found[name], method)
    draws = torch.Generator().manual_seed(0)
    for model in found.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-3 * torch.randn(parameter.shape, generator=draws).to(parameter)
    return found


def _adapter(model: nn.Module) -> svdpeft.Adapter:
    (adapter,) = svdpeft.adapters(model).values()
    return adapter


def _save(model: nn.Module, folder: Path) -> None:
    if hasattr(model, "save_pretrained") and hasattr(model, "peft_config"):
        model.save_pretrained(folder)  # pyright: ignore
    else:
        _adapter(model).save(folder)


def _merge(model: nn.Module) -> None:
    if hasattr(model, "merge_and_unload"):
        model.merge_and_unload()  # pyright: ignore
    else:
        _adapter(model).merge()


def _load(load: Callable[[nn.Module, Path], Any], folder: Path, model: nn.Module) -> Any:
    return load(model, folder)


def _load_peft(model: nn.Module, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)  # pyright: ignore


def tokens(bench: Bench) -> Case:
    """Sixteen tokens, one after the other, of a model that is not merged."""
    base = bench.base()
    ids = bench.ids()[:1, :8]
    models = {"frozen base": base, **_trained(base, bench.rank)}

    def decode(model: Any) -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16)

    return Case(
        "Sixteen tokens, one at a time",
        "peft LoRA",
        {name: (functools.partial(_same, model.eval()), decode) for name, model in models.items()},
        rounds=9,
    )


def imports(_: Bench) -> Case:
    """A process of its own that imports, or prints the help."""

    def run(*words: str, program: str = sys.executable) -> Candidate:
        return lambda: None, lambda _: subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)

    return Case(
        "Import",
        "import torch",
        {
            "python": run("-c", "pass"),
            "import torch": run("-c", "import torch"),
            "import peft": run("-c", "import peft"),
            "import svdpeft": run("-c", "import svdpeft"),
            "import svdpeft, one of its names": run("-c", "import svdpeft; svdpeft.attach"),
            "svdpeft --help": run("--help", program=str(Path(sys.executable).with_name("svdpeft"))),
        },
        rounds=5,
    )


CASES: dict[str, Callable[[Bench], Case]] = {
    case.__name__: case for case in (attaching, steps, ways, saving, loading, merging, tokens, imports)
}
