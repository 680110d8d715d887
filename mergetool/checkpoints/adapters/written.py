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


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what the class does that a config.json names."""
    names = [str(name) for name in config.get("architectures") or ()]
    return next((task for end, task in _TASKS if any(name.endswith(end) for name in names)), None)


@dataclass(frozen=True)
class Written:
    """What the file of factors holds."""

    ranks: Mapping[str, int]
    """Directions of every module that has factors."""
    saved: Collection[str]
    """Modules that are kept in full."""
    biases: bool
    """Whether biases are kept by themselves."""
    modules: Collection[str]
    """All modules of the network that hold tensors."""
    base: str
    revision: str | None = None
    turned: bool = False
    """Whether layers are transformers' Conv1D."""
    task: str | None = None

    def text(self) -> str:
        """The file's text."""
        common = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 1
        others = {module: rank for module, rank in self.ranks.items() if rank != common}
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": self.task,
            "base_model_name_or_path": self.base,
            "revision": self.revision,
            "inference_mode": True,
            "r": common,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": self._short(self.ranks),
            "modules_to_save": self._short(self.saved) or None,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": self.turned,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    def _short(self, chosen: Collection[str]) -> list[str]:
        """Chosen modules by their last parts, where these mean no others; else by their whole names."""
        of_leaf: dict[str, set[str]] = defaultdict(set)
        every = {*self.modules, *chosen}
        for module in every:
            of_leaf[module.rpartition(".")[2]].add(module)
        names: set[str] = set()
        for leaf, having in of_leaf.items():
            here = having & set(chosen)
            means_others = any(module.endswith(leaf) for module in every - having)  # as PEFT looks modules_to_save up
            short = here == having and not leaf.isdecimal() and not means_others
            names |= {leaf} if here and short else here
        return sorted(names)
