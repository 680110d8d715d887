"""adapter_config.json of an adapter that is made here: what PEFT needs to hang every tensor where it belongs.

The factors hold all of a change, so alpha is the rank everywhere and PEFT's scaling is 1. Modules are named by the last
part of their names where that says enough.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergetool.checkpoints.adapters.places import leaf_of
from mergetool.checkpoints.adapters.settings import Settings

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""Ends of the names of transformers' classes, and PEFT's word for what they do."""
_SHARED = ("auto_mapping",)
"""Fields that say nothing about tensors, and are kept where all adapters have them."""


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what the class does that a config.json names."""
    names = [str(name) for name in config.get("architectures") or ()]
    return next((task for end, task in _TASKS if any(name.endswith(end) for name in names)), None)


@dataclass(frozen=True)
class About:
    """What is known of an adapter before its tensors are."""

    base: str | None
    """What it calls its base model."""
    revision: str | None = None
    task: str | None = None
    modules: frozenset[str] = frozenset()
    """The modules of the network that are known."""
    whole: bool = False
    """Whether these are all."""
    proven: frozenset[str] = frozenset()
    """Names of targets that PEFT found all of them by, in the adapters that this one is made of."""
    turned: bool = False
    """Whether layers are transformers' Conv1D."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are as in the adapters that this one is made of."""


def about_together(
    several: Sequence[Settings], base: str | None, revision: str | None, config: Mapping[str, Any], *, tied: bool
) -> About:
    """What is known of an adapter that is made of others, for the model of a config.json (or none)."""
    fields = [each.fields for each in several]
    tasks = {each.get("task_type") for each in fields}
    more = {key: fields[0][key] for key in _SHARED if all(each.get(key) for each in fields)}
    return About(
        base,
        revision or next((each["revision"] for each in fields if each.get("revision")), None),
        tasks.pop() if len(tasks) == 1 else task_of(config),
        proven=frozenset.intersection(*map(_proven, fields)),
        turned=any(each.get("fan_in_fan_out") is True for each in fields),
        more=more | ({"ensure_weight_tying": True} if tied else {}),
    )


def _proven(fields: Mapping[str, Any]) -> frozenset[str]:
    """Last parts of names that meant all modules that have them."""
    targets, saved = fields.get("target_modules"), fields.get("modules_to_save") or ()
    some = any(fields.get(key) for key in ("layers_to_transform", "exclude_modules"))
    return frozenset(map(str, (*(targets if isinstance(targets, list) and not some else ()), *saved)))


@dataclass(frozen=True)
class Held:
    """What an adapter's file holds."""

    ranks: Mapping[str, int]
    """Directions of every module that has factors."""
    parameters: Mapping[str, int]
    """The same of parameters that are targets themselves."""
    saved: Collection[str]
    """Modules that are kept in full."""
    biases: bool
    """Whether biases are kept by themselves."""
    added: bool
    """Whether factors have biases of their own."""


def config_text(about: About, held: Held) -> str:
    """The text of adapter_config.json."""
    every = {**held.ranks, **held.parameters}
    common = Counter(every.values()).most_common(1)[0][0] if every else 1
    others = {target: rank for target, rank in every.items() if rank != common}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": about.task,
        "base_model_name_or_path": about.base,
        "revision": about.revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _short(held.ranks, about),
        "modules_to_save": _short(held.saved, about) or None,
        "bias": "all" if held.biases else "none",
        "lora_bias": held.added,
        "fan_in_fan_out": about.turned,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **({"target_parameters": sorted(held.parameters)} if held.parameters else {}),
        **about.more,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _short(chosen: Collection[str], about: About) -> list[str]:
    """Chosen modules by their last parts, where these mean no others; else by their whole names."""
    every = {*about.modules, *chosen}
    of_leaf: dict[str, set[str]] = defaultdict(set)
    for module in every:
        of_leaf[leaf_of(module)].add(module)
    names: set[str] = set()
    for leaf, having in of_leaf.items():
        here = having & set(chosen)
        means_others = any(module.endswith(leaf) for module in every - having)  # as PEFT looks modules_to_save up
        known = leaf in about.proven or about.whole
        short = here == having and known and not leaf.isdecimal() and not means_others
        names |= {leaf} if here and short else here
    return sorted(names)
