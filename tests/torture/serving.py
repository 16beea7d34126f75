"""Threads that share one adapted model: every output is one of those that the thread may see. A program, and its parts.

    python tests/torture/serving.py SECONDS

Float64, so that an output of other adapters is far off, and a switch between threads every 10 µs.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import svdpeft

NAMES = ("a", "b", "c")


class Net(nn.Module):
    """Layers that are called, and attention, which reads its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:  # (rows, time, 6)
        y = torch.tanh(self.into(x))
        return self.out(y + self.attention(y, y, y, need_weights=False)[0])


class Served:
    """A model with three adapters, an input, and what each of them makes of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net().double().eval()
        self.x = torch.randn(4, 3, 6, dtype=torch.float64)
        self.adapters = [svdpeft.attach(self.model, svdpeft.LoRA(rank=2), "all", name=name) for name in NAMES]
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        self.model(self.x)  # so that it is known which weights are read
        self.alone: dict[str | None, Tensor] = {}
        for name in (*NAMES, None):
            with svdpeft.only(self.model, *([name] if name else [])), torch.no_grad():
                self.alone[name] = self.model(self.x)
        with torch.no_grad():
            self.together = self.model(self.x)
        self.without = {name: self.of(adapter.disabled) for name, adapter in self}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(zip(NAMES, self.adapters, strict=True))

    def of(self, block: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """What the model gives in a block."""
        with block(), torch.no_grad():
            return self.model(self.x)


def near(found: Tensor, *expected: Tensor) -> bool:
    return any(bool((found - each).abs().max() < 1e-9) for each in expected)


@contextmanager
def eager_threads() -> Iterator[None]:
    """Within the block threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(seconds: float, *requests: Callable[[], bool]) -> Counter[str]:
    """Let each thread make requests of its own for so long: how many were right, wrong, or failed, and with what."""
    counts: Counter[str] = Counter()
    start, end = threading.Barrier(len(requests)), time.monotonic() + seconds

    def work(request: Callable[[], bool]) -> None:
        start.wait()
        while time.monotonic() < end:
            try:
                said = "right" if request() else "wrong"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            with lock:
                counts[said] += 1

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(request,), name=f"worker {i}") for i, request in enumerate(requests)]
    with eager_threads():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return counts


# -- what two threads do beside each other ----------------------------------------------------------------------------


def off_and_off(served: Served) -> Sequence[Callable[[], bool]]:
    """Blocks in which different adapters are off."""
    return [lambda n=n, a=a: near(served.of(a.disabled), served.without[n]) for n, a in list(served)[:2]]


def rows_and_rows(served: Served) -> Sequence[Callable[[], bool]]:
    """Batches whose rows have different adapters."""

    def ask(names: Sequence[str | None]) -> bool:
        expected = torch.stack([served.alone[name][row] for row, name in enumerate(names)])
        return near(served.of(lambda: served.adapters[0].per_example(names)), expected)

    return [lambda: ask(["a", "b", None, "a"]), lambda: ask(["c", "c", "a", None])]


def merge_and_call(served: Served) -> Sequence[Callable[[], bool]]:
    """One merges and unmerges; the other's outputs stay the same up to rounding."""

    def merge() -> bool:
        served.adapters[0].merge()
        served.adapters[0].unmerge()
        return True

    return [merge, lambda: near(served.of(nullcontext), served.together)]


def merge_and_part(served: Served) -> Sequence[Callable[[], bool]]:
    """One merges and unmerges; the other calls a layer, and the model not at all."""
    layer, x = served.model.out, torch.ones(1, 8, dtype=torch.float64)

    @torch.no_grad()
    def ask() -> Tensor:
        return layer(x)

    expected = ask()
    return [merge_and_call(served)[0], lambda: near(ask(), expected)]


def swap_and_call(served: Served) -> Sequence[Callable[[], bool]]:
    """One gives an adapter the values of another and its own again; the other sees it before or after."""
    states = [adapter.state_dict() for adapter in served.adapters[:2]]
    served.adapters[0].load_state_dict(states[1])
    with torch.no_grad():
        other = served.model(served.x)
    served.adapters[0].load_state_dict(states[0])

    def swap() -> bool:
        for state in reversed(states):
            served.adapters[0].load_state_dict(state)
        return True

    return [swap, lambda: near(served.of(nullcontext), served.together, other)]


def attach_and_call(served: Served) -> Sequence[Callable[[], bool]]:
    """One loads a copy of an adapter and takes it away again."""
    saved = served.adapters[0].state_dict()
    more = svdpeft.load(served.model, saved, name="more")
    with torch.no_grad():
        other = served.model(served.x)
    more.detach()

    def come_and_go() -> bool:
        svdpeft.load(served.model, saved, name="more").detach()
        return True

    return [come_and_go, lambda: near(served.of(nullcontext), served.together, other)]


def train_and_off(served: Served) -> Sequence[Callable[[], bool]]:
    """One computes gradients, the other asks the base."""
    parameters = [p for adapter in served.adapters for p in adapter.parameters()]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(served.model(served.x).square().sum(), parameters))

    expected = gradients()

    def train() -> bool:
        return all(near(one, other) for one, other in zip(gradients(), expected, strict=True))

    def reference() -> bool:
        return near(served.of(served.adapters[0].disabled), served.without["a"])

    return [train, reference]


PAIRS = (off_and_off, rows_and_rows, merge_and_call, merge_and_part, swap_and_call, attach_and_call, train_and_off)


# -- a server ---------------------------------------------------------------------------------------------------------


def serve(served: Served, seed: int) -> Callable[[], bool]:
    """A worker: requests for one adapter, for the base, for all, for rows of several; now and then a change."""
    draw = random.Random(seed)
    state = served.adapters[2].state_dict()
    named = [*NAMES, None]

    def request() -> bool:
        kind, name = draw.random(), draw.choice(named)
        if kind < 0.4:
            return near(served.of(lambda: svdpeft.using(served.model, *([name] if name else []))), served.alone[name])
        if kind < 0.6:
            which = draw.randrange(2)  # and not c, which may be merged
            return near(served.of(served.adapters[which].disabled), served.without[NAMES[which]])
        if kind < 0.8:
            names = [draw.choice(named) for _ in range(4)]
            expected = torch.stack([served.alone[name][row] for row, name in enumerate(names)])
            return near(served.of(lambda: served.adapters[0].per_example(names)), expected)
        if kind < 0.98:
            return near(served.of(nullcontext), served.together)
        if kind < 0.99:
            served.adapters[2].load_state_dict(state)
            return True
        svdpeft.load(served.model, state, name=f"of worker {seed}", enabled=False).detach()
        return True

    return request


def server(seconds: float, threads: int = 8) -> Counter[str]:
    served = Served()
    return together(seconds, *(serve(served, seed) for seed in range(threads)))


def main(seconds: float) -> None:
    """Half of the time for the pairs, half for the server; ends with an error unless everything was right."""
    torch.set_num_threads(1)
    bad = False
    for pair in PAIRS:
        counts = together(seconds / 2 / len(PAIRS), *pair(Served()))
        print(f"{pair.__name__}: {dict(counts)}", flush=True)
        bad |= set(counts) != {"right"}
    counts = server(seconds / 2)
    print(f"8 threads, 3 adapters: {dict(counts)}")
    time.sleep(
        1
    )  # a thread that has gone backward takes the interpreter's lock once more when it ends (torch's "context")
    sys.exit(bad or set(counts) != {"right"})


if __name__ == "__main__":
    main(float(sys.argv[1]))
