"""An adapter as a model by itself: what it adds to weights, without the weights.

    alone = AdapterAlone(folder)
    alone.specs["model.layers.0.self_attn.q_proj.weight"]       F32, (outputs, inputs): s B A, made slice by slice
    alone.factors("model.layers.0.self_attn.q_proj.weight")     B (outputs, rank), A (rank, inputs)

What it holds in full (heads, trained biases) is as stored. `sites` tells which is which.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.checkpoints.adapters.arithmetic import Arithmetic, rows_of
from mergetool.checkpoints.adapters.files import changes_nothing, open_weights
from mergetool.checkpoints.adapters.places import is_vocabulary
from mergetool.checkpoints.adapters.settings import CONFIG_NAME, read_settings
from mergetool.checkpoints.adapters.sites import Site, SiteKind, Sites
from mergetool.checkpoints.vocabulary import tokens_of
from mergetool.tensors.dtypes import BY_NAME, DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import NOTHING, FileStamp, ModelSource, OpenFile

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT32 = BY_NAME["F32"]


class AdapterAlone(ModelSource):
    """One adapter. What it adds is float32; what it holds in full is as stored."""

    stem = "adapter_model"

    def __init__(self, folder: Path, elsewhere: Mapping[Path, OpenFile] = NOTHING) -> None:
        self.folder = folder
        self.settings = read_settings(folder, None)
        """adapter_config.json, checked."""
        self._config = FileStamp.of(folder / CONFIG_NAME)  # its alpha decides about values as much as the weights do
        self._adapter = open_weights(folder, elsewhere)
        sites = Sites(self._adapter.specs, self.settings)
        self.sites: Mapping[str, Site] = sites.found
        """What lies at each name of `specs`."""
        self._changes = {name: site.change for name, site in self.sites.items()}
        self._arithmetic = Arithmetic(self._adapter, self._adapter)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, self._dtype(name), site.shape) for name, site in self.sites.items()
        }
        self.made_for = self.settings.made_for
        """The model that the adapter was trained on, as training named it."""
        self.needs_base = tuple(_needs_base(sites))
        """What of it means nothing without the weights it was trained on, and why."""
        self.warnings = (*self.settings.warnings, *sites.warnings, *self._idle())

    @property
    def keeps_tied(self) -> bool | None:
        """Whether training kept words and the output layer one tensor; None of one that changes neither."""
        return self.settings.keeps_tied if any(is_vocabulary(site.module) for site in self.sites.values()) else None

    # ------------------------------------------------------------------ factors

    def factors(self, name: str) -> tuple["Tensor", "Tensor"]:
        """B and A of a product in float32, so that B @ A is what is added: the factor is in B.

        (outputs, rank) and (rank, inputs); a convolution's kernel counts as inputs; of experts, a batch of both:
        (experts, outputs, rank) and (experts, rank, inputs).
        """
        site = self.sites[name]
        a, b = (rows_of(self._adapter, own, 0, self._adapter.specs[own].shape[0]) for own in site.own)
        if site.experts > 1:  # in A they lie one below the other, in B they are interleaved
            a = a.view(site.experts, site.rank, -1)
            b = b.view(len(b), site.rank, site.experts).permute(2, 0, 1)
        return b.mul_(site.factor), a

    # ------------------------------------------------------------------ a model

    def stored_as(self, name: str) -> DType:
        """Of a product, what its factors are stored as."""
        return self._adapter.stored_as(self.sites[name].own[0])

    @property
    def tokenizer_folder(self) -> Path | None:
        """The adapter's own, if it has one: nothing else is known."""
        return self.folder if tokens_of(self.folder) is not None else None

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return (*self._adapter.files, self._config)

    def position(self, name: str) -> tuple[int, int]:
        return self._adapter.position(self.sites[name].own[0])

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        change = self._changes[name]
        if change.is_copy:
            self._adapter.read_bytes(change.origin, begin, buffer)
            return
        import torch

        out = torch.frombuffer(buffer, dtype=torch.float32)
        if change.is_own:
            self._arithmetic.read(change, begin // 4, out)
        else:
            self._arithmetic.add(change, begin // 4, out.zero_())

    def close(self) -> None:
        self._adapter.close()

    # ------------------------------------------------------------------ helpers

    def _dtype(self, name: str) -> DType:
        change = self._changes[name]
        return self._adapter.specs[change.origin].dtype if change.is_copy else _FLOAT32

    def _idle(self) -> tuple[str, ...]:
        if self.needs_base or any(site.is_full for site in self.sites.values()):
            return ()
        terms = [term for change in self._changes.values() for term in change.terms]
        return changes_nothing(self._adapter, terms, self.settings.folder)


def _needs_base(sites: Sites) -> list[str]:
    magnitudes = [site.module for site in sites.found.values() if site.kind is SiteKind.MAGNITUDE]
    needs = []
    if magnitudes:
        needs.append(f"DoRA gives the rows of W + s B A their lengths, and W is the base's ({_some(magnitudes)})")
    if sites.tokens:
        needs.append(f"trainable_token_indices holds single rows of the base's {_some(sites.tokens)}")
    return needs


def _some(modules: list[str]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f"{modules[0]}{more}"
