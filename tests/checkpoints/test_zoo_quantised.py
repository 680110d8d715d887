"""Quantised weights, told by what the files hold: arithmetic on codes and scales means nothing."""

import json

import pytest
import torch

from tests.checkpoints.recipes import recipe_of
from tests.zoo import files
from tests.zoo.advice import assert_said
from tests.zoo.build import copy_of

RANDOM = torch.Generator().manual_seed(0)


def codes(*shape, dtype):
    """Other codes each time."""
    return torch.randint(0, 127, shape, generator=RANDOM).to(dtype)


def gptq(name, value):
    rows, columns = value.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": codes(columns // 8, rows, dtype=torch.int32),
        f"{stem}qzeros": codes(1, rows // 8, dtype=torch.int32),
        f"{stem}scales": value.abs().amax(1)[None].half(),
        f"{stem}g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def fp8_blocks(name, value):
    scale = value.abs().max() / 448
    return {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}


def fp8_alone(name, value):
    return {name: value.to(torch.float8_e4m3fn)}


def bitsandbytes_8(name, value):
    scale = value.abs().amax(1)
    return {name: (value / scale[:, None] * 127).round().to(torch.int8), name.replace("weight", "SCB"): scale}


def bitsandbytes_4(name, value):
    return {
        name: codes(value.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": value.reshape(-1, 16).abs().amax(1),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(30, dtype=torch.uint8),
    }


def compressed_8(name, value):
    scale = value.abs().max() / 127
    return {name: (value / scale).round().to(torch.int8), f"{name}_scale": scale.reshape(1)}


def compressed_packed(name, value):
    return {
        f"{name}_packed": codes(value.shape[0], value.shape[1] // 8, dtype=torch.int32),
        f"{name}_scale": value.abs().amax(1, keepdim=True),
        f"{name}_shape": torch.tensor(value.shape),
    }


def mxfp4(name, value):
    return {
        f"{name}_blocks": codes(value.shape[0], value.shape[1] // 2, dtype=torch.uint8),
        f"{name}_scales": codes(value.shape[0], 1, dtype=torch.uint8),
    }


FORMATS = [gptq, fp8_blocks, fp8_alone, bitsandbytes_8, bitsandbytes_4, compressed_8, compressed_packed, mxfp4]


def quantised(zoo, source, form):
    def change(state):
        return {
            key: value
            for name, tensor in state.items()
            for key, value in (form(name, tensor) if "_proj.weight" in name else {name: tensor}).items()
        }

    return zoo.made(f"{source.name}-{form.__name__}", lambda folder: files.rewritten(folder, source, change))


@pytest.mark.parametrize("who", ["everyone", "one model", "averaged"])
@pytest.mark.parametrize("form", FORMATS)
def test_quantised_weights_are_named_for_what_they_are(zoo, form, who, tmp_path):
    sources = zoo.base("llama"), zoo.tuned("llama", 1), zoo.tuned("llama", 2)
    base, a, b = (quantised(zoo, source, form) for source in sources)
    recipe = {
        "everyone": recipe_of(base, a, b),
        "one model": recipe_of(sources[0], a, sources[2]),
        "averaged": recipe_of(None, a, b, method="linear"),
    }[who]
    assert_said("quant", recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "holds"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        *(
            case
            for case in [
                ("compression_config", {"format": "int-quantized"}),
                ("text_config", {"quantization_config": {"quant_method": "gptq"}}),
                ("quantization", {"bits": 4, "group_size": 64}),
                ("quantize_config.json", {"bits": 4, "group_size": 128}),
                ("quant_config.json", {"w_bit": 4}),
                ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
            ]
        ),
    ],
)
def test_files_that_say_quantised_are_read(zoo, place, holds, tmp_path):
    other = copy_of(tmp_path / "other", zoo.tuned("llama", 2), **({} if place.endswith("json") else {place: holds}))
    if place.endswith("json"):
        (other / place).write_text(json.dumps(holds))
    assert_said("quant", recipe_of(zoo.base("llama"), zoo.tuned("llama", 1), other), tmp_path / "out")
