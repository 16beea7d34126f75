"""Changes of a model take turns with what other threads do with it: their calls, their blocks and their trainings.

Nothing is counted or locked while nothing changes. A change puts a hook before the calls of the model and of its parts,
in which those that begin wait, and looks at the stacks of the other threads: one with a method of the model, or of a
part of it, calls it.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from svdpeft.adapter.stacks import Others, owner, stack
from svdpeft.sites.scope import scope, within
from svdpeft.targets.wrappers import unwrapped

PATIENCE = 60.0  # seconds after which one that waits for another gives up
TRAINING = "a training"
BETWEEN = 0.0005  # seconds between two looks at what others do
F = TypeVar("F", bound=Callable[..., Any])


class Block:
    """A block that holds for the calls of one thread or task.

    Args:
        what: it is, for messages.
        firm: nothing may change in it, not even by its own thread.
    """

    def __init__(self, what: str, firm: bool) -> None:
        self.what, self.firm, self.thread = what, firm, threading.get_ident()


class Turns:
    """Who has the turn at one model, and who else is at work with it.

    Args:
        model: of which it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.changes = threading.RLock()  # of whoever changes the model, or prepares it
        self.changing = ""  # what that is
        self.lock = threading.RLock()  # of whoever changes it now, for which calls and blocks wait
        self.owner: int | None = None  # its thread
        self.alone = False  # it changes the model now, or looks whether it can
        self.waiting: set[int] = set()  # threads whose calls have not begun
        self.blocks: set[Block] = set()
        self.trainings: dict[int, tuple[CodeType, str]] = {}  # by thread: what runs on its stack as long as it trains

    def __reduce__(self) -> Any:  # asked for where the hook is in the model
        raise RuntimeError(
            f"a copy would for ever stay as the model is during {self.changing}: copy it before, or after"
        )

    @contextmanager
    def block(self, what: str, firm: bool = False) -> Iterator[None]:
        """Within the block no other thread changes the model."""
        block = Block(what, firm)
        alone = self._acquire(self.lock, what, sys._getframe(1))
        self.blocks.add(block)
        if alone:
            self.lock.release()
        try:
            with within({block: True}):
                yield
        finally:
            self.blocks.discard(block)

    @contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """Within the block this thread looks at the model, and may change it: calls and blocks go on, no other changes.

        Args:
            what: happens, for messages.

        Raises:
            RuntimeError: another thread is at it for longer than one can wait, or would wait for this thread, which is
                in a block or in a call; this thread is in a block in which nothing may change.
        """
        here = scope() or {}
        if firm := next((block for block in list(self.blocks) if block.firm and block in here), None):
            raise RuntimeError(f"{what} is impossible in a {firm.what} block: leave the block first")
        if not self._acquire(self.changes, what, sys._getframe(1)):
            raise RuntimeError(f"{what} is impossible here: {self.changing} waits for what this thread is in")
        before, self.changing = self.changing, f"{what} in {_name(threading.get_ident())}"
        try:
            yield
        finally:
            self.changing = before
            self.changes.release()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Within the block no other thread is in a call of the model, nor in a block.

        Args:
            what: happens to it, for messages.

        Raises:
            RuntimeError: as for ``preparing``; another thread trains the model, or is in a call or a block for longer
                than one can wait.
        """
        with self.preparing(what):
            if self.owner == threading.get_ident():
                yield
                return
            with self.lock:
                hooks = [part.register_forward_pre_hook(self._wait, prepend=True) for part in self._model.modules()]
                try:
                    self.owner = threading.get_ident()
                    self._until_alone(what, scope() or {})
                    yield
                finally:
                    self.owner, self.alone = None, False
                    for hook in hooks:
                        hook.remove()

    def train(self, adapter: str) -> None:
        """Note that this thread trains an adapter, until the function that calls its callbacks has returned."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").endswith("callback"):
            frame = frame.f_back
        self.trainings[threading.get_ident()] = frame.f_code, f"{TRAINING} of adapter {adapter!r}"

    @property
    def _model(self) -> nn.Module:
        model = self.model()
        assert model is not None
        return model

    def _acquire(self, lock: Any, what: str, frame: FrameType | None) -> bool:
        """Take a lock; not where this thread is in a block of its own or, above the frame, in a call: who has the lock
        has not changed anything, and waits for it."""
        if lock.acquire(blocking=False):
            return True
        here = scope() or {}
        if any(block in here for block in list(self.blocks)) or self._calls(stack(frame)) is not None:
            return False
        self.waiting.add(threading.get_ident())
        try:
            if not lock.acquire(timeout=PATIENCE):
                raise RuntimeError(f"{what} has waited {PATIENCE:g} s for {self.changing}")
        finally:
            self.waiting.discard(threading.get_ident())  # while it has the lock, and nobody else looks
        return True

    def _until_alone(self, what: str, here: Mapping[Any, Any]) -> None:
        others, end = Others(), time.monotonic() + PATIENCE
        self.alone = True  # before each look: a call is seen in it, or sees this
        while (other := self._training(others) or self._block(here) or self._call(others)) is not None:
            self.alone = False
            which, thread = other
            if which.startswith(TRAINING) or thread == threading.get_ident():  # which waiting does not end
                raise RuntimeError(f"{what} is impossible beside {which} in {_name(thread)}")
            if time.monotonic() > end:
                raise RuntimeError(f"{what} has waited {PATIENCE:g} s for {which} in {_name(thread)}")
            time.sleep(BETWEEN)
            self.alone = True

    def _block(self, here: Mapping[Any, Any]) -> tuple[str, int] | None:
        """A block of another thread or task, and the thread."""
        return next(((block.what, block.thread) for block in list(self.blocks) if block not in here), None)

    def _call(self, others: Others) -> tuple[str, int] | None:
        """A call of the model in another thread, and the thread."""
        stacks = others.stacks()
        for thread in stacks.keys() - self.waiting:
            if (call := self._calls(stacks[thread], others.owner)) is not None:
                return f"{type(others.owner(call)).__name__}.{call.f_code.co_name}()", thread
        return None

    def _calls(self, frames: Iterable[FrameType], owner: Callable[[FrameType], object] = owner) -> FrameType | None:
        """Where a stack is in a method of the model, or of a part of it."""
        parts = self._parts()
        ids, classes, own = set(map(id, parts)), set(map(type, parts)), vars(self._model)

        def named(method: str) -> bool:
            return method in own or any(hasattr(cls, method) for cls in classes)

        return next((frame for frame in frames if named(frame.f_code.co_name) and id(owner(frame)) in ids), None)

    def _parts(self) -> list[nn.Module]:
        while True:
            try:
                return list(self._model.modules())
            except RuntimeError:  # whoever has the turn puts a child into a layer, or takes it out
                time.sleep(0)

    def _training(self, others: Others) -> tuple[str, int] | None:
        """A training in another thread, and the thread."""
        stacks, me = others.stacks(), threading.get_ident()
        for thread, (code, what) in list(self.trainings.items()):
            frames = stack(sys._getframe()) if thread == me else stacks.get(thread, [])
            if all(frame.f_code is not code for frame in frames):
                self.trainings.pop(thread, None)  # it has ended, perhaps by an error
            elif thread != me:
                return what, thread
        return None

    def _wait(self, part: nn.Module, args: Any) -> None:
        """Let a call wait that begins while the model changes.

        As long as the change waits itself, a call goes on that is part of one which runs already, and so does a call of
        a part, for which one that runs may wait in a thread of its own: the change sees both.
        """
        if torch.compiler.is_compiling() or self.owner in (None, me := threading.get_ident()) or _recomputes(me):
            return
        what = f"a call of the {type(part).__name__}"
        own = ("inner", "_call_impl", "_wrapped_call_impl")  # torch's frames of the call that begins
        around = next((frame for frame in stack(sys._getframe(1)) if frame.f_code.co_name not in own), None)
        if part is self.model() and self._acquire(self.lock, what, around):
            self.lock.release()
        begins, end = self._calls(stack(around)) is None, time.monotonic() + PATIENCE
        while self.alone:
            if time.monotonic() > end:
                raise RuntimeError(f"{what} has waited {PATIENCE:g} s for {self.changing}")
            if begins:  # a change need not wait for it
                self.waiting.add(me)
            time.sleep(BETWEEN)
            self.waiting.discard(me)  # before the next look at whether there is one


_turns: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def turns(model: nn.Module) -> Turns:
    """The turns at a model; a copy of it has turns of its own."""
    with _making:
        return _turns.setdefault(model, Turns(model))


def prepares(function: F) -> F:
    """Let a function prepare a change of the model that is its first argument."""

    @functools.wraps(function)
    def prepared(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with turns(unwrapped(model)).preparing(f"{function.__name__}()"):
            return function(model, *args, **kwargs)

    return cast(F, prepared)


def changes(method: F) -> F:
    """Let a method of an adapter have its turn at the adapter's model."""

    @functools.wraps(method)
    def alone(adapter: Any, *args: Any, **kwargs: Any) -> Any:
        if adapter.state == "detached":
            return method(adapter, *args, **kwargs)
        with turns(adapter.model).change(f"{method.__name__}() of adapter {adapter.name!r}"):
            return method(adapter, *args, **kwargs)

    return cast(F, alone)


def _recomputes(thread: int) -> bool:
    """Whether this is a thread of autograd's, as a GPU has one: whoever has the turn may wait for its ``backward``."""
    return torch._C._current_graph_task_id() != -1 and all(each.ident != thread for each in threading.enumerate())


def _name(thread: int | None) -> str:
    return next((f"thread {t.name!r}" for t in threading.enumerate() if t.ident == thread), "another thread")
