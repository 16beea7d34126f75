"""Whatever is in an adapter's file, it is loaded, or refused by ``CheckpointError`` with the model as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import header_of, put, retensor, rewrite
from helpers import adapt, host, perturb, refused, snapshot
from hypothesis import given, settings
from old_adapters import CASES
from safetensors.torch import load_file, save_file
from torch import nn
from torture.damage import bad_bytes, bad_headers, cases, readers, survives, survives_file

import svdpeft
from svdpeft import CheckpointError, LoRA, load
from svdpeft.adapter.file import HEADER, TENSORS, State
from svdpeft.adapter.loading import restore

cases()  # before anything is drawn: a name of a temporary folder comes from the generator that hypothesis watches


@settings(max_examples=300)
@given(bad_headers(), readers)
def test_headers_with_something_wrong(drawn: Any, reader: str):
    survives(*drawn, reader)


@settings(max_examples=150)
@given(bad_bytes(), readers)
def test_files_with_something_wrong(drawn: Any, reader: str):
    survives_file(*drawn, reader)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two sites that are parts of one weight, a tied weight, and one by entries."""
    build, attach = CASES["attentions"]
    adapter = attach(build()[0])
    perturb(adapter)
    adapter.save(tmp_path / "a")
    return tmp_path / "a"


def no_adapter(path: Path, *words: str) -> None:
    model, _ = CASES["attentions"][0]()
    with refused(model, str(path), *words, error=CheckpointError):
        load(model, path)
    adapter = CASES["attentions"][1](model)
    before = snapshot(model)
    for take in (lambda: adapter.load_state_dict(path), lambda: restore(adapter, path)):
        try:
            take()  # what is wrong may be nothing to an adapter that is attached already
        except CheckpointError:
            assert snapshot(model) == before


FUSED, TIED, PLAIN = "attention.in_proj_weight[q]", "embed", "fc"


def site(name: str, **changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["sites"][name].update(changed)


def part(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["sites"][FUSED]["part"].update(changed)


def method(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["sites"][TIED]["method"].update(changed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (site(PLAIN, method={"name": "full"}), "adapts no site"),
        (method(rank=0), "rank 0"),
        (method(rank=None, alpha=2.0), "rank"),
        (method(rank={"embed": 2}, alpha=2.0), "says a rank of other sites"),
        (method(rank=10**30), "rank 1000000000000000000000000000000"),
        (method(alpha=10**400), "OverflowError"),
        (method(alpha=[1]), "'list' and 'int'"),
        (lambda header: header.update(name="a.b"), "the name is 'a.b'"),
        (lambda header: header.update(name=""), "the name is ''"),
        (lambda header: header["whole"].append("fc.bias"), "tensor fc.bias is missing"),
        (lambda header: header["sites"].update(twin=header["sites"][PLAIN]), "twin"),
        (part(ranges=[[0, 10**9, 1]]), "of 24 rows"),
        (part(ranges=[[0, 10**9, 1]], of=10**9), "is a part of 1000000000 rows there, of 24 here"),
        (part(ranges=[[-8, 8, 1]]), "[-8, 8, 1]"),
        (part(ranges=[[0, 8, 1], [4, 12, 1]]), "[4, 12, 1], of 24 rows after row 8"),
        (part(ranges=[[0, 8, 0]]), "[0, 8, 0]"),
        (part(ranges=[[0, 8.0, 1]]), "which is not start, stop and step"),
        (part(ranges=[0, 8, 1]), "which is not start, stop and step"),
    ],
)
def test_what_a_header_may_not_say(saved: Path, change: Callable[[dict[str, Any]], None], words: str):
    rewrite(saved, change)
    no_adapter(saved, words)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "RecursionError"),
        ('{"format": ' + "3" * 10_000 + "}", "ValueError"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
    ],
)
def test_what_is_no_header(saved: Path, header: str, words: str):
    put(saved, header)
    no_adapter(saved, "is damaged or cut off", words)


def test_what_cannot_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def never(self: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", never)
        no_adapter(saved, "PermissionError")
    (saved / TENSORS).rename(saved / "away")
    (saved / TENSORS).mkdir()
    no_adapter(saved, "is not an adapter folder")
    no_adapter(Path("nul\x00in it"), "is not an adapter folder")


def test_integers_are_no_factors(saved: Path):
    retensor(saved, lambda tensors: tensors.update({f"{TIED}/A": tensors[f"{TIED}/A"].long()}), header=True)
    no_adapter(saved, "missing, or not of floating point")


def test_a_weight_is_not_adapted_and_trained_whole(saved: Path):
    rewrite(saved, lambda header: header["whole"].append("fc.weight"))
    retensor(saved, lambda tensors: tensors.update({"fc.weight": torch.zeros(8, 8)}), header=True)
    no_adapter(saved, "trains fc.weight whole, and adapts it as well")


def test_a_scale_that_the_factors_cannot_have(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 3))
    svdpeft.attach(model, LoRA(rank=1), ["0"]).save(tmp_path)
    rewrite(tmp_path, lambda header: header["sites"]["0"]["method"].update(alpha=1e308))
    model = nn.Sequential(nn.Linear(4, 3))
    with refused(model, "0 has the scale 1e+308", error=CheckpointError):
        load(model, tmp_path, check_base=False)


@pytest.mark.parametrize(
    ("rotating", "field"),
    [(svdpeft.OFT(block_size=2, neumann=3), "neumann"), (svdpeft.PSOFT(rank=2, rotation="neumann"), "terms")],
)
def test_a_series_without_an_end(tmp_path: Path, rotating: Any, field: str):
    model = nn.Sequential(nn.Linear(4, 4))
    svdpeft.attach(model, rotating, ["0"]).save(tmp_path)
    rewrite(tmp_path, lambda header: header["sites"]["0"]["method"].update({field: 2**62}))
    with refused(model, f"{field} {2**62} is outside [1, 1000]", error=CheckpointError):
        load(model, tmp_path)


class Growing(nn.Module):
    """An embedding that is resized as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def resize_token_embeddings(self, tokens: int, mean_resizing: bool) -> None:
        raise AssertionError("a forged number of tokens was believed")


@pytest.mark.parametrize("whole", [True, False])
def test_a_number_of_tokens_is_believed_as_far_as_there_are_values(tmp_path: Path, whole: bool):
    """Else the model's embedding would grow to a million rows before anything is compared."""
    adapter = svdpeft.attach(Growing(), LoRA(rank=1), [], train=["embed"] if whole else {"embed": [4, 5]})
    state = adapter.state_dict()
    header, tensors = json.loads(state.metadata[HEADER]), dict(state.tensors)
    if whole:
        tensors["embed.weight"] = torch.zeros(10**6, 0)
    else:
        (entry,) = header["sites"].values()
        entry["shape"], entry["part"] = [10**6, 4], {**entry["part"], "of": 10**6, "ranges": [[4, 10**6, 1]]}
    model = Growing()
    with refused(model, "embed", error=CheckpointError):
        load(model, State(tensors, {HEADER: json.dumps(header)}))


FORGED = """
import json, resource, sys
import torch
import svdpeft
from old_adapters import CASES
model, _ = CASES["attentions"][0]()
least = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    svdpeft.load(model, sys.argv[1])
except svdpeft.CheckpointError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - least)
"""


def test_a_forged_header_takes_no_memory(saved: Path):
    """1,000 ranges of 24 million rows each: 9 GiB, were they made before they are looked at."""
    rewrite(saved, part(ranges=[[0, 24_000_000, 1]] * 1000))
    places = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": places}
    command = [sys.executable, "-c", FORGED, str(saved)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert int(done.stdout) < 2**20, "KiB"


# -- digests ---------------------------------------------------------------------------------------------------


def test_a_turned_bit_is_found_where_it_is_asked_for(saved: Path):
    model, _ = CASES["attentions"][0]()
    load(model, saved, verify=True).detach()
    whole = (saved / TENSORS).read_bytes()
    first = whole.index(
        next(t for t in load_file(saved / TENSORS).values() if t.dtype.is_floating_point).numpy().tobytes()
    )
    for place in (first, first + 8, first + 16):  # whole numbers, which are packed, are checked by every load
        data = bytearray(whole)
        data[place] ^= 1
        (saved / TENSORS).write_bytes(data)
        load(model, saved).detach()
        with refused(model, "is not as it was written: the values of", error=CheckpointError):
            load(model, saved, verify=True)
    (saved / TENSORS).write_bytes(whole)
    header = header_of(saved)
    header["sites"][PLAIN]["sample"][0] += 1.0
    put(saved, json.dumps(header))
    load(model, saved).detach()
    with refused(model, "the header of", "is not as it was written", error=CheckpointError):
        load(model, saved, verify=True)


def test_a_missing_tensor_and_a_file_without_digests_cannot_be_verified(saved: Path):
    model, _ = CASES["attentions"][0]()
    header = header_of(saved)
    retensor(saved, lambda t: t.update(spare=torch.zeros(1)), header=True)
    with refused(model, "spare is missing, or was added", error=CheckpointError):
        load(model, saved, verify=True)
    retensor(saved, lambda t: t.pop("spare"), header=True)
    del header["digests"]
    put(saved, json.dumps(header))
    load(model, saved).detach()
    with refused(model, "cannot be verified", "save it again", error=CheckpointError):
        load(model, saved, verify=True)


def test_a_folder_of_another_tool_beside_ours_is_no_adapter(tmp_path: Path):
    model, _ = host(("linear", 0))
    adapt(model, LoRA(rank=1)).save(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match="layer"):
        load(host(("linear", 0))[0], tmp_path)
