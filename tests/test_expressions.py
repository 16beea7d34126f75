"""Regular expressions of users and files: one that takes for ever is an error, wherever it stands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import svdpeft
from svdpeft import LoRA, attach, patterns
from svdpeft.patterns import Expression, matches

ENDLESS = r"(\w|\w\.?|\.)*[!?]"
LAYER = "a_layer_whose_name_is_as_long_as_those_of_some_models_are"


def net() -> nn.Module:
    return nn.ModuleDict({LAYER: nn.Linear(4, 3), "other": nn.Linear(4, 3)})


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns.expression.cache_clear()
    monkeypatch.setattr(patterns, "PATIENCE", 0.2)


@pytest.mark.parametrize(
    "given",
    [
        {"targets": [ENDLESS]},
        {"exclude": [ENDLESS]},
        {"train": [ENDLESS]},
        {"method": LoRA(rank={ENDLESS: 1, ".*": 2})},
    ],
    ids=lambda given: next(iter(given)),
)
def test_attach(given: dict[str, Any]):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"has taken 0\.2 s") as caught:
        attach(net(), **{"method": LoRA(rank=1), **given})
    assert repr(ENDLESS) in str(caught.value)
    assert time.monotonic() - begun < 5


def test_a_configuration_of_peft(tmp_path: Path):
    model = nn.Sequential(nn.ModuleDict({LAYER: nn.Linear(4, 3)}))
    adapter = attach(nn.Sequential(nn.ModuleDict({LAYER: nn.Linear(4, 3)})), LoRA(rank=1))
    svdpeft.export_lora(adapter, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alpha_pattern": {ENDLESS: 1}}))
    with pytest.raises(ValueError, match=r"has taken 0\.2 s") as caught:
        svdpeft.import_peft(model, tmp_path / "peft")
    assert json.dumps(ENDLESS)[1:-1] in str(caught.value)


def test_many_names_that_each_take_a_while(monkeypatch: pytest.MonkeyPatch):
    """Their sum is bounded, too; names that take microseconds do not count, however many."""
    monkeypatch.setattr(patterns, "SLOW", 0.0)
    slow = Expression("[ab]*c")

    def every() -> None:
        for i in range(10**7):
            slow.matches("ab" * 100 + str(i))

    with pytest.raises(ValueError, match=r"'\[ab\]\*c' has taken"):
        every()
    monkeypatch.undo()
    quick = Expression("[ab]*c")
    for i in range(1000):
        assert not quick.matches("ab" * 100 + str(i))
    assert quick.spent < 0.05


@pytest.mark.parametrize("pattern", ["[", "(" * 5000 + ")" * 5000, "a{99999999999999}"], ids=["open", "deep", "often"])
def test_what_is_no_expression(pattern: str):
    with pytest.raises(ValueError, match="neither a name nor a regular expression"):
        matches(pattern, "fc")
