"""Who reads ``layer.weight``, and what for: not everybody who asks an adapted layer for its weight means W0 + ΔW.

Machinery that shards, initialises or looks up parameters means the parameter itself. And ``layer.weight.dtype`` needs
no weight at all: transformers' T5 asks so before every call, and building ΔW for the answer would take longer than it.

The second is told from the bytecode of the reader. Whatever is not surely a question gets W0 + ΔW: a question that is
missed costs time, and nothing else. (A tensor that forms W0 + ΔW when it is first computed with needs no bytecode, but
is another type for everybody who reads a weight, and costs the fused path of ``nn.MultiheadAttention``.)
``tests/test_readers.py`` runs this file on every Python that it finds, so it imports nothing but the standard library.
"""

from __future__ import annotations

import bisect
import dis
import functools
from types import CodeType, FrameType

MACHINERY = (
    "torch.distributed.",
    "torch.nn.modules.module",  # get_parameter
    "torch.nn.init",
    "torch.nn.utils.",  # weight_norm, pruning
    "transformers.modeling_utils",  # resizes and ties embeddings
    "bitsandbytes.",  # its layers know what is in their weights
)
TRACED_BY_FX = "<eval_with_key>"  # its code holds the additions of ΔW already
ASKS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "layout", "itemsize"}
ASKS |= {"size", "dim", "numel", "is_floating_point", "element_size"}
FUNCTIONS = {"isinstance", "len", "type", "id"}

# Names of instructions, over the versions of Python.
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
VARIABLE = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_GLOBAL")
CALL = ("CALL", "CALL_FUNCTION", "PRECALL")


def means_parameter(reader: FrameType) -> bool:
    """Whether the frame that reads the attribute means the parameter as it is stored."""
    if reader.f_globals.get("__name__", "").startswith(MACHINERY) or reader.f_code.co_filename.startswith(TRACED_BY_FX):
        return True
    return _asks(reader.f_code, reader.f_lasti) and FUNCTIONS.isdisjoint(reader.f_globals)


@functools.lru_cache(maxsize=4096)
def _asks(code: CodeType, at: int) -> bool:
    """Whether the code at this point says something about a tensor: ``w.dtype``, ``isinstance(w, …)``, ``len(w)``."""
    instructions, starts = [], []
    start = None
    for instruction in dis.get_instructions(code):
        start = instruction.offset if start is None else start
        if instruction.opname != "EXTENDED_ARG":  # a prefix of the next one: Python 3.10 stays at it
            instructions.append(instruction)
            starts.append(start)
            start = None
    here = bisect.bisect_right(starts, at) - 1  # Python 3.12 goes on to the end of the room behind an instruction
    if instructions[here].opname not in ATTRIBUTE:  # C code reads it, and what follows is done with its result
        return False
    after = instructions[here + 1]
    if after.opname in ATTRIBUTE and after.argval in ASKS:
        return True
    below = here
    while below and instructions[below].opname in ATTRIBUTE:
        below -= 1  # back over ``self.layer.weight``
    variable, function = instructions[below], instructions[below - 1]
    called = function.opname == "LOAD_GLOBAL" and function.argval in FUNCTIONS
    return called and variable.opname in VARIABLE and _first_argument(instructions, here + 1)


def _first_argument(instructions: list[dis.Instruction], here: int) -> bool:
    """Whether what was just loaded is the first argument of the next call: its function lies directly below, then."""
    above = 0  # values that were loaded since
    while (instruction := instructions[here]).opname.startswith(("LOAD_", "BUILD_TUPLE")):
        if not above and instruction.opname in ATTRIBUTE:
            return False  # of the weight
        above += dis.stack_effect(instruction.opcode, instruction.arg)
        here += 1
    return instruction.opname in CALL and instruction.arg == above + 1
