"""What a library has quantised becomes plain weights, whatever its codes are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.checkpoints.quantised import OPENED_WITH
from mergetool.errors import OutputError, PlanError, SourceError
from mergetool.networks.dequantise import dequantise
from tests.checkpoints.recipes import recipe_of
from tests.zoo.build import copy_of

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler, of itself

BITNET = {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}


@pytest.fixture(scope="module")
def bitnet(zoo, tmp_path_factory):
    """A Llama whose projections are ternary, as transformers stores BitNet, and what they stand for."""
    from transformers.integrations.bitnet import pack_weights

    folder = copy_of(tmp_path_factory.mktemp("bitnet") / "it", zoo.tuned("llama", 1), **BITNET)
    stored, meant = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            stored[name] = meant[name] = value
            continue
        scale = 1 / value.abs().mean()
        codes = (value * scale).round().clamp(-1, 1)
        stored[name], stored[name.replace("weight", "weight_scale")] = pack_weights(codes.clone()), scale.reshape(1)
        meant[name] = codes / scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder, meant


def test_every_layer_becomes_the_matrix_that_it_is(bitnet, tmp_path):
    folder, meant = bitnet
    made = dequantise(folder, tmp_path / "plain")
    found = load_file(made / "model.safetensors")
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


def test_the_refusal_tells_the_command(bitnet, zoo, tmp_path):
    folder, _ = bitnet
    recipe = recipe_of(None, folder, zoo.tuned("llama", 2), method="linear")
    with pytest.raises(PlanError, match=r"mergetool dequantise .*it -o .*it-plain"):
        mergetool.run(recipe, output=tmp_path / "out")
    recipe["models"]["a"] = str(dequantise(folder, tmp_path / "plain"))
    assert mergetool.run(recipe, output=tmp_path / "out").path.is_dir()


def test_what_is_there_or_plain_is_left(bitnet, zoo, tmp_path):
    with pytest.raises(OutputError, match="already exists"):
        dequantise(bitnet[0], tmp_path)
    with pytest.raises(SourceError, match="none of its layers is quantised"):
        dequantise(zoo.tuned("llama", 2), tmp_path / "out")


def test_what_cannot_be_written_whole_is_not_there(bitnet, tmp_path):
    folder = copy_of(tmp_path / "it", bitnet[0])
    (tmp_path / "plain.partial").mkdir()
    (tmp_path / "plain.partial" / "of a killed run").touch()
    made = dequantise(folder, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "plain"]
    assert not (made / "of a killed run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        dequantise(folder, tmp_path / "file" / "plain")


def test_every_way_that_transformers_knows_has_its_advice():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    files = {"gguf"}  # which is no folder with a config.json
    ways = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    assert ways - files == {*OPENED_WITH, "compressed-tensors"}


@pytest.mark.parametrize("way", OPENED_WITH)
def test_codes_that_nobody_reads_are_refused_with_what_opens_them(way, zoo, tmp_path):
    section = {"quantization_config": {"quant_method": way}}
    folder = copy_of(tmp_path / "it", zoo.tuned("llama", 1), **section)
    weights = load_file(folder / "model.safetensors")
    unknown = {name.replace("_proj.weight", "_proj.W_q"): value for name, value in weights.items()}
    save_file(unknown, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="quantised") as refused:
        mergetool.plan(recipe_of(None, folder, zoo.tuned("llama", 2), method="linear"))
    command = f"mergetool dequantise {folder} -o {folder}-plain"
    assert command in refused.value.fix
    assert OPENED_WITH[way] in refused.value.fix
