"""Quantised checkpoints as people have them: what is read is what the codes mean, in float64 code of the test's own."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import mergetool
from tests.zoo.build import build, change_config, config_of, copy_side_files
from tests.zoo.families import FAMILIES
from tests.zoo.files import weights
from tests.zoo.oracle import logits, opened

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def spread(value, grid, block):
    """`grid` with each entry as often as its block asks for, cut to the shape of `value`."""
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: value.shape[0], : value.shape[1]]


def by_block(value, block):
    """The largest magnitude in every block, and the codes' scale for it."""
    rows, columns = -(-value.shape[0] // block[0]), -(-value.shape[1] // block[1])
    grid = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            part = value[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            grid[row, column] = part.abs().max()
    return grid


def fp8(block, dtype=E4M3, name="_scale_inv", shape=None, scales=torch.float32):
    """Codes of one block size: `block` of None is the whole row or column."""

    def quantise(key, value):
        size = tuple(length if each is None else each for each, length in zip(block, value.shape, strict=True))
        scale = (by_block(value, size) / torch.finfo(dtype).max).to(scales)
        over = spread(value, scale.double(), size)
        codes = (value / over).to(torch.float32).to(dtype)
        expected = codes.double() * over
        stored = scale if shape is None else scale.reshape(shape(scale))
        return {key: codes, f"{key}{name}": stored}, expected

    return quantise


def exponents(key, value):
    """Scales that are powers of two, as bytes (MX formats)."""
    grid = by_block(value, (1, 8)).clamp_min(1e-30).log2().ceil() - 8
    over = spread(value, torch.exp2(grid), (1, 8))
    codes = (value / over).float().to(E4M3)
    return {key: codes, f"{key}_scale_inv": (grid + 127).to(torch.uint8)}, codes.double() * over


def int8_rows(key, value):
    scale = (value.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (value / scale.double()).round().to(torch.int8)
    return {key: codes, f"{key}_scale": scale}, codes.double() * scale.double()


def int8_with_zero(key, value):
    low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
    scale = ((high - low) / 254).float()
    zero = (-127 - low / scale.double()).round()
    codes = (value / scale.double() + zero).round().clamp(-128, 127).to(torch.int8)
    stored = {key: codes, f"{key}_scale": scale, f"{key}_zero_point": zero.to(torch.int8)}
    return stored, (codes.double() - zero) * scale.double()


def llm_int8(key, value):
    scale = value.abs().amax(1).float()
    codes = (value / scale.double()[:, None] * 127).round().to(torch.int8)
    stem = key.removesuffix("weight")
    stored = {key: codes, f"{stem}SCB": scale, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.double() * scale.double()[:, None] / 127


NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def nf4(key, value, *, nested=False):
    runs = value.reshape(-1, 64)
    scale, extra = runs.abs().amax(1).float(), {}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(value.shape)}
    if nested:
        scale, extra, more = _nested(key, scale)
        state |= more
    table = torch.tensor(NF4, dtype=torch.float64)
    codes = (runs / scale.double()[:, None])[..., None].sub(table).abs().argmin(-1)
    pairs = codes.reshape(-1, 2)
    stored = {
        key: (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8),
        f"{key}.absmax": scale.clone(),
        f"{key}.quant_map": table.float(),
        f"{key}.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
        **extra,
    }
    return stored, (table[codes] * scale.double()[:, None]).reshape(value.shape)


def _nested(key, scale):
    """The scales in 8 bits, for each 256 of them one of their own."""
    offset = scale.mean().item()
    table = torch.linspace(-1, 1, 256, dtype=torch.float64)
    outer = (scale.double() - offset).abs().reshape(1, -1).amax(1).float()
    codes = ((scale.double() - offset) / outer.double())[:, None].sub(table).abs().argmin(-1)
    made = (table.float()[codes] * outer + torch.tensor(offset)).float()
    stored = {
        f"{key}.absmax": codes.to(torch.uint8),
        f"{key}.nested_absmax": outer,
        f"{key}.nested_quant_map": table.float(),
    }
    return made, stored, {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}


def nf4_nested(key, value):
    made, expected = nf4(key, value, nested=True)
    return made, expected


def packed(codes, bits, axis, order=None):
    """Whole numbers in 32 bits each, along an axis: the first in the lowest bits, or in this order."""
    each = 32 // bits
    rows = codes.movedim(axis, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % each))
    groups = rows.reshape(*rows.shape[:-1], -1, each)[..., list(order or range(each))].long()
    words = (groups << torch.arange(0, 32, bits)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, axis).contiguous()


def integers(value, groups, bits, *, zero):
    """(codes, scales, zeros) of a matrix (out, in): a scale and a zero point for each output and group of inputs."""
    count, largest = int(groups.max()) + 1, 2**bits - 1
    scales = torch.zeros(count, value.shape[0], dtype=torch.float16)
    zeros = torch.full((count, value.shape[0]), 2 ** (bits - 1))
    for group in range(count):
        part = value[:, groups == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if zero:
            scales[group] = (high - low) / largest
            zeros[group] = (-low / scales[group].double()).round().clamp(0, largest).long()
        else:
            scales[group] = torch.maximum(-low, high) / 2 ** (bits - 1)
    over, under = scales.double().T[:, groups], zeros.T[:, groups]
    codes = (value / over + under).round().clamp(0, largest).long()
    return codes, scales, zeros, (codes - under).double() * over


def gptq(bits=4, *, zero=False, two=False, shuffled=False, index=True):
    def quantise(key, value):
        groups = torch.arange(value.shape[1]) // 8
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
        codes, scales, zeros, expected = integers(value, groups, bits, zero=zero)
        stem, less = key.removesuffix("weight"), 0 if two else int("".join(["0" * (bits - 1) + "1"] * (32 // bits)), 2)
        words = packed(zeros, bits, 1).long() - less
        stored = {
            f"{stem}qweight": packed(codes.T, bits, 0),
            f"{stem}qzeros": (words + 2**31).remainder(2**32).sub(2**31).to(torch.int32),
            f"{stem}scales": scales,
            **({f"{stem}g_idx": groups.to(torch.int32)} if index else {}),
        }
        return stored, expected

    return quantise


def stream(codes, axis):
    """3-bit numbers one after the other along an axis, the first in the lowest bits of the first 32."""
    rows = codes.movedim(axis, -1)
    bits = (rows[..., None] >> torch.arange(3) & 1).reshape(*rows.shape[:-1], -1, 32)
    words = (bits.long() << torch.arange(32)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, axis).contiguous()


def gptq_3(*, zero=False, two=False, less=None):
    def quantise(key, value):
        groups = torch.arange(value.shape[1]) // 8
        codes, scales, zeros, expected = integers(value, groups, 3, zero=zero)
        if not two and not less:  # what is one less has to be a number
            zeros = zeros.clamp_min(1)
            expected = (codes - zeros.T[:, groups]).double() * scales.double().T[:, groups]
        words = stream(zeros - (0 if two or less else 1), 1).long()
        if less:
            words = words - torch.tensor(less).repeat(words.shape[1] // 3)
        stem = key.removesuffix("weight")
        stored = {
            f"{stem}qweight": stream(codes.T, 0),
            f"{stem}qzeros": (words + 2**31).remainder(2**32).sub(2**31).to(torch.int32),
            f"{stem}scales": scales,
            f"{stem}g_idx": groups.to(torch.int32),
        }
        return stored, expected

    return quantise


BY_GPTQMODEL = (  # what that library takes from every third word
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)


def awq(key, value):
    codes, scales, zeros, expected = integers(value, torch.arange(value.shape[1]) // 8, 4, zero=True)
    stem, order = key.removesuffix("weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {f"{stem}qweight": packed(codes.T, 4, 1, order), f"{stem}qzeros": packed(zeros, 4, 1, order)}
    return {**stored, f"{stem}scales": scales}, expected


def compressed(bits, *, zero=False, shuffled=False):
    def quantise(key, value):
        groups = torch.arange(value.shape[1]) // 8
        groups = groups.flip(0) if shuffled else groups
        codes, scales, zeros, expected = integers(value, groups, bits, zero=zero)
        stored = {
            f"{key}_packed": packed(codes, bits, 1),
            f"{key}_scale": scales.T.contiguous(),
            f"{key}_shape": torch.tensor(value.shape),
        }
        stored |= {f"{key}_zero_point": packed(zeros.T, bits, 0)} if zero else {}
        stored |= {f"{key}_g_idx": groups.to(torch.int32)} if shuffled else {}
        return stored, expected

    return quantise


FLOATS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def four_bits(*, names=("_packed", "_scale", "_global_scale"), exponents=False):
    """Floats of 4 bits, two in a byte, groups of eight: a scale in 8 bits and one for all, or powers of two."""

    def quantise(key, value):
        grid = by_block(value, (1, 8)).clamp_min(1e-30) / 6
        overall = (448 / grid.max()).float()
        if exponents:
            stored = (grid.log2().ceil() + 127).to(torch.uint8)
            scale = torch.exp2(stored.double() - 127)
        else:
            stored = (grid * overall.double()).float().to(E4M3)
            scale = stored.double() / overall.double()
        over = spread(value, scale, (1, 8))
        codes = (value / over.clamp_min(1e-30))[..., None].sub(FLOATS).abs().argmin(-1)
        made = {f"{key}{names[0]}": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), f"{key}{names[1]}": stored}
        if not exponents:
            made[f"{key}{names[2]}"] = overall.reshape(1) if names[0] else 1 / overall
        return made, FLOATS[codes] * over

    return quantise


PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FORMS = {
    "GPTQ": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "GPTQ, shuffled": (gptq(zero=True, shuffled=True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "GPTQ, 8 bits": (gptq(8, zero=True), {"quant_method": "gptq", "bits": 8}),
    "GPTQ, 2 bits": (gptq(2), {"quant_method": "gptq", "bits": 2}),
    "GPTQ, 3 bits": (gptq_3(zero=True), {"quant_method": "gptq", "bits": 3}),
    "GPTQ, 3 bits, format 2": (
        gptq_3(zero=True, two=True),
        {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"},
    ),
    "GPTQ, 3 bits, by GPTQModel": (
        gptq_3(zero=True, less=BY_GPTQMODEL),
        {"quant_method": "gptq", "bits": 3, "meta": {"quantizer": ["gptqmodel:4.2.5"]}},
    ),
    "GPTQ, format 2": (gptq(zero=True, two=True), {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
    "GPTQ, no index": (gptq(index=False), {"quant_method": "gptq", "bits": 4}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "packed": (compressed(4), PACKED),
    "packed, 8 bits": (compressed(8), PACKED),
    "packed, with zeros": (compressed(4, zero=True), PACKED),
    "packed, shuffled": (compressed(4, shuffled=True), PACKED),
    "4-bit floats": (four_bits(), {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "4-bit floats, exponents": (
        four_bits(exponents=True),
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    ),
    "4-bit floats, times": (
        four_bits(names=("", "_scale", "_scale_2")),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "blocks": (fp8((8, 8)), {"quant_method": "fp8", "weight_block_size": [8, 8]}),
    "blocks that do not fit": (fp8((7, 9)), {"quant_method": "fp8", "weight_block_size": [7, 9]}),
    "blocks that are not told": (fp8((8, 4)), {"quant_method": "fp8"}),
    "bfloat16 scales": (fp8((8, 8), scales=torch.bfloat16), {"quant_method": "fp8", "weight_block_size": [8, 8]}),
    "exponents": (exponents, {"quant_method": "mxfp8"}),
    "rows": (fp8((1, None), name="_scale"), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "rows, one axis": (
        fp8((1, None), name="_scale", shape=lambda scale: (len(scale),)),
        {"quant_method": "fbgemm_fp8"},
    ),
    "tensor": (fp8((None, None), name="_scale", shape=lambda _: (1,)), {"quant_method": "compressed-tensors"}),
    "tensor, a number": (fp8((None, None), name="_scale", shape=lambda _: ()), {"quant_method": "modelopt"}),
    "five bits of exponent": (fp8((1, None), E5M2, "_scale"), {"quant_method": "quark"}),
    "groups": (fp8((1, 4), name="_scale"), {"quant_method": "compressed-tensors"}),
    "integers": (int8_rows, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "integers with zero": (int8_with_zero, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "LLM.int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4, nested": (nf4_nested, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [change_config(build(root / name, "llama", seed), dtype="bfloat16") for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose matrices have rows and columns by the 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("wide") / "a"
    return change_config(build(folder, "llama", 0, head_dim=16, **sizes), dtype="bfloat16")


def quantised(folder, source, form):
    """`source` with the projections as codes, and what these mean by name."""
    quantise, settings = FORMS[form]
    stored, expected = {}, {}
    for name, value in weights(source).items():
        if "_proj.weight" in name:
            made, expected[name] = quantise(name, value.double())
            stored |= made
        else:
            stored[name] = value.to(torch.bfloat16)
            expected[name] = stored[name].double()
    stored["model.layers.0.self_attn.k_proj.input_scale"] = torch.ones(1)
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    copy_side_files(source, folder)
    change_config(folder, quantization_config=settings)
    return expected


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_read_as_what_they_mean(form, sources, wide, tmp_path):
    expected = quantised(tmp_path / "codes", wide if "3 bits" in form else sources[0], form)
    recipe = {
        "models": {"a": str(tmp_path / "codes")},
        "merge": {"method": "passthrough"},
        "output": {"dtype": "float32"},
    }
    result = mergetool.run(recipe, output=tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(written[name].double(), value, rtol=2e-7, atol=1e-9)
    assert any("quantised: they are dequantised" in warning for warning in result.warnings)
    kind = FAMILIES["llama"]
    module, info = opened(result.path, kind.model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    other = kind.model(module.config).double().eval()
    other.load_state_dict(expected)
    torch.testing.assert_close(logits(module, kind.inputs()), logits(other, kind.inputs()), rtol=0, atol=1e-5)


def gpt_oss(folder, seed=0):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **heads, dtype="bfloat16", pad_token_id=0, eos_token_id=1))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def as_fours(folder):
    """The experts of a checkpoint as 4-bit floats, in place; what these mean by name."""
    path, expected = folder / "model.safetensors", {}
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    stored = load_file(path)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        value = stored.pop(name).double().transpose(1, 2)  # outputs first
        runs = value.reshape(*value.shape[:2], -1, 32)
        exponents = (runs.abs().amax(-1).clamp_min(1e-30) / 6).log2().ceil()
        codes = (runs / exponents.exp2()[..., None])[..., None].sub(table).abs().argmin(-1)
        pairs = codes.reshape(*codes.shape[:-1], 16, 2)
        stored[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        meant = table[codes] * exponents.exp2()[..., None]
        expected[name] = meant.reshape(value.shape).transpose(1, 2)
    save_file({name: value.contiguous() for name, value in stored.items()}, path, {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return expected


def test_experts_of_4_bit_floats_are_read_as_transformers_reads_them(tmp_path):
    other = gpt_oss(tmp_path / "other", 1)
    expected = as_fours(gpt_oss(tmp_path / "codes"))
    models = {"a": str(tmp_path / "codes"), "b": str(other)}
    recipe = {"models": models, "merge": {"method": "linear", "weight": {"a": 1.0, "b": 0.0}}}
    result = mergetool.run(recipe, output=tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(written[name].double(), value), name
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "codes", quantization_config=hf.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    for name in expected:
        assert torch.equal(written[name], theirs[name]), name
    _, info = opened(result.path, hf.GptOssForCausalLM)
    assert not info["missing_keys"]
    source = mergetool.plan(recipe).sources["a"]
    name = next(iter(expected))
    whole = expected[name].float().reshape(-1)
    for start, stop in ((1, 2), (2000, 2100), (len(whole) - 70, len(whole))):
        buffer = bytearray(4 * (stop - start))
        source.read_bytes(name, 4 * start, memoryview(buffer))
        assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), whole[start:stop])


@pytest.mark.parametrize("form", ["blocks", "LLM.int8", "nf4, nested"])
def test_the_result_is_stored_and_described_as_before(form, sources, tmp_path):
    expected = quantised(tmp_path / "codes", sources[0], form)
    models = {"a": str(tmp_path / "codes"), "b": str(sources[1])}
    recipe = {"models": models, "merge": {"method": "linear", "weight": {"a": 0.25, "b": 0.75}}}
    result = mergetool.run(recipe, output=tmp_path / "out")
    written, other = load_file(result.path / "model.safetensors"), weights(sources[1])
    for name, value in expected.items():
        assert written[name].dtype == torch.bfloat16
        wanted = 0.25 * value + 0.75 * other[name].double()
        torch.testing.assert_close(written[name].double(), wanted, rtol=2**-8, atol=1e-6)
    config = config_of(result.path)
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert not mergetool.plan({**recipe, "models": {"a": str(result.path), "b": str(sources[1])}}).sources["a"].remarks


@pytest.mark.parametrize("form", ["blocks that do not fit", "4-bit floats"])
def test_layers_of_codes_are_stacked_and_any_slice_of_them_read(form, sources, tmp_path):
    expected = quantised(tmp_path / "codes", sources[0], form)
    slices = [{"a": [0, 2]}, {"b": [1, 2]}, {"a": [1, 2]}]
    models = {"a": str(tmp_path / "codes"), "b": str(sources[1])}
    recipe = {"models": models, "merge": {"method": "passthrough"}, "slices": slices, "output": {"dtype": "float32"}}
    result = mergetool.run(recipe, output=tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    written = load_file(result.path / "model.safetensors")[name.format(3)]
    torch.testing.assert_close(written.double(), expected[name.format(1)], rtol=2e-7, atol=1e-9)
    source = mergetool.plan(recipe).sources["a"]
    for start, stop in ((0, 1), (3, 17), (15, 16), (100, 384), (383, 384)):
        buffer = bytearray(4 * (stop - start))
        source.read_bytes(name.format(1), 4 * start, memoryview(buffer))
        part = torch.frombuffer(buffer, dtype=torch.float32)
        torch.testing.assert_close(part, written.reshape(-1)[start:stop], rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["no scale", "one scale missing", "another grid", "no JSON"])
def test_codes_that_are_not_understood_are_refused(damage, sources, tmp_path):
    quantised(tmp_path / "codes", sources[0], "nf4" if damage == "no JSON" else "blocks")
    path = tmp_path / "codes" / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "no JSON":
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(4, dtype=torch.uint8)
    elif damage == "one scale missing":
        del stored[f"{name}_scale_inv"]
    elif damage == "no scale":
        for key in [key for key in stored if key.endswith("_scale_inv")]:
            del stored[key]
    else:
        stored[f"{name}_scale_inv"] = torch.ones(5, 7)
    save_file(stored, path)
    recipe = {"models": {"a": str(tmp_path / "codes"), "b": str(sources[1])}, "merge": {"method": "linear"}}
    with pytest.raises(mergetool.MergetoolError, match="not JSON" if damage == "no JSON" else "quantised"):
        mergetool.plan(recipe)


def test_codes_that_transformers_can_read_come_with_the_command(sources, tmp_path):
    quantised(tmp_path / "codes", sources[0], "packed")
    path = tmp_path / "codes" / "model.safetensors"
    stored = load_file(path)
    for key in [key for key in stored if key.endswith("weight_packed")]:
        stored[key] = stored[key].view(torch.uint8)  # four bits of floats, as NVFP4 has them
    save_file(stored, path)
    with pytest.raises(mergetool.MergetoolError) as caught:
        mergetool.plan({"models": {"a": str(tmp_path / "codes")}, "merge": {"method": "passthrough"}})
    code = caught.value.fix.split('"')[1]
    assert "CompressedTensorsConfig(dequantize=True)" in code
    compile(code, "fix", "exec")
