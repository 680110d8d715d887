"""What adapter_config.json means for a merge, field by field.

Every field is one of four: honoured; of training only; refused by name (`refusals`); unknown, which is a warning that
names it. Scaling is `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`; both may differ by module, by patterns that
are tried in order (PEFT's rule: the whole name, or its end after a dot).

Reference: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, section 4.1; Kalajdzievski, rank stabilisation,
https://arxiv.org/abs/2312.03732.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.checkpoints.adapters.keys import words
from mergetool.checkpoints.adapters.refusals import REFUSED_FIELDS, refuse_what_is_no_lora
from mergetool.errors import SourceError
from mergetool.tensors.io import read_error
from mergetool.tensors.side_files import CONFIG_NAME as MODEL_CONFIG_NAME

CONFIG_NAME = "adapter_config.json"
_AGAIN = "save the adapter again"
HONOURED = words(
    "peft_type task_type auto_mapping base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern"
    " fan_in_fan_out use_dora bias lora_bias modules_to_save trainable_token_indices init_lora_weights"
    " target_parameters ensure_weight_tying"
)
OF_TRAINING = words(
    "peft_version revision inference_mode target_modules exclude_modules layers_to_transform layers_pattern"
    " lora_dropout loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config runtime_config"
    " megatron_core qalora_group_size merge_weights"
)
"""They say which modules were trained and how; what came out is told by the tensors."""

_SORTS: Mapping[type, frozenset[str]] = {
    bool: words("use_rslora use_dora fan_in_fan_out ensure_weight_tying"),
    str: words("peft_type task_type base_model_name_or_path revision"),
    list: words("modules_to_save target_parameters"),
    dict: words("auto_mapping"),
}
_IN_WORDS: Mapping[type, str] = {bool: "true or false", str: "a text", list: "a list of texts", dict: "a mapping"}


@dataclass(frozen=True)
class Settings:
    """adapter_config.json, checked."""

    folder: Path
    fields: Mapping[str, Any]
    alphas: Mapping[str, Any]
    ranks: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def where(self) -> str:
        return str(self.folder / CONFIG_NAME)

    @property
    def made_for(self) -> str | None:
        """The model that it was trained on, as training named it."""
        base = self.fields.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def flag_transposed(self) -> bool:
        return self.fields.get("fan_in_fan_out") is True

    @property
    def keeps_tied(self) -> bool:
        return self.fields.get("ensure_weight_tying") is True

    def saves(self, module: str) -> bool:
        """Whether the whole of a module was trained and saved."""
        saved = self.fields.get("modules_to_save") or ()
        return any(re.fullmatch(rf"(.*\.)?{re.escape(str(name))}(\..*)?", module) for name in saved)

    def targets(self, parameter: str) -> bool:
        """Whether a parameter was a target itself, not the module that it belongs to."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.fields.get("target_parameters") or ())

    def parameters(self) -> list[str]:
        """Last parts of the names of parameters that were targets themselves."""
        return [str(name).rpartition(".")[2] for name in self.fields.get("target_parameters") or ()]

    def factor(self, module: str, rank: int) -> float:
        """What the product of two factors is multiplied by. Raises SourceError where the file contradicts them."""
        expected = _patterned(self.ranks, module, self.fields.get("r", rank))
        if expected != rank:
            what = f"the factors of {module} have rank {rank}, {CONFIG_NAME} says {expected!r}"
            raise SourceError(what, self.where, f"set r (or rank_pattern) to {rank} in {CONFIG_NAME}")
        alpha = _patterned(self.alphas, module, self.fields.get("lora_alpha", 8))
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
            raise SourceError(f"the alpha of {module} is {alpha!r}, not a number", self.where, _AGAIN)
        return float(alpha) / (math.sqrt(rank) if self.fields.get("use_rslora") is True else rank)

    def rank(self, module: str) -> int | None:
        """The rank of one factor; None where the file does not say it."""
        rank = _patterned(self.ranks, module, self.fields.get("r"))
        return rank if type(rank) is int and rank > 0 else None

    def tokens(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were trained one by one. Raises SourceError where there are none."""
        tokens = self.fields.get("trainable_token_indices")
        if isinstance(tokens, dict):
            ends = [rows for name, rows in tokens.items() if f".{module}".endswith(f".{name}")]
            tokens = ends[0] if ends else None
        if isinstance(tokens, list) and tokens and all(type(row) is int and row >= 0 for row in tokens):
            return tuple(tokens)
        raise SourceError(f"trainable_token_indices names no rows of {module}", self.where, _AGAIN)


def read_settings(folder: Path, base: Path | None) -> Settings:
    """adapter_config.json of a folder. Raises SourceError where it says what is not honoured here."""
    path = folder / CONFIG_NAME
    fields = _json(path)
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise SourceError("is not a LoRA adapter (peft_type)", str(path), "name a folder that peft saved an adapter to")
    _check_sorts(fields, path)
    refuse_what_is_no_lora(fields, folder, base)
    alphas, ranks = (_patterns(fields, name, path) for name in ("alpha_pattern", "rank_pattern"))
    return Settings(folder, fields, alphas, ranks, _warnings(fields))


def _check_sorts(fields: Mapping[str, Any], path: Path) -> None:
    """Raise SourceError where a field is of another sort than PEFT's: it would be misread, or passed on."""
    for sort, names in _SORTS.items():
        for name in sorted(names):
            value = fields.get(name)
            strange = [each for each in value if type(each) is not str] if type(value) is list else []
            if value is not None and (type(value) is not sort or strange):
                what = f"{name} is {str(value)[:100]!r}, not {_IN_WORDS[sort]}"
                raise SourceError(what, str(path), f"set {name} in {CONFIG_NAME} to {_IN_WORDS[sort]}, or to null")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _no_adapter(path.parent) or read_error(error, str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not valid JSON ({str(error)[:100]})", str(path), _AGAIN) from None


def _no_adapter(folder: Path) -> SourceError | None:
    """What lies in a folder instead of an adapter, where that is known: a model, adapters in folders of their own."""
    if folder.is_file() or (folder / MODEL_CONFIG_NAME).is_file():
        return SourceError("is a model, not an adapter", str(folder), "write {source: PATH} instead of {adapter: PATH}")
    inside = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG_NAME}")) if folder.is_dir() else []
    if not inside:
        return None
    what = f"no {CONFIG_NAME} in this folder, but in its folders {', '.join(inside)}"
    return SourceError(what, str(folder), f"name one of them: {folder / inside[0]}")


def _patterns(fields: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    try:
        patterns = dict(fields.get(name) or {})
        for pattern in patterns:
            re.compile(pattern)
        return patterns
    except (TypeError, ValueError, re.error):
        raise SourceError(f"{name} does not map patterns to numbers", str(path), _AGAIN) from None


def _patterned(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _warnings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    known = HONOURED | OF_TRAINING | REFUSED_FIELDS.keys()
    unknown = [f"{name}: {value!r}"[:100] for name, value in fields.items() if name not in known and value]
    warnings = [f"{CONFIG_NAME} holds what no LoRA has, and it was ignored: {', '.join(unknown)}"] if unknown else []
    if fields.get("init_lora_weights") == "lora_ga":
        warnings.append(
            "init_lora_weights is 'lora_ga': training changed the base, which PEFT does not do again when it loads the"
            " adapter; merged into the base as it is, as PEFT does (right if training saved this base with the adapter)"
        )
    return tuple(warnings)
