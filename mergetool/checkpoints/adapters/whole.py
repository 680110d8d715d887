"""Tensors that an adapter brings in full: heads, trained biases, resized embeddings, `modules_to_save`.

They take the place of the model's; a head that the model lacks is added under the name that the class of the trained
model gives it. Where the model ties its output layer to its input embeddings and the file holds one tensor for both, a
layer that was saved as a module of its own (`modules_to_save`) ends the tie, as it does when PEFT merges; embeddings
that were saved because their size changed are still one tensor.
"""

from collections.abc import Mapping, Sequence

from mergetool.checkpoints.adapters.changes import Change
from mergetool.checkpoints.adapters.keys import WRAPPED, Key
from mergetool.checkpoints.adapters.places import INPUTS, TASK_HEADS, Places, is_head, is_vocabulary, leaf_of
from mergetool.checkpoints.adapters.settings import Settings
from mergetool.errors import SourceError
from mergetool.tensors.header import TensorSpec

_HEAD = "lm_head.weight"


class Whole:
    """The whole tensors of an adapter, and where they go."""

    def __init__(
        self,
        own: Mapping[str, TensorSpec],
        specs: Mapping[str, TensorSpec],
        settings: Settings,
        places: Places,
        where: str,
        by_peft: str,
    ) -> None:
        self._own = own
        self._specs = specs
        self._settings = settings
        self._places = places
        self._where = where
        self._by_peft = by_peft
        self._tied = False
        self.warnings: list[str] = []

    def changes(self, keys: Sequence[Key]) -> dict[str, Change]:
        """Tensor -> change. Raises SourceError for a tensor that has no place in the model."""
        changes: dict[str, Change] = {}
        names = {key.module for key in keys}
        modules = {_module(key) for key in keys}
        both = any(map(is_head, modules)) and any(leaf_of(module) in INPUTS for module in modules)
        self._tied = both and self._settings.keeps_tied  # else PEFT has found nothing that it could tie
        for key in sorted(keys, key=lambda key: is_head(_module(key))):
            for target in self._targets(key, names):
                apart = target in changes and WRAPPED in key.own and WRAPPED not in changes[target].origin
                name = key.module if apart else target  # saved as a module, words are no longer tied to it
                if name in changes and not is_vocabulary(_module(key)):
                    what = f"{name} is brought twice, as {changes[name].origin} too"
                    raise SourceError(what, f"{self._where}: {key.own}", "save the adapter again")
                self._check(key, name)
                changes[name] = Change(name, self._own[key.own].shape, key.own, is_own=True)
        return self._untied(changes, [key for key in keys if self._saves(_module(key))])

    def _saves(self, module: str) -> bool:
        return self._settings.saves(module) and not (self._tied and is_vocabulary(module))

    def _targets(self, key: Key, names: set[str]) -> list[str]:
        module = _module(key)
        name = self._places.counterpart(key.module)
        if name is not None:
            return [name] if self._saves(module) else self._places.twins(name)
        if is_vocabulary(module) and not self._saves(module):
            shared = self._places.shared(module, self._own[key.own].shape)
            if shared is not None:
                return [shared]
        outer = key.module.replace(".decoder.", ".")  # a bias that a decoder shares with the head around it
        stored = self._places.counterpart(outer)
        if stored is not None and not self._saves(module):
            return [] if outer in names else [stored]
        if self._settings.saves(module) or is_vocabulary(module) or set(module.split(".")) & TASK_HEADS:
            return [key.module]
        fix = f"use the model it was trained on{f', {self._settings.made_for}' if self._settings.made_for else ''}"
        raise SourceError(f"the model has no tensor {key.module!r}", f"{self._where}: {key.own}", fix)

    def _check(self, key: Key, name: str) -> None:
        """A vocabulary or a number of labels may differ from the model's, nothing else."""
        spec, old, module = self._own[key.own], self._specs.get(name), _module(key)
        if old is None or spec.shape == old.shape:
            return
        free = is_vocabulary(module) or self._settings.saves(module) or bool(set(module.split(".")) & TASK_HEADS)
        if not free or len(spec.shape) != len(old.shape) or spec.shape[1:] != old.shape[1:]:
            what = f"it is {list(spec.shape)}, {name} is {list(old.shape)}"
            raise SourceError(what, f"{self._where}: {key.own}", "use the model it was trained on")

    def _untied(self, changes: dict[str, Change], saved: Sequence[Key]) -> dict[str, Change]:
        """With the head of its own that a model needs whose input embeddings were trained apart from it."""
        inputs = [key for key in saved if leaf_of(_module(key)) in INPUTS]
        name = self._places.counterpart(inputs[0].module) if inputs else None
        if name is None or any(is_head(_module(key)) for key in saved):
            return changes
        if self._places.lacks_other_head():
            what = f"{name} was trained apart from the output layer that is tied to it, which the model's files lack"
            raise SourceError(what, f"{self._where}: {inputs[0].own}", self._by_peft)
        if not self._places.lacks_head():
            return changes
        self.warnings.append(
            f"{name} was trained apart from the output layer that is tied to it: {_HEAD} is written beside it"
        )
        return {_HEAD: Change(_HEAD, self._specs[name].shape, name), **changes}


def _module(key: Key) -> str:
    return key.module.rpartition(".")[0]
