"""Headers and files with something wrong in them, drawn by hypothesis, and what a reader may do with them.

python tests/torture/damage.py EXAMPLES
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import adapt, assert_same, host, perturb, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from old_adapters import CASES
from rows import methods
from safetensors.torch import save
from torch import nn

import svdpeft
from svdpeft import CheckpointError
from svdpeft.adapter.file import HEADER, TENSORS, State
from svdpeft.adapter.loading import restore

MEMORY = 2**30  # bytes that no file of this size may take
DEEP: Any = functools.reduce(lambda inner, _: [inner], range(300), [])
NASTY = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324),
    *(
        "",
        "x",
        "a.b",
        "/",
        "\x00",
        "(",
        ".*",
        "full",
        "head-only",
        "lora",
        "sorsa",
        "dora",
        "linear",
        "layer",
        "L",
        "A",
    ),
    *("__class__", "forward", "weight", "q", "rows", "random", "torch.float16", "torch.load", "torch.int8", "train"),
    *([], {}, [[]], [None], [0], [0, 10**9, 1], [[0, 10**9, 1]], [[0, 1, 0]], [[-1, 2, 1]], [[0, 2, 1], [1, 3, 1]]),
    *({"name": "full"}, {"name": "lora", "rank": 0}, {"name": "lora", "rank": {"x": None}}, {"name": "dora"}),
    *({".*": 1}, {"(": 1}, {"L": [1]}, {"of": 10**9, "ranges": [[0, 10**9, 1]], "name": "q"}, DEEP),
]


@dataclass(frozen=True)
class Case:
    """An adapter of a kind of model.

    Args:
        build: makes its base.
        state: what was saved.
    """

    build: Callable[[], nn.Module]
    state: State
    _ready: dict[bool, Any] = field(default_factory=dict)  # where the last read was refused

    @contextmanager
    def model(self, adapted: bool) -> Iterator[tuple[nn.Module, svdpeft.Adapter | None]]:
        """A model with or without the adapter; if the block is refused by the one error, it is as it was."""
        model, adapter, before = self._ready.pop(adapted, None) or self._made(adapted)
        try:
            yield model, adapter
        except CheckpointError:
            assert_same(before, snapshot(model))
            self._ready[adapted] = model, adapter, before

    def _made(self, adapted: bool) -> tuple[nn.Module, svdpeft.Adapter | None, Any]:
        model = self.build()
        adapter = svdpeft.load(model, self.state) if adapted else None
        return model, adapter, snapshot(model)


def _case(build: Callable[[], nn.Module], attach: Callable[[nn.Module], svdpeft.Adapter]) -> Case:
    adapter = attach(build())
    perturb(adapter)
    return Case(build, adapter.state_dict())


@functools.cache
def cases() -> tuple[Case, ...]:
    """Fused, tied, headwise and convolutional weights, running statistics, and every method in every variant."""
    found = [_case(lambda b=build: b()[0], attach) for build, attach in CASES.values()]

    def layer() -> nn.Module:
        return host(("linear", 0))[0]

    return (
        *found,
        *(_case(layer, lambda m, method=method: adapt(m, method, train=("head",))) for method in methods(True)),
    )


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is a value in a header, the header itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in inner for path in ((*above, key), *_paths(each, (*above, key)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path, value)


def changed(draw: Callable[[Any], Any], header: Any) -> None:
    """Replace a value, take one away, put one there twice, or somewhere else, or deeper; in place."""
    if not (paths := _paths(header)):
        return
    path = draw(st.sampled_from(paths))
    place, key = _at(header, path[:-1]), path[-1]
    how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "move", "nest", "number"]))
    if how == "replace":
        place[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif how == "delete":
        del place[key]
    elif how == "double" and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif how == "double":
        place[f"{key}{draw(st.sampled_from(['', '0', '.x', '/L']))}x"] = copy.deepcopy(place[key])
    elif how == "move":
        place[key] = copy.deepcopy(_at(header, draw(st.sampled_from(paths))))
    elif how == "nest":
        place[key] = [place[key]] if draw(st.booleans()) else {"name": place[key]}
    elif isinstance(place[key], int | float):
        with suppress(OverflowError):  # half more than a number that no float can be
            place[key] = place[key] + draw(st.sampled_from([-1, 1, 0.5, 10**12]))


@st.composite
def bad_headers(draw: Any) -> tuple[Case, State]:
    """A case with one to three changes in its header."""
    case = draw(st.sampled_from(cases()))
    header = json.loads(case.state.metadata[HEADER])
    for _ in range(draw(st.integers(1, 3))):
        changed(draw, header)
    return case, State(case.state.tensors, {HEADER: json.dumps(header)})


@st.composite
def bad_bytes(draw: Any) -> tuple[Case, bytes]:
    """A case and its file of tensors with some bytes turned, cut off, or put in."""
    case = draw(st.sampled_from(cases()))
    data = bytearray(save(dict(case.state.tensors), metadata=dict(case.state.metadata)))
    head = int.from_bytes(data[:8], "little") + 8
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, 8) | st.integers(0, head) | st.integers(0, len(data)))
        how = draw(st.sampled_from(["turn", "turn", "digit", "cut", "more"]))
        if how == "cut":
            del data[place:]
        elif how == "more":
            data[place:place] = draw(st.binary(max_size=20))
        elif place < len(data):
            data[place] = draw(st.integers(0, 255)) if how == "turn" else draw(st.sampled_from(b'0123456789"[]{},:'))
    return case, bytes(data)


def survives(case: Case, source: Any, reader: str = "load") -> None:
    """Read a source: it is read, or refused by the one error, and then the model is as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with case.model(reader != "load") as (model, adapter):
            if adapter is None:
                svdpeft.load(model, source)
            elif reader == "restore":
                restore(adapter, source)
            else:
                adapter.load_state_dict(source)


def survives_file(case: Case, data: bytes, reader: str = "load") -> None:
    """The same of a folder with such a file of tensors."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TENSORS).write_bytes(data)
        survives(case, folder, reader)


def peak() -> int:
    """Bytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


readers = st.sampled_from(["load", "load", "restore", "load_state_dict"])


def main(examples: int) -> None:
    """A tenth of the examples are bytes, the rest are headers."""
    options: dict[str, Any] = {"derandomize": True, "database": None, "deadline": None}
    cases()
    gc.freeze()  # what is here already is looked through in no collection
    least, begun = peak(), time.monotonic()

    @settings(max_examples=examples - examples // 10, **options)
    @given(bad_headers(), readers)
    def headers(drawn: tuple[Case, State], reader: str) -> None:
        survives(*drawn, reader)

    @settings(max_examples=examples // 10, **options)
    @given(bad_bytes(), readers)
    def files(drawn: tuple[Case, bytes], reader: str) -> None:
        survives_file(*drawn, reader)

    headers()
    files()
    assert peak() < least + MEMORY, f"{(peak() - least) / 2**20:.0f} MiB for a small file"
    told = f"{(peak() - least) / 2**20:.0f} MiB at most"
    print(f"adapters: {examples} damaged in {time.monotonic() - begun:.0f} s, each read or refused, {told}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
