"""What differs between two models, two adapters, two locks."""

import json
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import mergetool
from mergetool.errors import SourceError
from tests.files import tensors, write_model, write_models, write_raw
from tests.words.models import build

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def by_name(found):
    return {row["tensor"]: row for row in found.rows}


def test_figures_are_those_of_float64(tmp_path):
    write_models(tmp_path)
    a, b, base = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "base"))
    found = mergetool.diff(tmp_path / "a", tmp_path / "b", tmp_path / "base")
    assert set(by_name(found)) == set(a)
    for name, row in by_name(found).items():
        one, two, zero = (state[name].double().flatten() for state in (a, b, base))
        cosine = torch.cosine_similarity
        expected = {
            "relative": (two - one).norm() / one.norm(),
            "cosine": cosine(one, two, dim=0),
            "share_changed": (one != two).double().mean(),
            "max": (two - one).abs().max(),
            "change_a": (one - zero).norm() / zero.norm(),
            "change_b": (two - zero).norm() / zero.norm(),
            "cosine_of_changes": cosine(one - zero, two - zero, dim=0),
            "share_opposed": ((one - zero) * (two - zero) < 0).double().mean(),
        }
        exact = {key: float(value) for key, value in expected.items()}
        assert {key: row[key] for key in expected} == pytest.approx(exact, rel=1e-10)
    assert [row["relative"] for row in found.rows] == sorted((row["relative"] for row in found.rows), reverse=True)


def test_slices_and_threads_do_not_change_a_figure(tmp_path):
    shapes = {"model.layers.0.up.weight": (3000, 1501), "model.layers.1.up.weight": (3000, 1501), "norm": (7,)}
    write_models(tmp_path, names=("a", "b"), shapes=shapes)
    found = mergetool.diff(tmp_path / "a", tmp_path / "b", workers=1)
    assert found.as_dict() == mergetool.diff(tmp_path / "a", tmp_path / "b", workers=3).as_dict()
    one, two = (load_file(tmp_path / name / "model.safetensors")["model.layers.1.up.weight"].double() for name in "ab")
    row = by_name(found)["model.layers.1.up.weight"]
    assert row["relative"] == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-12)


def test_layers_and_roles_are_summed_up(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "a", state)
    changed = state | {"model.layers.1.mlp.weight": state["model.layers.1.mlp.weight"] + 1}
    write_model(tmp_path / "b", changed)
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    layers = {row["name"]: (row["tensors"], row["changed"]) for row in found.layers}
    assert layers == {"outside the layers": (2, 0), "model.layers.0": (2, 0), "model.layers.1": (2, 1)}
    first = found.roles[0]
    assert (first["name"], first["tensors"], first["changed"], first["share_changed"]) == ("mlp.weight", 2, 1, 0.5)
    norm2 = sum(float(state[f"model.layers.{n}.mlp.weight"].double().square().sum()) for n in (0, 1))
    assert first["relative"] == pytest.approx(math.sqrt(64 / norm2), rel=1e-6)
    assert found.summary() == f"6 tensors: 1 changed, 5 identical; relative difference {found.total.relative:.3g}"


def test_the_experts_of_a_layer_have_one_role(tmp_path):
    state = {f"model.layers.{n}.mlp.experts.{e}.up.weight": torch.ones(2, 2) for n in range(2) for e in range(3)}
    state |= {f"model.layers.{n}.layer.{part}.weight": torch.ones(2) for n in range(2) for part in range(2)}
    write_model(tmp_path / "a", state)
    roles = {row["name"]: row["tensors"] for row in mergetool.diff(tmp_path / "a", tmp_path / "a").roles}
    assert roles == {"mlp.experts.*.up.weight": 6, "layer.0.weight": 2, "layer.1.weight": 2}


def test_the_same_is_identical_whatever_its_files_and_names(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "a", state, {"model_type": "toy"})
    write_model(tmp_path / "b", {f"module.{name}": value for name, value in state.items()}, {"model_type": "toy"})
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    assert (found.identical, found.summary()) == (True, "identical: 6 tensors, and what lies beside them")


def test_a_narrow_copy_is_called_rounded(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "a", state)
    narrow = {name: value.bfloat16() for name, value in state.items()}
    narrow["lm_head.weight"] = narrow["lm_head.weight"] + 1
    write_model(tmp_path / "b", narrow)
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    states = {name: row["state"] for name, row in by_name(found).items()}
    assert states == {name: "changed" if name == "lm_head.weight" else "rounded" for name in state}
    assert by_name(found)["lm_head.weight"]["dtype_b"] == "BF16"
    assert not found.identical


def test_tensors_of_one_side_and_of_two_shapes_are_told(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "a", state)
    other = {name: value for name, value in state.items() if "norm" not in name} | {"extra": torch.ones(2)}
    write_model(tmp_path / "b", other | {"lm_head.weight": torch.ones(4, 8)})
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    assert found.only_a == ("model.layers.0.norm.weight", "model.layers.1.norm.weight")
    assert (found.only_b, found.reshaped) == (("extra",), (("lm_head.weight", (16, 8), (4, 8)),))
    assert not found.identical


def test_whole_numbers_nan_and_codes_are_compared(tmp_path):
    data = b"\x11\x22\x33\x44"
    for name, code in (("a", data), ("b", data[:-1] + b"\x45")):
        entries = {"code": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
        write_raw(tmp_path / f"{name}.safetensors", entries, code)
    (row,) = mergetool.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").rows
    assert row["state"] == "changed"
    big = torch.tensor([1, 2**60, 3])
    write_model(tmp_path / "c", {"n": big, "x": torch.tensor([1.0, math.nan])})
    write_model(tmp_path / "d", {"n": big + torch.tensor([0, 1, 0]), "x": torch.tensor([1.0, math.nan])})
    found = mergetool.diff(tmp_path / "c", tmp_path / "d")
    assert by_name(found)["n"]["share_changed"] == pytest.approx(1 / 3)
    assert by_name(found)["x"]["state"] == "identical"
    assert json.loads(found.to_json())["tensors"]


def test_rows_are_compared_by_token(tmp_path):
    build(tmp_path / "a", "llama", "stories", 1)
    build(tmp_path / "b", "llama", "code", 1)
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    keys = {(each.file, each.key) for each in found.files}
    assert {("tokenizer", "order"), ("tokenizer", "only in the first"), ("tokenizer", "only in the second")} <= keys
    ours, theirs = (json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"] for name in "ab")
    shared = [token for token in ours if token in theirs]
    one, two = (load_file(tmp_path / name / "model.safetensors")["lm_head.weight"].double() for name in "ab")
    one, two = one[[ours[token] for token in shared]], two[[theirs[token] for token in shared]]
    found = by_name(found)["lm_head.weight"]["relative"]
    assert found == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-6)


def test_settings_beside_the_weights_are_told_by_their_keys(tmp_path):
    config = {"model_type": "llama", "rope": {"theta": 1e4, "type": "default"}, "_name_or_path": "x"}
    write_model(tmp_path / "a", tensors(0), config)
    write_model(tmp_path / "b", tensors(0), config | {"rope": {"theta": 1e6, "type": "default"}, "_name_or_path": "y"})
    for name, text in (("a", "hello\n{{ x }}\n"), ("b", "hello\n{{ y }}\n")):
        (tmp_path / name / "chat_template.jinja").write_text(text)
    (tmp_path / "b" / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    assert [tuple(each.row().values()) for each in found.files] == [
        ("config.json", "rope.theta", 1e4, 1e6),
        ("generation_config.json", "eos_token_id", None, 7),
        ("chat template", "line 2", "{{ x }}", "{{ y }}"),
    ]
    assert found.summary() == "all 6 tensors identical; 3 other settings"


def test_adapters_are_compared_by_what_they_add(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "base")
    deltas = {}
    for seed, name in enumerate("ab"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        before = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].double().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(r=4 + seed, target_modules=["q_proj"]))
            torch.manual_seed(seed)
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.data.normal_()
            adapted.save_pretrained(tmp_path / name)
            fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
            merged = PeftModel.from_pretrained(fresh, tmp_path / name).merge_and_unload()
        deltas[name] = merged.state_dict()["model.layers.0.self_attn.q_proj.weight"].double() - before
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    row = by_name(found)["model.layers.0.self_attn.q_proj.weight"]
    one, two = deltas["a"].flatten(), deltas["b"].flatten()
    assert row["relative"] == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), abs=1e-5)
    assert ("adapter_config.json", "r", 4, 5) in [tuple(each.row().values()) for each in found.files]
    with pytest.raises(SourceError, match="is an adapter, and what it is compared with is a model"):
        mergetool.diff(tmp_path / "a", tmp_path / "base")


def test_two_locks_tell_which_settings_made_the_difference(tmp_path):
    write_models(tmp_path)
    recipe = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": {"method": "linear"}}
    paths = [mergetool.run(recipe, output=tmp_path / "one").path]
    paths.append(mergetool.run(recipe, settings=["compute.seed=3"], output=tmp_path / "two").path)
    found = mergetool.diff(*(path / "mergetool.json" for path in paths))
    told = {each.key: (each.a, each.b) for each in found.files}
    assert told["seed"] == (0, 3)
    assert not any(key.startswith("run") for key in told if key != "recipe")
    assert mergetool.diff(paths[0] / "mergetool.json", paths[0] / "mergetool.json").identical
    with pytest.raises(SourceError, match="is not a lock"):
        mergetool.diff(paths[0] / "mergetool.json", tmp_path / "a")


def test_locks_tell_first_what_was_asked_and_inputs_by_their_content(tmp_path):
    write_models(tmp_path)
    recipe = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": {"method": "linear"}}
    one = mergetool.run(recipe, output=tmp_path / "one").path
    write_models(tmp_path, names=("x", "y", "z", "b"))
    two = mergetool.run(recipe, settings=["merge.weight=2"], output=tmp_path / "two").path
    found = mergetool.diff(one / "mergetool.json", two / "mergetool.json")
    keys = [each.key for each in found.files]
    assert keys[:2] == ["recipe.merge.weight", "settings"]
    assert keys[2] == "inputs.b.model.safetensors"
    assert "inputs.a.model.safetensors" not in keys
    assert keys.index("output.files.model.safetensors") > 2


def test_quantised_weights_are_compared_as_the_numbers_that_they_stand_for(tmp_path):
    weight, name = torch.linspace(-1, 1, 64).view(8, 8), "model.layers.0.mlp.up_proj.weight"
    write_model(tmp_path / "a", {name: weight}, {"model_type": "llama"})
    codes = {name: (weight * 256).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 1 / 256)}
    quantised = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    write_model(tmp_path / "b", codes, {"model_type": "llama", "quantization_config": quantised})
    found = mergetool.diff(tmp_path / "a", tmp_path / "b")
    exact = codes[name].double() / 256
    assert found.rows[0]["relative"] == pytest.approx(float((exact - weight).norm() / weight.norm()), rel=1e-6)
    assert len(found.rows) == 1
    assert any(remark.startswith("B: ") and "quantised" in remark for remark in found.remarks), found.remarks


def test_a_bundle_is_no_model(tmp_path):
    write_models(tmp_path)
    recipe = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "ab"},
        "merge": {"method": "tsv-compress"},
    }
    path = mergetool.run(recipe, output=tmp_path / "out").path
    with pytest.raises(SourceError, match="is a bundle of experts") as caught:
        mergetool.diff(path, tmp_path / "a")
    assert caught.value.fix.endswith(f"mergetool inspect {path}")
    with pytest.raises(SourceError, match="is a bundle of experts"):
        mergetool.diff(path, path, tmp_path / "base")
