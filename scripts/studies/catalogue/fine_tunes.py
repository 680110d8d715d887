"""Three sets of fine-tunes, made in a folder: what they are merged of, and how a merge is asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, ViTModel

from scripts.studies.mass.experts import Training
from scripts.studies.mass.study import Study, encoder, made, right
from scripts.studies.mass.tasks import chosen
from scripts.studies.merge3.models import Training as Llama
from scripts.studies.merge3.models import prepare as prepare_llama
from scripts.studies.merge3.skills import SKILLS, Item, items

from . import vit

TASKS = ("digits", "language", "category", "script", "keyword", "measurement")
"""Of the encoder: those that are learnt well in some hundred steps."""


@dataclass(frozen=True)
class Sizes:
    """How long the fine-tunes train, and how many test inputs of each task are asked."""

    steps: int = 300
    samples: int = 300
    tasks: tuple[str, ...] = TASKS


@dataclass(frozen=True)
class FineTunes:
    """Experts of one base by task; `right` asks a model on a task's test inputs and says which answers are right."""

    base: Path
    experts: Mapping[str, Path]
    right: Callable[[str, Path], Tensor]


def of_encoder(folder: Path, sizes: Sizes) -> FineTunes:
    """The sentence encoder of the study of mass, with 22M parameters."""
    tasks = chosen(folder, sizes.tasks)
    study, every = Study(folder, tasks, Training(sizes.steps), sizes.samples), {task.name: task for task in tasks}
    experts = {name: folder / "experts" / name for name in sizes.tasks}
    return FineTunes(folder / "base", experts, lambda name, made: right(study, every[name], encoder(made)))


def of_vit(folder: Path, sizes: Sizes) -> FineTunes:
    """A small vision transformer, and fine-tunes on digits that are shown in five ways."""
    vit.prepare(folder)
    experts = {name: folder / name for name in vit.WAYS}
    return FineTunes(folder / "base", experts, partial(_seen, experts))


def _seen(experts: Mapping[str, Path], name: str, made: Path) -> Tensor:
    return vit.right(name, ViTModel.from_pretrained(made, add_pooling_layer=False), experts[name])


def of_llama(folder: Path, sizes: Sizes) -> FineTunes:
    """A small language model, and a fine-tune for each of three skills (see the study of merge3)."""
    prepare_llama(folder, Llama(), print)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    asked = {skill: items(skill, sizes.samples) for skill in SKILLS}
    return FineTunes(
        folder / "base",
        {skill: folder / skill for skill in SKILLS},
        lambda skill, made: _answered(LlamaForCausalLM.from_pretrained(made).eval(), tokenizer, asked[skill]),
    )


@torch.inference_mode()
def _answered(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Item]) -> Tensor:
    """Whether the right one of the choices, each a token, is the likeliest."""
    inputs = tokenizer([item.question for item in asked], padding=True, return_tensors="pt", padding_side="left")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -1]
    choices = torch.tensor([tokenizer.convert_tokens_to_ids(list(item.choices)) for item in asked])
    return logits.gather(1, choices).argmax(1) == torch.tensor([item.label for item in asked])


SETS_OF_MODELS: dict[str, Callable[[Path, Sizes], FineTunes]] = {
    "encoder": of_encoder,
    "vision": of_vit,
    "language": of_llama,
}


def prepare(name: str, folder: Path, sizes: Sizes) -> FineTunes:
    """One of the sets, made in its folder unless it is there."""
    return SETS_OF_MODELS[name](made(folder / name), sizes)
