"""What classes of transformers answer, told from their names, and which tensors they do it with.

A class such as BertForSequenceClassification is a network that many classes share, and a head of its own. Some heads
answer once for each sample, some for each token, some with the start and the end of a span of tokens.
"""

import re
from typing import Literal

HeadKind = Literal["sample", "token", "span"]

_KINDS: tuple[tuple[re.Pattern[str], HeadKind], ...] = (
    (re.compile(r"For(Sequence|Audio|Video)Classification$|ForImageClassification"), "sample"),
    (re.compile(r"For(Token|AudioFrame)Classification$"), "token"),
    (re.compile(r"ForQuestionAnswering(Simple)?$"), "span"),
)
_OTHERWISE = frozenset(
    f"{family}ForQuestionAnswering" for family in ("XLNet", "XLM", "Flaubert", "Lxmert", "Tapas", "Vilt")
)
"""Classes that search among several spans, choose cells of a table, or answer about images."""
_GENERAL = re.compile(r"For(CausalLM|ConditionalGeneration|MaskedLM|PreTraining)$|LMHeadModel$|Model$")
"""Language models, and networks without a head: what experts may be without having a head of their own."""
_EMBEDS = re.compile(r"^\w*(embed|stem|shared|wte|wpe)\w*\.")
_POOLER = re.compile(r"(^|\.)pooler(\.|$)")


def head_kind(architecture: str) -> HeadKind | None:
    """What a class answers with a head that a bundle can keep; None for other classes."""
    if architecture in _OTHERWISE:
        return None
    return next((kind for pattern, kind in _KINDS if pattern.search(architecture)), None)


def is_general(architecture: str) -> bool:
    """Whether a class is a language model, or a network without a head."""
    return _GENERAL.search(architecture) is not None


def embeds(name: str) -> bool:
    """Whether a tensor lies in a part that a network begins with, beside its layers."""
    return _EMBEDS.match(name) is not None


def is_pooler(name: str) -> bool:
    """Whether a tensor belongs to the pooler: part of the network by its name, of the head by what it does."""
    return _POOLER.search(name) is not None
