"""The model's names for what an adapter changes.

PEFT names modules by their path in memory, checkpoints name tensors as they were when the file was written; between
the two lie the first part of a head model (`bert.`, `transformer.`), the parts that multimodal models shuffle
(`language_model.model.layers` in files, `model.language_model.layers` in memory), and tied weights, which a file
holds once.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from mergetool.checkpoints.adapters.keys import words
from mergetool.checkpoints.names import match
from mergetool.checkpoints.ties import ties_words
from mergetool.tensors.header import TensorSpec

_NEUTRAL = frozenset({"model", "language_model", "base_model", "module", "_orig_mod", "transformer"})
"""Parts that say where in memory a part is hung, not what it is."""
_RENAMED = {"block_sparse_moe": "mlp"}
INPUTS = words(
    "embed_tokens wte word_embeddings embed_in shared tok_embeddings tokens_embed token_embedding word_embedding"
)
"""Last parts of modules that hold input embeddings."""
_HEADS = words("lm_head embed_out proj_out vocab_projector output_layer")
_HEAD_ENDS = (".predictions.decoder", ".lm_head.decoder")
"""Names of modules that hold the output layer of a language model."""
TASK_HEADS = words("classifier score qa_outputs")


class Places:
    """The tensors of one model, looked up by names in memory."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], names_in_memory: Iterable[str] = ()
    ) -> None:
        self._specs = specs
        self._config = config
        self._names = match(dict.fromkeys(names_in_memory), {name: spec.shape for name, spec in specs.items()})

    def counterpart(self, name: str) -> str | None:
        """The model's name of a tensor that is called `name` in memory."""
        stored = self._names.get(name, name)
        return stored if stored in self._specs else None

    def experts(self, module: str) -> dict[int, dict[str, str]]:
        """Layers of a mixture that the model stores one by one: index -> last part of the module -> tensor."""
        return self._experts.get(plain(module).rpartition(".")[0], {})

    @cached_property
    def _experts(self) -> dict[str, dict[int, dict[str, str]]]:
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for name in self._specs:
            head, mark, tail = name.rpartition(".experts.")
            index, _, leaf = tail.partition(".")
            if mark and index.isdecimal() and leaf.endswith(".weight"):
                layers = experts.setdefault(plain(head), {})
                layers.setdefault(int(index), {})[leaf.removesuffix(".weight")] = name
        return experts

    @property
    def is_tied(self) -> bool | None:
        """Whether input embeddings and output layer are one tensor; None where nothing says so."""
        return ties_words(self._config)

    def shared(self, module: str, shape: tuple[int, ...]) -> str | None:
        """The stored tensor that `module`, which the file lacks, is tied to."""
        if not is_vocabulary(module) or self.is_tied is False:
            return None
        fitting = [name for name in self._vocabulary() if self._specs[name].shape[1:] == shape[1:]]
        return fitting[0] if len(fitting) == 1 else None

    def twins(self, name: str) -> list[str]:
        """A tensor and the copies of it that the file holds although they are tied to it."""
        if self.is_tied is not True or name not in self._vocabulary():
            return [name]
        return [other for other in self._vocabulary() if self._specs[other].shape == self._specs[name].shape]

    def lacks_head(self) -> bool:
        """Whether the output layer is tied to the input embeddings and therefore not in the file."""
        return self._lacks_head("ForCausalLM", "LMHeadModel")

    def lacks_other_head(self) -> bool:
        """The same of networks that may call it otherwise than `lm_head`."""
        return self._lacks_head("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")

    def _lacks_head(self, *ends: str) -> bool:
        heads = [name for name in self._vocabulary() if is_head(name.removesuffix(".weight"))]
        kinds = [str(kind) for kind in self._config.get("architectures") or ()]
        return self.is_tied is True and not heads and any(kind.endswith(ends) for kind in kinds)

    def _vocabulary(self) -> list[str]:
        return [name for name, spec in self._specs.items() if is_vocabulary_weight(name) and len(spec.shape) == 2]


def is_vocabulary(module: str) -> bool:
    """Whether a module has a row for every token."""
    return leaf_of(module) in INPUTS or is_head(module)


def is_vocabulary_weight(name: str) -> bool:
    """Whether a tensor is the weight of such a module."""
    return name.endswith(".weight") and is_vocabulary(name.removesuffix(".weight"))


def is_head(module: str) -> bool:
    """Whether a module is the output layer of a language model."""
    return leaf_of(module) in _HEADS or f".{module}".endswith(_HEAD_ENDS)


def leaf_of(module: str) -> str:
    """The last part of a name."""
    return module.rpartition(".")[2]


def plain(name: str) -> str:
    """A name without the parts that only say where in memory something is hung."""
    return ".".join(_RENAMED.get(part, part) for part in name.split(".") if part not in _NEUTRAL)
