"""Adapters that an earlier revision wrote load with the same bits, compute the same, and are written the same again."""

import json

import pytest
import torch
from helpers import close, equal_bits, refused
from old_adapters import CASES, FIXTURES, bases_in
from safetensors.torch import load_file

import svdpeft
from svdpeft.adapter.file import FORMAT, NEUTRAL, WITHOUT_BASES


def without_neutral(value):
    """Without the hyper-parameters that an earlier revision wrote of methods that have none."""
    if isinstance(value, list):
        return [without_neutral(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: without_neutral(each) for key, each in value.items() if (key, each) not in NEUTRAL.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_earlier_revisions_adapter_is_the_same_here(name, tmp_path):
    model, x = CASES[name][0]()
    base = model(x)
    adapter = svdpeft.load(model, FIXTURES / name)
    close(model(x).detach(), load_file(FIXTURES / f"{name}.safetensors")["out"])
    assert not torch.allclose(model(x), base)
    adapter.save(tmp_path / name, bases=bases_in(name))
    before, after = (json.loads((folder / name / "adapter.json").read_text()) for folder in (FIXTURES, tmp_path))
    for key in ("id", "digests"):  # by which damage is found, since then
        after[key] = before.setdefault(key, after[key])
    for site, entry in after["sites"].items():
        before["sites"][site].setdefault("sample", entry["sample"])  # by which a weight is known in another precision
        assert adapter.sites[site].weight.known_by(before["sites"][site]["hash"])  # a SHA-256 then
        assert adapter.sites[site].weight.known_by(entry["hash"])
        del entry["hash"], before["sites"][site]["hash"]
    assert without_neutral(before) == without_neutral(after)
    before, after = (load_file(folder / name / "adapter.safetensors") for folder in (FIXTURES, tmp_path))
    assert before.keys() == after.keys()
    assert all(equal_bits(tensor, after[key]) for key, tensor in before.items())


def test_there_is_one_of_every_format():
    found = {json.loads(file.read_text())["format"] for file in FIXTURES.glob("*/adapter.json")}
    assert found == set(range(1, max(FORMAT, WITHOUT_BASES) + 1))


@pytest.mark.parametrize("number", [1, 2])
def test_a_format_that_no_release_wrote_is_refused_by_its_number(number):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    with refused(model, f"format-{number} has format {number}", "reads format 3 and 4", error=svdpeft.CheckpointError):
        svdpeft.load(model, FIXTURES / f"format-{number}")


@pytest.mark.parametrize("name", CASES)
def test_attaching_makes_the_adapter_that_an_earlier_revision_made(name):
    """Sites, methods, names of tensors and what is drawn from the seed stay; only rounding may differ."""
    (model, _), (other, _) = CASES[name][0](), CASES[name][0]()
    there, here = svdpeft.load(model, FIXTURES / name), CASES[name][1](other)
    assert str(there.methods) == str(here.methods)
    assert there.skipped == here.skipped
    assert {k: (s.shape, s.method) for k, s in there.sites.items()} == {
        k: (s.shape, s.method) for k, s in here.sites.items()
    }
    for site, found in here.sites.items():
        for role, tensor in found.factors.tensors().items():
            if role not in found.method.trains:  # what trains was moved before it was written
                torch.testing.assert_close(tensor, there.sites[site].factors.tensors()[role], rtol=1e-9, atol=1e-9)
