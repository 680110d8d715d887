"""adapter_config.json of an adapter that is made here: what PEFT needs to hang every tensor where it belongs.

The factors hold all of a change, so alpha is the rank everywhere and PEFT's scaling is 1. Modules are named by the last
part of their names where that says enough.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""Ends of the names of transformers' classes, and PEFT's word for what they do."""


@dataclass(frozen=True)
class Written:
    """What the file of factors holds."""

    ranks: Mapping[str, int]
    """Directions of every module that might have some."""
    saved: Mapping[str, Collection[str]]
    """Modules with tensors that are kept in full, and which: `weight`, `bias`."""
    modules: Collection[str]
    """All modules of the base that hold tensors."""
    base: str
    revision: str | None = None
    transposed: bool = False
    """Whether layers are transformers' Conv1D."""


def config_text(made: Written, config: Mapping[str, Any]) -> str:
    """The file's text. `config`: the base's config.json."""
    ranks = {module: rank for module, rank in made.ranks.items() if rank}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != common}
    whole = {module for module, leaves in made.saved.items() if module not in made.ranks}
    fields = {
        "peft_type": "LORA",
        "task_type": _task(config),
        "base_model_name_or_path": made.base,
        "revision": made.revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _short(ranks, made.modules),
        "modules_to_save": _short(whole, made.modules) or None,
        "bias": "all" if any(module in made.ranks for module in made.saved) else "none",
        "fan_in_fan_out": made.transposed,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _task(config: Mapping[str, Any]) -> str | None:
    names = [str(name) for name in config.get("architectures") or ()]
    return next((task for end, task in _TASKS if any(name.endswith(end) for name in names)), None)


def _short(chosen: Collection[str], modules: Collection[str]) -> list[str]:
    """Chosen modules by their last parts, where these mean no others; else by their whole names."""
    of_leaf: dict[str, set[str]] = defaultdict(set)
    for module in {*modules, *chosen}:
        of_leaf[module.rpartition(".")[2]].add(module)
    names = set()
    for leaf, having in of_leaf.items():
        here = having & set(chosen)
        alone = not leaf.isdecimal() and not any(module.endswith(leaf) for module in modules if module not in having)
        names |= {leaf} if here and here == having and alone else here
    return sorted(names)
