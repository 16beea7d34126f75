"""What a reader of ``layer.weight`` means, in a table that any Python runs: it needs the standard library alone.

``python readers_table.py svdpeft/sites/readers.py`` prints the rows that are told wrongly.
"""

import operator
import runpy
import sys

# W is the weight; the rest are names of the program that reads it.
QUESTIONS = [
    "W.dtype",
    "W.shape[0]",
    "W.size(0)",
    "W.is_floating_point()",
    "f'{W.ndim}'",
    "len(W)",
    "type(W)",
    "id(W)",
    "isinstance(W, Tensor)",
    "isinstance(W, names.Tensor)",
    "isinstance(W, (Tensor, names.Tensor))",
    "use(Tensor, isinstance(W, Tensor), len(W))",
    "not isinstance(W, Tensor) or W.dtype == 1",
]
USES = [
    "W",
    "W.T",
    "W.T.dtype",
    "W[0].dtype",
    "-W",
    "use(W).dtype",
    "(W, 1)[0].dtype",
    "(seen := W).dtype",
    "len([W])",
    "len(use(W))",
    "(len, W)",
    "use(len, W)",
    "use(len, use(W))",
    "(len, keep(W))",  # a local function between: in Python 3.10 nothing in the code lies between them
    "isinstance(use(W), Tensor)",
    "isinstance(W.T, Tensor)",
    "use(isinstance, W)",
    "use(isinstance, W, Tensor)",
    "[isinstance, W, Tensor]",
    "(isinstance, W, use(Tensor, 1))",
    "{isinstance: W}",
    "[len, *W]",
    "use(type, w=W)",
    # C code reads it, and what follows is asked of its result.
    "weight_of(layer).dtype",
    "len(weight_of(layer))",
]
PROGRAMS = {
    "local": "def read(layer, keep):\n    return {layer}",
    "attribute": "def read(layer, keep):\n    self = names\n    self.layer = layer\n    return {self.layer}",
    "closure": "def read(layer, keep):\n    def inner():\n        return {layer}\n    return inner()",
    "comprehension": "def read(layer, keep):\n    return [{layer} for _ in [1]][0]",
    "generator": "def read(layer, keep):\n    def inner():\n        yield {layer}\n    return next(inner())",
    "coroutine": (
        "def read(layer, keep):\n    async def inner():\n        return {layer}\n"
        "    try:\n        inner().send(None)\n    except StopIteration as end:\n        return end.value"
    ),
    "handler": "def read(layer, keep):\n    try:\n        raise KeyError\n    except KeyError:\n        return {layer}",
    # More than 256 names and values: arguments of more than one byte, and jumps.
    "long": "def read(layer, keep):\n    if layer is None:\n        "
    + "; ".join(f"x{n} = names.n{n} + {n}.5" for n in range(300))
    + "\n    return {layer}",
}


class Tensor:
    """Stands for a weight: everything can be asked of it, and everything done."""

    dtype = ndim = 1
    shape = (1, 1)
    T = property(lambda self: self)
    __getitem__ = __neg__ = lambda self, *_: self

    def __iter__(self):
        return iter([self])

    def __len__(self):
        return 1

    def size(self, dim):
        return 1

    def is_floating_point(self):
        return True


class Names:
    """Any attribute."""

    Tensor = Tensor

    def __getattr__(self, name):
        return 0


def told_wrongly(means_parameter):
    """Return (program, expression, what the readers were taken to mean) of the rows that are told wrongly."""
    told = []

    class Layer:
        @property
        def weight(self):
            told.append(means_parameter(sys._getframe(1)))
            return Tensor()

    def use(*values, **named):
        return values[0] if values else named

    def run(source, shadowed=()):
        names = {"__name__": "stranger", "Tensor": Tensor, "use": use, "weight_of": operator.attrgetter("weight")}
        names.update({"names": Names()}, **dict.fromkeys(shadowed, use))
        exec(source, names)
        told.clear()
        for _ in range(50):  # often enough for the specialised instructions of a hot function
            names["read"](Layer(), use)
        return set(told)

    wrong = []
    before = sys.gettrace()
    for traced in (False, True):  # a debugger or a measure of coverage
        sys.settrace((lambda *event: None) if traced else before)
        for name, program in PROGRAMS.items():
            for expressions, right in ((QUESTIONS, True), (USES, False)):
                for expression in expressions:
                    source = program
                    for place in ("layer", "self.layer"):
                        text = expression.replace("W", f"{place}.weight").replace("(layer)", f"({place})")
                        source = source.replace(f"{{{place}}}", text)
                    found = run(source)
                    if found != {right}:
                        wrong.append((name, expression, found))
    sys.settrace(before)
    for function in ("len", "type", "id", "isinstance"):  # of the program itself: it may do anything
        found = run(f"def read(layer, keep):\n    return {function}(layer.weight)", shadowed=[function])
        if found != {False}:
            wrong.append(("shadowed", function, found))
    return wrong


if __name__ == "__main__":
    rows = told_wrongly(runpy.run_path(sys.argv[1])["means_parameter"])
    print(*rows, sep="\n")
    sys.exit(bool(rows))
