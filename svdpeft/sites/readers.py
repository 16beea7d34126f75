"""Who reads ``layer.weight``, and what for: not everybody who asks an adapted layer for its weight means W0 + ΔW.

Machinery that shards, initialises or looks up parameters means the parameter itself. And ``layer.weight.dtype`` needs
no weight at all: transformers' T5 asks so before every call, and building ΔW for the answer would take longer than it.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType, FrameType

MACHINERY = (
    "torch.distributed.",
    "torch.nn.modules.module",  # get_parameter
    "torch.nn.init",
    "torch.nn.utils.",  # weight_norm, pruning
    "transformers.modeling_utils",  # resizes and ties embeddings
)
TRACED_BY_FX = "<eval_with_key>"  # its code holds the additions of ΔW already
ASKS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "layout", "itemsize"}
ASKS |= {"size", "dim", "numel", "is_floating_point", "element_size"}
FUNCTIONS = {"isinstance", "len", "type", "id"}


def means_parameter(reader: FrameType) -> bool:
    """Whether the frame that reads the attribute means the parameter as it is stored."""
    if reader.f_globals.get("__name__", "").startswith(MACHINERY) or reader.f_code.co_filename.startswith(TRACED_BY_FX):
        return True
    return _asks(reader.f_code, reader.f_lasti)


@functools.lru_cache(maxsize=4096)
def _asks(code: CodeType, at: int) -> bool:
    """Whether the code at this point says something about a tensor: ``w.dtype``, ``isinstance(w, …)``, ``len(w)``."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    here = next((n for n, i in enumerate(instructions) if i.offset == at), None)
    if here is None or here + 1 == len(instructions):
        return False
    after = instructions[here + 1]
    if after.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.argval in ASKS:
        return True
    while here and instructions[here].opname.startswith(("LOAD_ATTR", "LOAD_FAST", "LOAD_DEREF")):
        here -= 1  # back over ``self.layer.weight`` to the function that it is given to
    return instructions[here].opname == "LOAD_GLOBAL" and instructions[here].argval in FUNCTIONS
