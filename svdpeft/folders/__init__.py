"""Models that are larger than memory: what is done to them from folder to folder, one tensor at a time."""

from svdpeft.folders.decomposing import Decomposed, decompose
from svdpeft.folders.extracting import Extracted, extract
from svdpeft.folders.merging import merge
from svdpeft.folders.opened import opened

__all__ = ["Decomposed", "Extracted", "decompose", "extract", "merge", "opened"]
