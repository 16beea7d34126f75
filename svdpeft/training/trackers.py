"""What a training may tell its logs to."""

from __future__ import annotations

from svdpeft.registry import near_miss


def check_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed, before anything is trained.

    Raises:
        ValueError: with the near miss, or what to install.
    """
    if name == "none":
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    if name not in INTEGRATION_TO_CALLBACK:
        near = near_miss(name, INTEGRATION_TO_CALLBACK)
        raise ValueError(f"tracker {name!r} is not one that transformers knows: {near}")
    if name not in get_available_reporting_integrations():
        raise ValueError(f"tracker {name!r} is not installed: pip install {name}")
