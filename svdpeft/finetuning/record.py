"""What a training has left beside its adapter: the model that it was for."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = "training.json"


def base_of(adapter: Path, asked: str | None) -> str:
    """Return the name of the model that an adapter is for: what the user says, else what its training has written.

    Args:
        adapter: its folder.
        asked: name of a model, as ``svdpeft.models.load`` takes it.

    Raises:
        ValueError: nobody says it.
    """
    if asked is not None:
        return asked
    try:
        found = json.loads((adapter / RECORD).read_text())["settings"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{adapter} does not say which model it is for (no {RECORD}): give --base") from error
    return str(found)
