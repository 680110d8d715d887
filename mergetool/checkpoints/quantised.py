"""Whether a model's weights are quantised: codes with scales beside them, on which arithmetic means nothing.

Codes that are understood (`codes`) are dequantised while they are read; all others are refused.
"""

import re
from collections.abc import Mapping
from shlex import quote

from mergetool.checkpoints.codes import dequantised, is_dequantised, quantisation_of
from mergetool.checkpoints.facts import QUANTISED, parts_of
from mergetool.errors import PlanError
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
_COMPANIONS = re.compile(
    r"(.+)\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|SCB|weight_format"
    r"|weight_blocks|weight_scales|absmax|quant_map|quant_state\..+|weight\.(absmax|quant_map|nested_absmax|quant_state\..+|SCB)|scale_weight)"
)
OPENED_WITH: Mapping[str, str] = {
    "aqlm": "'aqlm[gpu,cpu]'",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitnet": "",
    "bitsandbytes": "bitsandbytes",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu-genai",
    "fouroversix": "fouroversix",
    "fp8": "kernels",
    "fp_quant": "fp_quant",
    "gemma": "",
    "gptq": "optimum gptqmodel",
    "higgs": "flute-kernel fast_hadamard_transform",
    "hqq": "hqq",
    "metal": "kernels",
    "mxfp4": "kernels",
    "mxfp8": "kernels",
    "nvfp4": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "'spqr_quant[gpu]'",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""What transformers opens models of a `quant_method` with: packages to install."""
_PACKED = ("I8", "U8", "I32", "U32", "I64", "U64", "I16", "U16")


def how_quantised(source: ModelSource) -> str | None:
    """What says that a model is quantised, for people; None if nothing does."""
    config = read_config(source.folder)
    for place, section in {"": config, **parts_of(config)}.items():
        if told := next((key for key in QUANTISED if section.get(key)), None):
            return f"config.json has {place}.{told}" if place else f"config.json has {told}"
    return left_over(source.specs)


def left_over(specs: Mapping[str, TensorSpec]) -> str | None:
    """What among tensors says that some are codes."""
    if (name := _companion(specs)) is not None:
        return f"{name} belongs to packed weights"
    matrices = [spec for spec in specs.values() if _is_matrix(spec)]
    packed = [spec for spec in matrices if spec.dtype.name in _PACKED]
    if 2 * len(packed) <= len(matrices):
        return None
    return f"{packed[0].name} is {packed[0].dtype.name}, as are {len(packed)} of {len(matrices)} matrices"


def _companion(specs: Mapping[str, TensorSpec]) -> str | None:
    """A tensor that only a quantised weight has beside it."""
    for name in specs:
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in specs:
            return name
        match = _COMPANIONS.fullmatch(name)
        if match and not (match[2] == "g_idx" and f"{match[1]}.qweight" not in specs):
            return name
    return None


def _is_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is where a layer has its weights."""
    return len(spec.shape) == 2 and spec.name.endswith(".weight") and min(spec.shape) > 1


def plain_numbers(model: ModelSource) -> ModelSource:
    """A model whose tensors are the numbers they stand for: itself, or what its codes mean. Raises PlanError."""
    made = dequantised(model)
    if how := how_quantised(model) if made is model else left_over(made.specs) or _without_scale(made.specs):
        where = str(model.folder or (model.files[0].path if model.files else "in memory"))
        what = f"its weights are quantised ({how}), so arithmetic on them is meaningless"
        raise PlanError(what, where, _advice(model, where))
    return made


def _without_scale(specs: Mapping[str, TensorSpec]) -> str | None:
    """Of a model with scales, a weight that has none."""
    raw = next((spec for spec in specs.values() if spec.dtype.is_float and spec.dtype.bits == 8), None)
    return None if raw is None else f"{raw.name} is {raw.dtype.name}, and no scale fits it"


def _advice(model: ModelSource, where: str) -> str:
    """How to get plain weights: with transformers where it can make them, else those that the codes were made of."""
    method = str(quantisation_of(model).get("quant_method"))
    if method == "compressed-tensors" and model.folder is not None:
        how = "dtype='bfloat16', quantization_config=t.CompressedTensorsConfig(dequantize=True)"
        load = f"from_pretrained({where!r}, {how})"
        code = f"import transformers as t; t.AutoModelForCausalLM.{load}.save_pretrained({where + '-plain'!r})"
        return f'pip install compressed-tensors; python -c "{code}"; and merge {where}-plain'
    if method in OPENED_WITH and model.folder is not None:
        install = f"pip install {OPENED_WITH[method]} && " if OPENED_WITH[method] else ""
        plain = f"{where}-plain"
        return f"{install}mergetool dequantise {quote(where)} -o {quote(plain)}, and merge {plain}"
    return "merge the model that it was made from, or dequantise it first with the library that quantised it"


def file_about_codes(source: ModelSource) -> str | None:
    """A file beside plain weights that says how they are, or once were, quantised."""
    if is_dequantised(source):
        return None
    return next((name for name in _FILES if source.folder is not None and (source.folder / name).is_file()), None)


def is_raw_float8(source: ModelSource) -> bool:
    """Whether weights are stored in 8-bit floats that stand for themselves."""
    return any(spec.dtype.is_float and spec.dtype.bits == 8 for spec in source.specs.values())
