"""Files of safetensors written tensor by tensor, and which tensor goes into which file.

A file is 8 bytes with the length of its header, the header as JSON, and the bytes of the tensors. ``save_file`` wants
all of them at once; here a tensor, or a part of one, is made when its turn has come, while what was before is written,
and is gone then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdpeft.folders.folder import SINGLE, Entry


def write(
    path: Path, entries: Mapping[str, Entry], value: Callable[[str], Iterable[Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file of safetensors.

    Args:
        path: of the new file.
        entries: name -> what will be written under it.
        value: gives the tensor of a name, in parts of consecutive rows; it is asked once for each.
        metadata: of the file.
    """
    # The widest numbers first, so that all of them are aligned, as safetensors' own writer does.
    order = sorted(entries, key=lambda name: (-entries[name].size // max(math.prod(entries[name].shape), 1), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.size
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, len(text).to_bytes(8, "little") + text)
        for name in order:
            size = 0
            for part in value(name):  # is made while the one before goes to the disk
                assert part.shape[1:] == entries[name].shape[1:], name
                size += part.nbytes
                written.result()
                written = writer.submit(file.write, part.contiguous().flatten().view(torch.uint8).numpy().data)
            assert size == entries[name].size, name
        written.result()


def partition(entries: Mapping[str, Entry], shard_size: int | str) -> dict[str, Entry]:
    """The same tensors in files of at most a size.

    Raises:
        ValueError: it is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.size,
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=int(shard_size) if str(shard_size).isdigit() else shard_size,
    )
    return {name: entries[name]._replace(file=file) for name, file in split.tensor_to_filename.items()}
