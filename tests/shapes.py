"""Shapes are checked in the test run: what an annotation of jaxtyping says holds at every call, or the test fails.

Imported before svdpeft (conftest.py at the root), whose functions are wrapped as they are defined. Only annotations
that say a shape are checked: a wrong hyper-parameter is still refused by the library's own words. A method that says
nothing itself is held to what it overrides. Outside of the test run the annotations are only read.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from beartype import beartype
from torch import Tensor

MODULES = ["svdpeft.decomposition", "svdpeft.layers", "svdpeft.methods", "svdpeft.sites"]
SHAPED = ("Bool[", "Float[", "Int[")
jaxtyped, compiling = jaxtyping.jaxtyped, torch.compiler.is_compiling


def says(fn: Any) -> dict[str, Any]:
    """The annotations of a function that say a shape, by the name of the argument; ``return`` is the result's."""
    if not isinstance(fn, FunctionType):
        return {}
    texts = {name: getattr(text, "__forward_arg__", text) for name, text in fn.__annotations__.items()}
    names = inspect.unwrap(fn).__globals__
    return {name: eval(text, names) for name, text in texts.items() if any(word in str(text) for word in SHAPED)}


def sizes(values: Iterable[Any]) -> tuple:
    """What a verdict on shapes depends on: shapes, dtypes and whole numbers."""
    return tuple([size(v) for v in values])


def size(v: Any) -> Any:
    if isinstance(v, Tensor):
        return v.dtype, v.shape
    if v is None or isinstance(v, int):
        return v
    return sizes(v) if isinstance(v, tuple) else type(v)


def shapeless(v: Any) -> bool:
    """A nested tensor, or what torch compiles with in the place of a tensor: torch 2.11 makes named tuples of it."""
    return v.is_nested if isinstance(v, Tensor) else type(v).__module__.startswith("torch._dynamo.")


def checked(fn: FunctionType, shapes: dict[str, Any]) -> Callable:
    """The function with a check of its arguments and its result; not while torch compiles, which would compile it."""
    look, is_compiling = looking(fn, shapes), compiling  # the code below has its names from here alone

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if is_compiling() else look(args, kwargs)

    # With the globals of the module that it is in: else doctest takes it for another module's.
    return functools.update_wrapper(FunctionType(call.__code__, fn.__globals__, closure=call.__closure__), fn)


def looking(fn: FunctionType, shapes: dict[str, Any]) -> Callable:
    """Call the function and look at the shapes; what was right once is right again: the same sizes are seen once."""
    bare = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    functools.update_wrapper(bare, fn)
    del bare.__wrapped__
    bare.__kwdefaults__, bare.__annotations__ = fn.__kwdefaults__, shapes
    results: list[Any] = []  # what the function has returned already, for a look at its shape
    strict = functools.cache(lambda: jaxtyped(bare, typechecker=beartype))  # most are never called in a run
    returned = functools.cache(
        lambda: jaxtyped(functools.wraps(bare)(lambda *args, **kwargs: results.pop()), typechecker=beartype)
    )
    known: dict[tuple, set[tuple]] = {}
    named = dict.fromkeys(re.findall(r"\{(self\b[^}]*)\}", " ".join(map(str, shapes.values()))))
    own = eval(f"lambda self, *_: ({''.join(f'{name}, ' for name in named)})")  # the sizes that self knows

    def call(args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.jit.is_tracing() or any(map(shapeless, (*args, *kwargs.values()))):
            return fn(*args, **kwargs)  # sizes are tensors, or there are none
        given = sizes((*args, *kwargs.items()))
        if named:
            given += own(*args)
        if given not in known:
            result = strict()(*args, **kwargs)
            known[given] = {sizes((result,))}
            return result
        result = fn(*args, **kwargs)
        if (found := sizes((result,))) not in known[given]:
            results.append(result)
            returned()(*args, **kwargs)
            known[given].add(found)
        return result

    return call


def held(cls: type) -> type:
    """Hold a class to the shapes that its bases say of what it overrides, and a named tuple to those of its fields."""
    if hasattr(cls, "_fields"):
        names = vars(inspect.getmodule(cls))
        texts = {name: hint.__forward_arg__ for name, hint in cls.__new__.__annotations__.items()}
        shapes = {name: eval(text, names) for name, text in texts.items() if any(word in text for word in SHAPED)}
        if shapes:
            cls.__new__ = staticmethod(checked(cls.__new__, shapes))
        return cls
    for name, fn in list(vars(cls).items()):
        if isinstance(fn, FunctionType) and not says(fn):
            inherited = next(filter(None, (says(vars(base).get(name)) for base in cls.__mro__[1:])), {})
            shapes = {k: v for k, v in inherited.items() if k in (*inspect.signature(fn).parameters, "return")}
            if shapes:
                setattr(cls, name, checked(fn, shapes))
    return cls


def sparing(*, typechecker: Any) -> Callable:
    """What the import hook decorates every function and every class with."""

    def decorate(found: Any) -> Any:
        if isinstance(found, type):
            return held(found)
        shapes = says(found)
        return checked(found, shapes) if shapes else found

    return decorate


jaxtyping.jaxtyped = sparing  # by this name the hook asks for it
jaxtyping.install_import_hook(MODULES, "beartype.beartype")
