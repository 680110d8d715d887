"""Adapters are looked up by themselves, and what they were trained on is compared with what they meet."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import mergetool
from mergetool.errors import PlanError, SourceError
from mergetool.planning.sources import Lookup
from mergetool.tensors.folder import open_model
from tests.checkpoints.adapters.peft_oracle import LLAMA, Trained, train
from tests.checkpoints.adapters.test_oracle import llama


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    torch.manual_seed(1)
    return train(tmp_path, llama(), target_modules=["q_proj"], r=2)


def made_for(adapter: Path, name: str | None) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return adapter


def test_an_adapter_is_opened_by_itself(trained: Trained) -> None:
    lookup = Lookup(trained.adapter.parent)
    source = lookup.open_adapter("a", "./adapter")
    assert "model.layers.0.self_attn.q_proj.weight" in source.specs
    assert [origin.reference for origin in lookup.origins["a"]] == ["./adapter"]
    assert lookup.warnings == []


def test_adapters_of_two_repositories_are_told(trained: Trained) -> None:
    lookup, folder = Lookup(trained.adapter.parent), trained.adapter.parent
    for name, base in {"a": "org/one", "b": "Org/One", "c": None, "d": "./one", "e": "org/two"}.items():
        shutil.copytree(trained.adapter, folder / name)
        made_for(folder / name, base)
        lookup.open_adapter(name, f"./{name}")
    assert lookup.warnings == ["e was trained on org/two, a on org/one: are they of one model?"]


def test_one_layer_by_two_names_is_no_two_layers(tmp_path: Path) -> None:
    """Adapters of a model and of the same model without its head; on the base, both are of one layer, as advised."""
    torch.manual_seed(1)
    one = train(tmp_path / "one", llama(), target_modules=["q_proj"], r=2)
    hf.LlamaModel.from_pretrained(one.model).save_pretrained(tmp_path / "bare")
    two = train(tmp_path / "two", hf.LlamaModel.from_pretrained(tmp_path / "bare"), target_modules=["q_proj"], r=2)
    lookup = Lookup(tmp_path)
    lookup.open_adapter("one", str(one.adapter))
    with pytest.raises(PlanError, match="one tensor by two names") as caught:
        lookup.open_adapter("two", str(two.adapter))
    assert "{source: MODEL, adapters: [ADAPTER]}" in caught.value.fix
    models = {
        name: {"source": str(one.model), "adapters": [str(each.adapter)]}
        for name, each in zip("ab", (one, two), strict=True)
    }
    data = {"base": str(one.model), "models": models, "merge": {"method": "task-arithmetic"}}
    found = load_file(mergetool.run(data, output=tmp_path / "out").path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    start = load_file(one.model / "model.safetensors")[name]
    wanted = one.merged[name] + two.merged[name.removeprefix("model.")] - start
    torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_an_adapter_must_fit_the_base(trained: Trained, tmp_path: Path) -> None:
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "hidden_size": 16})).save_pretrained(tmp_path / "narrow")
    lookup = Lookup(tmp_path)
    with pytest.raises(SourceError, match=r"model.layers.0.self_attn.q_proj.weight is \[16, 16\]"):
        lookup.open_adapter("a", "./adapter", lookup.open("base", "./narrow"))
    lookup.open_adapter("a", "./adapter", lookup.open("base", "./model"))
    assert lookup.warnings == []


@pytest.mark.parametrize("there", [True, False])
def test_a_base_elsewhere_is_told_if_it_is_there(trained: Trained, there: bool, tmp_path: Path) -> None:
    shutil.copytree(trained.model, tmp_path / "other")
    made_for(trained.adapter, str(tmp_path / ("model" if there else "gone")))
    data = {"base": "./other", "models": {"a": {"adapter": "./adapter"}}, "merge": {"method": "task-arithmetic"}}
    plan = mergetool.plan(mergetool.load_recipe(data | {"output": {"path": "out"}}, folder=tmp_path))
    told = f"a: its adapter was trained on {tmp_path / 'model'}, and is applied to {tmp_path / 'other'}"
    assert (told in plan.warnings) is there
    lookup = Lookup(tmp_path)
    lookup.open_adapter("a", "./adapter", lookup.open("base", "./other"))
    assert (told in lookup.warnings) is there


def test_a_base_that_is_no_folder_says_nothing(trained: Trained, tmp_path: Path) -> None:
    shutil.copy(trained.model / "model.safetensors", tmp_path / "weights.safetensors")
    lookup = Lookup(tmp_path)
    lookup.open_adapter("a", "./adapter", lookup.open("base", "./weights.safetensors"))
    assert lookup.warnings == []
    lookup.origins["base"] = ()  # a recipe makes it
    lookup.open_adapter("b", "./adapter", open_model(trained.model))
