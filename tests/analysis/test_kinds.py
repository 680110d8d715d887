"""Recipes of every kind: what is analyzed of them, and what is refused."""

import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import mergetool
from mergetool.errors import PlanError, SourceError
from tests.analysis.models import state
from tests.files import tensors, write_model, write_models


@pytest.fixture(scope="module")
def adapters(family, tmp_path_factory):
    """Two LoRA adapters of the base."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        model = hf.AutoModelForCausalLM.from_pretrained(family / "base")
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.data.normal_()
            adapted.save_pretrained(folder / name)
            adapted.merge_and_unload().save_pretrained(folder / f"merged-{name}")
    return folder


def test_adapters_by_themselves_are_what_they_add(family, adapters):
    recipe = {"models": {name: {"adapter": str(adapters / name)} for name in "ab"}, "merge": {"method": "linear"}}
    found = mergetool.analyze(recipe)
    base, merged = state(family / "base"), state(adapters / "merged-a")
    norm = sum(float((merged[name] - base[name]).square().sum()) for name in base) ** 0.5
    assert found.facts["compared_with"] == "zero"
    row = found.rows("models")[0]
    assert row["norm"] == pytest.approx(norm, rel=1e-4)
    assert (row["relative"], row["kinship"]) == (None, None)
    assert len(found.rows("tensors")) == 6
    assert all(len(row["leading"]) == 4 for row in found.rows("spectra"))


def test_adapters_are_measured_on_their_base_where_the_recipe_has_one(family, adapters):
    models = {name: {"adapter": str(adapters / name)} for name in "ab"}
    recipe = {"base": str(family / "base"), "models": models, "merge": {"method": "linear"}}
    found = mergetool.analyze(recipe | {"output": {"kind": "adapter", "rank": 8}})
    whole = {"base": str(family / "base"), "models": {n: str(adapters / f"merged-{n}") for n in "ab"}}
    expected = mergetool.analyze(whole | {"merge": {"method": "task-arithmetic"}})
    assert found.facts["compared_with"] == "base"
    for one, other in zip(found.rows("models"), expected.rows("models"), strict=True):
        assert (one["norm"], one["relative"]) == pytest.approx((other["norm"], other["relative"]), rel=1e-4)


def test_recipes_inside_are_run_first_and_leave_nothing(tmp_path):
    write_models(tmp_path, names=("base", "a", "b", "c"))
    inner = {"models": {"a": "./a", "b": "./b"}, "merge": {"method": "linear"}}
    models = {"ab": {"recipe": inner, "folder": str(tmp_path)}, "c": str(tmp_path / "c")}
    base = {"base": str(tmp_path / "base"), "merge": {"method": "task-arithmetic"}}
    found = mergetool.analyze(base | {"models": models})
    mergetool.run(inner | {"models": {n: str(tmp_path / n) for n in "ab"}}, output=tmp_path / "made")
    expected = mergetool.analyze(base | {"models": {"ab": str(tmp_path / "made"), "c": str(tmp_path / "c")}})
    assert found.rows("pairs") == expected.rows("pairs")
    assert found.rows("models")[0]["norm"] == expected.rows("models")[0]["norm"]


def test_tensors_that_not_all_have_are_listed_and_left_out(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "base", state)
    write_model(tmp_path / "a", {name: value for name, value in state.items() if "norm" not in name})
    write_model(tmp_path / "b", state | {"lm_head.weight": torch.ones(4, 8)})
    models = {name: str(tmp_path / name) for name in "ab"}
    found = mergetool.analyze(
        {"base": str(tmp_path / "base"), "models": models, "merge": {"method": "task-arithmetic"}}
    )
    assert len(found.rows("tensors")) == 3
    assert sorted(found.rows("missing"), key=lambda row: row["models"]) == [
        {"tensor": "model.layers.0.norm.weight", "models": ["a"], "why": "missing"},
        {"tensor": "model.layers.1.norm.weight", "models": ["a"], "why": "missing"},
        {"tensor": "lm_head.weight", "models": ["b"], "why": "shape", "shapes": [[16, 8], [4, 8]]},
    ]


def test_models_that_have_nothing_in_common_are_refused(tmp_path):
    write_model(tmp_path / "a", {"x": torch.ones(3)})
    write_model(tmp_path / "b", {"y": torch.ones(3)})
    models = {name: str(tmp_path / name) for name in "ab"}
    with pytest.raises(PlanError, match="no floating-point tensor in common"):
        mergetool.analyze({"models": models, "merge": {"method": "linear"}})


def test_slices_are_refused_and_their_models_can_be_analyzed(tmp_path):
    write_models(tmp_path)
    recipe = {"models": {n: str(tmp_path / n) for n in "ab"}, "merge": {"method": "linear"}}
    with pytest.raises(PlanError, match="a recipe of slices") as caught:
        mergetool.analyze(recipe | {"slices": [{"a": [0, 1]}, {"b": [1, 2]}]})
    assert "without slices, and merge: {method: linear}" in caught.value.fix
    assert len(mergetool.analyze(recipe).rows("tensors")) == 6


def test_a_bundle_is_no_model_and_its_experts_are(tmp_path):
    write_models(tmp_path)
    models = {name: str(tmp_path / name) for name in "ab"}
    based = {"base": str(tmp_path / "base")}
    path = mergetool.run(based | {"models": models, "merge": {"method": "tsv-compress"}}, output=tmp_path / "out").path
    recipe = based | {"models": {"a": str(path), "b": models["b"]}, "merge": {"method": "task-arithmetic"}}
    with pytest.raises(SourceError, match="bundle of several experts"):
        mergetool.analyze(recipe)
    expert = recipe | {"models": {"a": {"source": str(path), "select": "a"}, "b": models["b"]}}
    assert mergetool.analyze(expert).rows("models")[0]["norm"] > 0


def test_a_recipe_that_makes_a_bundle_is_analyzed_like_any_other(tmp_path):
    write_models(tmp_path)
    models = {name: str(tmp_path / name) for name in "ab"}
    based = {"base": str(tmp_path / "base"), "models": models}
    one, two = (mergetool.analyze(based | {"merge": {"method": m}}) for m in ("tsv-compress", "task-arithmetic"))
    assert one.rows("models") == two.rows("models")


def test_a_table_that_there_is_not(tmp_path):
    write_models(tmp_path)
    recipe = {"models": {n: str(tmp_path / n) for n in "ab"}, "merge": {"method": "linear"}}
    found = mergetool.analyze(recipe)
    with pytest.raises(PlanError, match="no table 'layer'") as caught:
        found.rows("layer")
    assert "layers" in caught.value.fix


def test_one_model_alone(tmp_path):
    write_models(tmp_path, names=("base", "a"))
    recipe = {"base": str(tmp_path / "base"), "models": {"a": str(tmp_path / "a")}}
    found = mergetool.analyze(recipe | {"merge": {"method": "task-arithmetic"}})
    assert (found.rows("pairs"), found.facts["order"], found.facts["linkage"]) == ([], ["a"], [])
    assert found.facts["whole"]["conflict"] is None


def test_convolutions_are_matrices_and_what_is_tiny_is_not_called_noise(tmp_path):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    base = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    for name, noisy in (("noise", True), ("tiny", False)):
        model = hf.ResNetForImageClassification.from_pretrained(tmp_path / "base")
        for key, parameter in model.named_parameters():
            if noisy or "classifier" in key:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("noise", "tiny")}
    recipe = {"base": str(tmp_path / "base"), "models": models, "merge": {"method": "task-arithmetic"}}
    found = mergetool.analyze(recipe)
    assert [(each["kind"], each["models"]) for each in found.advice if each["weight"] == "problem"] == [
        ("noise", ["noise"])
    ]
    row = next(row for row in found.rows("spectra") if "stages.0.layers.0.layer.0.conv" in row["tensor"])
    assert row["directions"] == 16
    name = row["tensor"]
    change = state_of(tmp_path / "noise", name) - state_of(tmp_path / "base", name)
    s = torch.linalg.svdvals(change.flatten(1))
    assert row["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-4)


def state_of(folder, name):
    return hf.ResNetForImageClassification.from_pretrained(folder, dtype=torch.float64).state_dict()[name]
