"""One file per method; a new file that registers a class is a new method. Called, the package lists their names.

    >>> import svdpeft
    >>> "sorsa" in svdpeft.methods()
    True

So ``svdpeft.methods`` is one thing under one name, the package that ``import svdpeft.methods.lora`` finds and the
function that lists what is in it.
"""

import sys
from types import ModuleType

from svdpeft.registry import METHODS


class _Methods(ModuleType):
    def __call__(self) -> list[str]:
        """Return the names of all methods."""
        return list(METHODS)


sys.modules[__name__].__class__ = _Methods
