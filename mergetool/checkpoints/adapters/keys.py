"""What the tensors of a PEFT adapter are called: the module in memory that each one changes, and how.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight        half of a low-rank product
    base_model.model.model.embed_tokens.lora_embedding_B                  the same for an embedding
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta     rows
    base_model.model.encoder.block.base_layer.bias                        a whole tensor of an adapted module
    base_model.model.score.weight                                         a whole tensor

PEFT takes the adapter's name ("default") out when it saves; files that were saved otherwise still hold it.
"""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mergetool.errors import SourceError
from mergetool.tensors.header import TensorSpec

PREFIX = "base_model.model."
WRAPPED = ".base_layer"
"""What PEFT hangs between a module and what it wraps."""
_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta"
_CHANGE = re.compile(rf"(?P<module>.+?)\.(?P<part>{_PARTS})(?:\.(?P<adapter>[^.]+))??(?:\.(?P<leaf>weight|bias))?")
_COMPILED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module)\.")
"""What `torch.compile` and FSDP hang between a module and its parts."""
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


def by_site(keys: Iterable[Key]) -> dict[str, dict[Part, str]]:
    """What hangs at each site: part -> its name in the adapter's file. Whole tensors hang nowhere."""
    sites: dict[str, dict[Part, str]] = {}
    for key in keys:
        if key.part is not Part.WHOLE:
            sites.setdefault(key.site, {})[key.part] = key.own
    return sites


def factors_at(
    parts: Mapping[Part, str], own: Mapping[str, TensorSpec], where: str, fix: str
) -> tuple[TensorSpec, TensorSpec, bool]:
    """A and B of a site, and whether they are an embedding's. Raises SourceError where B A is no matrix."""
    embedding = Part.EMBEDDING_A in parts or Part.EMBEDDING_B in parts
    halves = (Part.EMBEDDING_A, Part.EMBEDDING_B) if embedding else (Part.A, Part.B)
    a, b = (own[_half(parts, half, other, where)] for half, other in zip(halves, halves[::-1], strict=True))
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        what = f"A is {list(a.shape)}, B is {list(b.shape)}: B A is no matrix"
        raise SourceError(what, f"{where}: {a.name}", fix)
    return a, b, embedding


def attention_around(site: str, sites: Container[str]) -> str | None:
    """The MultiheadAttention that a site is the out_proj of.

    PEFT wraps it with the attention, by the settings of that, and adds its product twice, in training as in merging.
    """
    outer, mark, leaf = site.rpartition(".base_layer.")
    return unwrapped(outer) if mark and leaf == "out_proj" and outer in sites else None


def _half(parts: Mapping[Part, str], half: Part, other: Part, where: str) -> str:
    if half in parts:
        return parts[half]
    known = parts.get(other) or next(iter(parts.values()))
    missing = known.replace(other, half) if other in parts else f"its {half}"
    raise SourceError(f"{missing} is missing", f"{where}: {known}", "save the adapter again")


def words(text: str) -> frozenset[str]:
    """A set of names, written as text."""
    return frozenset(text.split())


def unwrapped(site: str) -> str:
    """The module at a site."""
    return site.replace(WRAPPED, "")


def read_keys(names: Collection[str], where: str) -> list[Key]:
    """Every tensor that a merge uses, by name. Raises SourceError for one that no plain LoRA has."""
    adapters = sorted({match["adapter"] for name in names if (match := _CHANGE.fullmatch(name)) and match["adapter"]})
    if len(adapters) > 1:
        what = f"it holds several adapters at once: {', '.join(adapters)}"
        raise SourceError(
            what, where, f"save one alone: model.save_pretrained(PATH, selected_adapters=[{adapters[0]!r}])"
        )
    known = {"default", *adapters}
    keys = [key for name in sorted(names) if (key := _key(name, where, known)) is not None]
    return [key for key in keys if not _is_second_copy(key, names)]


def _is_second_copy(key: Key, names: Container[str]) -> bool:
    """Whether it is `X.modules_to_save.weight` beside `X.weight`, which PEFT writes for words of another number."""
    return bool(_SAVED.fullmatch(key.own)) and PREFIX + key.site in names


def _key(own: str, where: str, adapters: Collection[str]) -> Key | None:
    name = _COMPILED.sub("", own.removeprefix(PREFIX))
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
