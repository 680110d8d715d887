"""What cannot be merged here, said by name, with the way on: PEFT itself where it can, another choice where not.

`init_lora_weights`: pissa, olora and corda take the start of training out of the base, when the adapter is made and
again whenever PEFT loads it; loftq replaces the base by its quantised copy. B A on the base as it is would count the
start twice, or miss it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetool.checkpoints.adapters.keys import words
from mergetool.errors import SourceError

_MERGEABLE_KINDS = words(
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR LORA"
    " MISS OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA"
    " WAVEFT"
)
"""Kinds of adapters that PEFT can merge into weights; the others change inputs or depend on them."""
_MERGEABLE_FIELDS = frozenset({"kasa_config", "use_bdlora"})
REFUSED_FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "it acts after its invocation tokens only (activated LoRA), so no weights can hold it",
    "layer_replication": "it was trained on repeated layers, which the model does not have",
    "enable_lora": "its factors are those of parts of a fused layer, as peft wrote them before 0.3",
    "arrow_config": "it chooses among adapters for every token (Arrow), so no weights can hold it",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA), not the plain A and B of LoRA",
    "kasa_config": "it was trained on a base without its smallest directions (KaSA), not on the base as it is",
    "use_qalora": "it pools its inputs (QA-LoRA), so no weights can hold it",
    "megatron_config": "it was trained for Megatron's parallel layers",
}
"""Fields that make more of an adapter than W + s B A, and why."""
_TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq")
_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_LEAVE_OUT = "leave it out; it works only while the model runs, with peft"


def refuse_what_is_no_lora(settings: Mapping[str, Any], folder: Path, base: Path | None) -> None:
    """Raises SourceError, with the way on, for an adapter that is not `W + s B A` on the base as it is."""
    where = str(folder / "adapter_config.json")
    kind = settings.get("peft_type")
    if kind != "LORA":
        can = kind in _MERGEABLE_KINDS
        what = (
            f"peft_type is {kind!r}: only LORA is merged here" if can else f"peft_type {kind!r} is no part of weights"
        )
        raise SourceError(what, where, by_peft(settings, folder, base) if can else _LEAVE_OUT)
    for field, why in REFUSED_FIELDS.items():
        if settings.get(field):
            fix = by_peft(settings, folder, base) if field in _MERGEABLE_FIELDS else _LEAVE_OUT
            fix = _repeated(settings[field]) if field == "layer_replication" else fix
            raise SourceError(f"{field} is set: {why}", where, fix)
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_TAKES_FROM_BASE):
        what = f"init_lora_weights is {start!r}: the start of its training was taken out of the base"
        raise SourceError(what, where, _way_on(start, settings, folder, base))


def _repeated(ranges: Any) -> str:
    """How to repeat the layers: PEFT cannot merge into layers that share their weights."""
    pairs = [pair for pair in ranges if isinstance(pair, list)] if isinstance(ranges, list) else []
    slices = ", ".join(f"{{m: {pair}}}" for pair in pairs)
    inner = f"{{models: {{m: MODEL}}, slices: [{slices}], merge: {{method: passthrough}}}}"
    return f"repeat them in the model, {{recipe: {inner}}}, and set layer_replication to null in adapter_config.json"


def _way_on(start: str, settings: Mapping[str, Any], folder: Path, base: Path | None) -> str:
    kept = "if the model is the one that training saved beside the adapter, set init_lora_weights to true in the file"
    if start.startswith("corda"):  # PEFT cannot load it without the data it was made with
        return kept
    return f"{by_peft(settings, folder, base)}; {kept}"


def by_peft(settings: Mapping[str, Any], folder: Path, base: Path | None) -> str:
    """The command that merges an adapter with PEFT, to use its output as a model."""
    model, made_for = _class_of(settings), settings.get("base_model_name_or_path") or "MODEL"
    code = (
        f"from peft import PeftModel; from transformers import {model}; "
        f"PeftModel.from_pretrained({model}.from_pretrained('{base or made_for}'), '{folder}')"
        ".merge_and_unload().save_pretrained('merged')"
    )
    return f'merge it with peft, and take the folder `merged` as the model: python -c "{code}"'


def _class_of(settings: Mapping[str, Any]) -> str:
    mapping = settings.get("auto_mapping")
    if isinstance(mapping, dict) and str(mapping.get("parent_library", "")).startswith("transformers."):
        return str(mapping.get("base_model_class"))
    return _CLASSES.get(str(settings.get("task_type")), "AutoModel")
