"""What the tensors of a PEFT adapter are called: the module in memory that each one changes, and how.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight        half of a low-rank product
    base_model.model.model.embed_tokens.lora_embedding_B                  the same for an embedding
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta     rows
    base_model.model.encoder.block.base_layer.bias                        a whole tensor of an adapted module
    base_model.model.score.weight                                         a whole tensor

PEFT takes the adapter's name ("default") out when it saves; files that were saved otherwise still hold it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from mergetool.errors import SourceError

PREFIX = "base_model.model."
_WRAPPED = ".base_layer"
_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta"
_CHANGE = re.compile(rf"(?P<module>.+?)\.(?P<part>{_PARTS})(?:\.(?P<adapter>[^.]+))??(?:\.(?P<leaf>weight|bias))?")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<rest>.+)")
_TRAINING_ONLY = re.compile(r".+\.(lora_monteclora_sampler|lora_velora_embed)(\..+)?")
"""What PEFT leaves out when it merges: noise drawn and gradients compressed during training."""
_UNKNOWN = re.compile(r".+\.(?P<part>(lora|hada|lokr|ia3|vera|oft|boft|ada)_\w+)(\..+)?")


class Part(StrEnum):
    """What a tensor of an adapter is."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    BIAS = "lora_B.bias"
    WHOLE = "whole"


@dataclass(frozen=True)
class Key:
    """One tensor of an adapter."""

    own: str
    """Its name in the adapter's file."""
    site: str
    """Where PEFT hung it: the module with the wrappers around it (`experts`, `experts.base_layer`)."""
    part: Part

    @property
    def module(self) -> str:
        """The module in memory; of a whole tensor, the tensor's name."""
        return unwrapped(self.site)


def words(text: str) -> frozenset[str]:
    """A set of names, written as text."""
    return frozenset(text.split())


def unwrapped(site: str) -> str:
    """The module at a site."""
    return site.replace(_WRAPPED, "")


def read_keys(names: Collection[str], where: str) -> list[Key]:
    """Every tensor that a merge uses, by name. Raises SourceError for one that no plain LoRA has."""
    adapters = sorted({match["adapter"] for name in names if (match := _CHANGE.fullmatch(name)) and match["adapter"]})
    if len(adapters) > 1:
        what = f"it holds several adapters at once: {', '.join(adapters)}"
        raise SourceError(
            what, where, f"save one alone: model.save_pretrained(PATH, selected_adapters=[{adapters[0]!r}])"
        )
    known = {"default", *adapters}
    return [key for name in sorted(names) if (key := _key(name, where, known)) is not None]


def _key(own: str, where: str, adapters: Collection[str]) -> Key | None:
    name = own.removeprefix(PREFIX)
    if ".original_module." in name or _TRAINING_ONLY.fullmatch(name):
        return None
    if match := _CHANGE.fullmatch(name):
        part = Part(match["part"])
        if match["leaf"] == "bias":
            part = _bias_of(part, own, where)
        return Key(own, match["module"].removesuffix(".token_adapter"), part)
    if match := _SAVED.fullmatch(name):
        first, _, rest = match["rest"].partition(".")
        return Key(own, f"{match['module']}.{rest if first in adapters else match['rest']}", Part.WHOLE)
    if match := _UNKNOWN.fullmatch(name):
        raise SourceError(f"{match['part']} is not supported", f"{where}: {own}", "merge the adapter with peft first")
    return Key(own, name, Part.WHOLE)


def _bias_of(part: Part, own: str, where: str) -> Part:
    if part is Part.B:
        return Part.BIAS
    raise SourceError(f"a bias of {part} is not supported", f"{where}: {own}", "merge the adapter with peft first")
