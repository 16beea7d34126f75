"""The adapter file: one folder with ``adapter.safetensors`` (tensors) and ``adapter.json`` (everything else).

It holds frozen factors and start values too, so that loading decomposes nothing and depends on no random state; or,
where those are large, what they are found again by (``deriving``). It names the base it was made for by a hash of every
adapted weight, and refuses another.

The tensors' file carries the header as well, and is all that is read: two files cannot be replaced in one step, so that
a crash, or another process, may leave one of another save, or none, beside it. ``adapter.json`` is for people, and for
files of earlier revisions, whose tensors carry no header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdpeft.adapter.packing import unpacked
from svdpeft.decomposition import has_digest
from svdpeft.layers.base import LayerKind
from svdpeft.methods.base import Method, PerSite, Transform
from svdpeft.registry import METHODS
from svdpeft.sites.site import Site

FORMAT, WITHOUT_BASES = 3, 4  # the second leaves out what can be found again in the weights
TENSORS, HEADER = "adapter.safetensors", "adapter.json"
FOLDER = "adapter"  # of an adapter beside other things, as in a trainer's checkpoint
KEYS = {"name", "methods", "patterns", "sites", "whole", "skipped", "batch_norm"}  # of the header
SITE_KEYS = {"places", "part", "method", "shape", "dtype", "hash", "tensors", "tied"}
NEUTRAL = {"alpha": None, "rs": False, "allocate": None}  # what earlier revisions wrote of methods that have none
PLACE_KEYS = {"layer", "parameter", "kind", "axes"}
DIGESTS = "digests"  # of the tensors by name, in the header; earlier revisions wrote none
# What contents can bring about in Python, torch, safetensors and the constructors of methods and kinds. No check in
# front of these could say it all again; and it is not Exception, so that a name of ours that does not exist, or a
# warning that is an error, is not taken for a damaged file. Whatever it was is the error's cause.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, re.error, SafetensorError),
)


class CheckpointError(ValueError):
    """The folder is not an adapter for this model; the model is as it was.

    Args:
        message: what is wrong.
        dtype: of the weights that the adapter was made for, such as ``"bfloat16"``, where these have another.
    """

    def __init__(self, message: str, dtype: str | None = None) -> None:
        super().__init__(message)
        self.dtype = dtype


def rounded(there: list[float], here: list[float], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether two samples are of one weight in two precisions.

    Args:
        there: of the weight that an adapter was made for.
        here: of a model's.
        dtypes: of both.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    least = max(torch.finfo(dtype).tiny for dtype in dtypes)
    close = (abs(a - b) <= eps * max(abs(a), abs(b)) + least for a, b in zip(there, here, strict=False))
    return len(there) == len(here) and all(close)


def held(sites: Mapping[str, Site]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Per site the tensors that are written under its name, and shared role -> the first site that has the tensor."""
    holders: dict[int, str] = {}
    found = {}
    for name, site in sites.items():
        factors = site.factors
        tied = {role: holders.setdefault(id(getattr(factors, role)), name) for role in factors.tied}
        tensors = [*factors.named_parameters(), *factors.named_buffers()]  # themselves: a shard knows the others
        found[name] = ({role: t for role, t in tensors if tied.get(role, name) == name}, tied)
    return found


def free_parts(uses: Iterable[tuple[int, PerSite, LayerKind]]) -> dict[int, list[LayerKind]]:
    """What of the weights does not matter to an adapter, since it has values of its own for that.

    Args:
        uses: of each site the identity of its weight, the method, and the kind as which it sees the weight.

    Returns:
        By weight. Nothing of one is free where a method beside makes another function of all of it.
    """
    found: dict[int, list[LayerKind]] = {}
    bound = set()
    for weight, method, kind in uses:
        found.setdefault(weight, []).extend([] if method.depends_on_base else [kind])
        if isinstance(method, Transform) and method.depends_on_base:
            bound.add(weight)
    return {weight: [] if weight in bound else kinds for weight, kinds in found.items()}


def free_of(sites: Iterable[Site]) -> dict[int, list[LayerKind]]:
    """``free_parts`` of sites, by the identity of the records of their weights."""
    return free_parts((id(site.weight), site.method, site.kind) for site in sites)


def identified(header: dict[str, Any]) -> dict[str, Any]:
    """The header with a name for what it says, by which it is known in both files."""
    return {**header, "id": hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()}


def check_ours(path: Path) -> None:
    """Refuse to write an adapter where it would replace a file of somebody else.

    Raises:
        FileExistsError: ``path`` is a file, or one of the two files there is not one that svdpeft has written.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: an adapter is a folder")
    header, tensors = path / HEADER, path / TENSORS
    ours = header.is_file() and _holds_header(header)
    for file, known in ((header, ours), (tensors, ours or (tensors.is_file() and _carries_header(tensors)))):
        if file.exists() and not known:
            raise FileExistsError(
                f"{file} is damaged or was not written by svdpeft: it is not overwritten; move it away, or save to "
                "another folder"
            )


def _is_header(found: Any) -> bool:
    return isinstance(found, dict) and {"format", "sites"} <= found.keys()


def _holds_header(file: Path) -> bool:
    try:
        return _is_header(json.loads(file.read_text()))
    except (RecursionError, ValueError):  # no JSON, or no text
        return False


def _carries_header(file: Path) -> bool:
    try:
        with safe_open(file, "numpy") as opened:  # opens the file once
            return HEADER in (opened.metadata() or {})
    except SafetensorError:
        return False


class State(NamedTuple):
    """An adapter in memory, as its file of tensors has it: ``save_file(state.tensors, path, metadata=state.metadata)``.

    Args:
        tensors: by name.
        metadata: the header, as one text under the name of its file.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


torch.serialization.add_safe_globals([State])  # torch.load reads one with weights_only, its default

Source = str | os.PathLike[str] | State


@contextmanager
def undamaged(path: Path, part: str = "", kind: type[ValueError] = CheckpointError) -> Iterator[None]:
    """What goes wrong within the block is the fault of what was read, and is told with its name.

    Args:
        path: of what was read.
        part: words in front of it, such as ``"the header of "``.
        kind: of the error; one that is raised in the block passes as it is if it names the path.
    """
    try:
        yield
    except kind as error:
        if str(path) in str(error):
            raise
        raise kind(f"{part}{path}: {error}") from error
    except DAMAGE as error:
        raise kind(f"{part}{path} is damaged or cut off: {type(error).__name__}: {error}") from error


def read(source: Source, verify: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Return header and tensors of an adapter, and what to call it in messages.

    Args:
        source: its folder, or one with a folder ``adapter`` in it, as a training leaves it; its file of tensors; or its
            state.
        verify: compare everything with the digests that were written with it.

    Raises:
        CheckpointError: no adapter there, a cut-off file, another format version, another digest.
    """
    where = Path("the state") if isinstance(source, State) else Path(source)
    with undamaged(where):
        if isinstance(source, State):
            header, tensors = _parsed(source.metadata.get(HEADER, "")), dict(source.tensors)
        else:
            inner = where / FOLDER
            where = inner if not (where / TENSORS).is_file() and (inner / TENSORS).is_file() else where
            header, tensors = _of_file(where) if where.is_file() else _of_folder(where)
        version = header.get("format") if isinstance(header, dict) else None
        if version not in (FORMAT, WITHOUT_BASES):
            known = f"this version of svdpeft reads format {FORMAT} and {WITHOUT_BASES}"
            raise CheckpointError(f"the header of {where} has format {version}; {known}")
        if missing := KEYS - header.keys():
            raise CheckpointError(f"the header of {where} is damaged: it lacks {', '.join(sorted(missing))}")
        if verify:
            _verify(header, tensors, where)
        packed = {name: unpacked(tensors[name], shape) for name, shape in header.get("packed", {}).items()}
    return header, tensors | packed, where


def _verify(header: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> None:
    if DIGESTS not in header:
        raise CheckpointError(f"{where} cannot be verified: it was written before digests were; save it again")
    if identified({key: value for key, value in header.items() if key != "id"}) != header:
        raise CheckpointError(f"the header of {where} is not as it was written")
    if other := header[DIGESTS].keys() ^ tensors.keys():
        raise CheckpointError(f"{where} is not as it was written: {min(other)} is missing, or was added")
    if bad := [name for name, tensor in tensors.items() if not has_digest(tensor, header[DIGESTS][name])]:
        raise CheckpointError(f"{where} is not as it was written: the values of {', '.join(sorted(bad)[:3])} differ")


def _of_folder(path: Path) -> tuple[Any, dict[str, Tensor]]:
    if not (path / TENSORS).is_file():
        raise CheckpointError(f"{path} is not an adapter folder: it must hold {TENSORS}")
    header, tensors = _of_file(path / TENSORS)
    if header is None:  # of an earlier revision
        if not (path / HEADER).is_file():
            raise CheckpointError(f"{path} is not an adapter folder: {TENSORS} has no header, and there is no {HEADER}")
        header = _parsed((path / HEADER).read_text())
    return header, tensors


def _of_file(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """The header, ``None`` where the file has none, and the tensors."""
    metadata, tensors = read_tensors(file)
    return _parsed(metadata[HEADER]) if HEADER in metadata else None, tensors


def read_tensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file of safetensors, both of the same one.

    safetensors opens a file twice, for the header and for the tensors, and another process may replace it in between:
    then it is read again. The file that is held open cannot lend its number on the disk to a new one.
    """
    while True:
        with file.open("rb") as held:
            try:
                with safe_open(file, "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
                    metadata = opened.metadata() or {}
            except (OSError, RuntimeError, SafetensorError):
                if os.path.samestat(os.fstat(held.fileno()), os.stat(file)):
                    raise
                continue
            if os.path.samestat(os.fstat(held.fileno()), os.stat(file)):
                return metadata, tensors


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_refused)


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def renamed(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], beginnings: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter of a model whose modules have other names there than here.

    Args:
        header: of the adapter.
        tensors: of the adapter.
        beginnings: of names -> what stands here instead, such as ``{"model.": "backbone."}``; the first that a name
            begins with. An empty one puts something before all names.

    Raises:
        ValueError: one with which no name begins, two names that become one.
    """
    used: set[str] = set()

    def new(name: str) -> str:
        for begin, instead in beginnings.items():
            rest = name.removeprefix(begin)
            if name.startswith(begin) and (begin in ("", name) or begin[-1] == "." or rest[0] in ".["):
                used.add(begin)
                dot = "." if not begin and instead and rest and instead[-1] != "." else ""
                return f"{instead}{dot}{rest}" if rest else instead.rstrip(".")
        return name

    def of_tensor(name: str) -> str:
        site, slash, role = name.rpartition("/")
        return f"{new(site)}/{role}" if slash and site in header["sites"] else new(name)

    sites = {}
    for site, entry in header["sites"].items():
        places = [{**place, "layer": new(place["layer"])} for place in entry["places"]]
        sites[new(site)] = {
            **entry,
            "places": places,
            "tied": {role: new(holder) for role, holder in entry["tied"].items()},
        }
    whole = [new(name) for name in header["whole"]]
    skipped = {new(name): why for name, why in header["skipped"].items()}
    values = {of_tensor(name): tensor for name, tensor in tensors.items()}
    if unused := [begin for begin in beginnings if begin not in used]:
        raise ValueError(
            f"rename: no name begins with {unused[0]!r}: they are {', '.join(list(header['sites'])[:3])}, …"
        )
    if len(sites) < len(header["sites"]) or len(values) < len(tensors):
        raise ValueError(f"rename={dict(beginnings)} gives two names the same one")
    return {**header, "sites": sites, "whole": whole, "skipped": skipped}, values


def method_in(entry: Mapping[str, Any], path: Path) -> Method:
    """Return the method that an entry of a header describes.

    Raises:
        CheckpointError: no method has the name, or such hyper-parameters.
    """
    try:
        fields = _without_neutral(entry)
        return METHODS[fields.pop("name")](**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the header of {path}: {error}") from error


def _without_neutral(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a method, and of methods in it, without hyper-parameters that it does not have and that say so."""
    known = {field.name for field in dataclasses.fields(METHODS[entry["name"]])}
    return {
        key: _without_neutral(value) if isinstance(value, dict) and "name" in value else value
        for key, value in entry.items()
        if key in known or key not in NEUTRAL or value != NEUTRAL[key]
    }
