"""What ``save_pretrained`` writes of a transformers model with adapters: no folder that loads as the bare base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from svdpeft.adapter.file import FOLDER
from svdpeft.adapter.roster import adapters_in
from svdpeft.atomic import replacing
from svdpeft.sites.place import is_factor

NAME = "save_pretrained"
ADAPTED = "_hf_peft_config_loaded"  # by it transformers' trainer knows that a quantised model has what trains
README = """\
# An adapter of svdpeft

The weights of the base are not in this folder: only what was trained beside them, in `{folder}`. Load the base as you
have loaded it before, and then

    import svdpeft
    adapter = svdpeft.load(model, "{path}")

For a folder that `from_pretrained` loads by itself, call `adapter.merge(permanent=True)` before `save_pretrained`.
"""


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the factors of adapters: the names of the model as it was before them."""
    return {name: tensor for name, tensor in state.items() if not is_factor(name)}


class SavePretrained:
    """Stands in the place of a model's own ``save_pretrained``; a class and no closure, so that models can be pickled.

    A model whose adapters are all merged, or switched off, is written as the plain model that it is then. With one that
    acts, the adapters are written and the base is not: a folder with both would be loaded as the base alone.

    Args:
        model: with adapters attached to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.told = getattr(model, "hf_quantizer", None) is not None and not getattr(model, ADAPTED, False)

    @classmethod
    def stand_in(cls, model: nn.Module) -> None:
        """Come into the place of a model's own, where it has one."""
        if callable(getattr(type(model), NAME, None)) and NAME not in vars(model):
            vars(model)[NAME] = cls(model)
            if vars(model)[NAME].told:
                vars(model)[ADAPTED] = True

    @staticmethod
    def leave(model: nn.Module) -> None:
        """Give the model its own back."""
        found = vars(model).pop(NAME, None)
        if found is not None and found.told:
            vars(model).pop(ADAPTED, None)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        adapters = adapters_in(self.model)
        acting = [adapter for adapter in adapters if adapter.state not in ("merged", "disabled")]
        if not acting:
            state = plain(self.model.state_dict() if state_dict is None else state_dict)
            own = getattr(type(self.model), NAME)
            named = {"is_main_process": is_main_process, "state_dict": state, "push_to_hub": push_to_hub}
            flag = vars(self.model).pop(ADAPTED, None) if self.told else None  # by it the adapters of PEFT are written
            try:
                return own(self.model, save_directory, **named, **kwargs)
            finally:
                if flag is not None:
                    vars(self.model)[ADAPTED] = flag
        if push_to_hub:
            raise ValueError(
                f"adapter {acting[0].name!r} is attached: the hub would get the base without it. Call "
                "adapter.merge(permanent=True) first, or save the adapter and upload its folder"
            )
        if len(acting) < len(adapters):
            raise ValueError(
                f"adapter {acting[0].name!r} acts and another is merged or disabled: a folder cannot say so. Merge all "
                "of them, or none"
            )
        if is_main_process:
            for adapter in acting:
                self._write(adapter, Path(save_directory), FOLDER if len(acting) == 1 else f"{FOLDER}-{adapter.name}")
        return None

    def _write(self, adapter: Any, path: Path, folder: str) -> None:
        adapter.save(path / folder)
        if not (path / "README.md").exists():
            with replacing(path / "README.md") as new:  # half of one would stay for ever
                new.write_text(README.format(folder=folder, path=path / folder))
