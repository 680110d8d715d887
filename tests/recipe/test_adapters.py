"""`{adapter: PATH}` is the base with that adapter, whatever the base is, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import mergetool
from mergetool.errors import RecipeError, SourceError
from mergetool.planning.sources import pinned_document
from mergetool.recipe import load_recipe
from mergetool.recipe.schema import Recipe
from mergetool.testing.toys import assert_same_bytes, read
from mergetool.tuning.written import moved, parent_recipe
from tests.checkpoints.adapters.peft_oracle import SMALL, train
from tests.checkpoints.adapters.test_oracle import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, and adapters `a` and `b` of it."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, target) in enumerate({"a": "q_proj", "b": "down_proj"}.items()):
        torch.manual_seed(1)
        train(folder / name, llama(), target_modules=[target], r=2 + seed)
        shutil.move(folder / name / "adapter", folder / f"lora-{name}")
    shutil.move(folder / "a/model", folder / "base")
    return folder


def recipe(folder: Path, base: Any = "./base", method: str = "task-arithmetic", **more: Any) -> Recipe:
    models = {"a": {"adapter": "./lora-a"}, "b": {"adapter": "./lora-b"}, **more}
    return load_recipe({"base": base, "models": models, "merge": {"method": method}}, folder=folder)


def in_full(folder: Path, method: str = "task-arithmetic", below: tuple[str, ...] = ()) -> Recipe:
    models = {name: {"source": "./base", "adapters": [*below, f"./lora-{name}"]} for name in "ab"}
    base = {"source": "./base", "adapters": list(below)} if below else "./base"
    data = {"models": models, "merge": {"method": method}} | ({} if method == "linear" else {"base": base})
    return load_recipe(data, folder=folder)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "linear"])
def test_an_adapter_is_the_base_with_it(folder: Path, method: str, tmp_path: Path) -> None:
    assert (recipe(folder, method=method).base is None) is (method == "linear")
    short = mergetool.run(recipe(folder, method=method), output=tmp_path / "short").path
    assert_same_bytes(read(short), read(mergetool.run(in_full(folder, method), output=tmp_path / "full").path))


def test_adapters_of_the_base_stay_below(folder: Path, tmp_path: Path) -> None:
    short = recipe(folder, base={"source": "./base", "adapters": ["./lora-b"]})
    made = mergetool.run(short, output=tmp_path / "short").path
    full = mergetool.run(in_full(folder, below=("./lora-b",)), output=tmp_path / "full").path
    assert_same_bytes(read(made), read(full))


@pytest.mark.parametrize("method", ["task-arithmetic", "linear"])
def test_the_base_may_be_the_result_of_a_recipe(folder: Path, method: str, tmp_path: Path) -> None:
    inner = {"models": {"x": "./base"}, "merge": {"method": "passthrough"}}
    plan = mergetool.plan(recipe(folder, base={"recipe": inner}, method=method))
    assert plan.recipe.document["models"] == {"a": {"adapter": "./lora-a"}, "b": {"adapter": "./lora-b"}}
    made = mergetool.run(recipe(folder, base={"recipe": inner}, method=method), output=tmp_path / "short").path
    full = mergetool.run(in_full(folder, method), output=tmp_path / "full").path
    for name, tensor in read(full).items():
        assert torch.equal(read(made)[name], tensor)


def test_adapters_and_whole_models_go_together(folder: Path, tmp_path: Path) -> None:
    loaded = recipe(folder, whole="./base")
    assert loaded.models["whole"].source == "./base"
    assert not loaded.adapters_alone
    mergetool.run(loaded, output=tmp_path / "out")


WRONG = {
    "with a source": ({"a": {"adapter": "./x", "source": "./y"}}, "`source` cannot", "{source: ./y, adapters: [./x]}"),
    "with adapters": ({"a": {"adapter": "./x", "adapters": ["./y"]}}, "`adapters` cannot", "remove `adapters`"),
    "with select": ({"a": {"adapter": "./x", "select": "y"}}, "`select` cannot go with it", "remove `select`"),
    "a list": ({"a": {"adapter": ["./x"]}}, "expected text", "write text"),
    "misspelt": ({"a": {"adaptor": "./x"}}, "unknown key 'adaptor'", "did you mean 'adapter'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_refused_at_its_place(case: str) -> None:
    models, what, fix = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        load_recipe({"base": "./base", "models": models, "merge": {"method": "ties"}})
    assert any(what in each.what and fix in each.fix and "models.a" in each.where for each in caught.value.problems)


def test_adapters_without_a_base_are_asked_for_one(folder: Path) -> None:
    output = {"kind": "checkpoint"}
    data = {"models": {"a": {"adapter": "./lora-a"}}, "merge": {"method": "passthrough"}, "output": output}
    with pytest.raises(RecipeError, match="the recipe has no base") as caught:
        load_recipe(data, folder=folder)
    assert caught.value.fix == "add base: MODEL"
    mergetool.plan(load_recipe({"base": "./base", **data}, folder=folder))


def test_a_base_is_no_adapter(folder: Path) -> None:
    with pytest.raises(RecipeError, match="the base is a whole model") as caught:
        recipe(folder, base={"adapter": "./lora-a"})
    assert "base: {source: MODEL, adapters: [./lora-a]}" in caught.value.fix


@pytest.mark.parametrize(
    "more",
    [
        {"check": {"missing": "base"}},
        {"tokenizer": {"source": "base"}},
        {"merge": {"method": "linear", "overrides": [{"match": "*", "use": "base"}]}},
    ],
)
def test_a_base_that_is_only_below_adapters_is_no_model_of_a_method_that_uses_none(more: dict[str, Any]) -> None:
    data = {"base": "./base", "models": {"a": {"adapter": "./x"}, "b": "./y"}, "merge": {"method": "linear"}}
    load_recipe(data)
    with pytest.raises(RecipeError, match="base"):
        load_recipe(data | more)


def test_a_model_where_an_adapter_is_meant_and_the_other_way_round(folder: Path) -> None:
    with pytest.raises(SourceError, match="is a model, not an adapter") as caught:
        mergetool.plan(recipe(folder, a={"adapter": "./base"}))
    assert caught.value.fix == "write {source: PATH} instead of {adapter: PATH}"
    with pytest.raises(SourceError, match="is a LoRA adapter, not a model") as caught:
        mergetool.plan(recipe(folder, a="./lora-a"))
    assert "{adapter: ADAPTER}" in caught.value.fix
    mergetool.plan(recipe(folder))


def test_what_is_written_for_others_leads_to_the_same_adapters(folder: Path) -> None:
    loaded = recipe(folder)
    assert moved(loaded, folder / "deep")["models"]["a"] == {"adapter": "../lora-a"}
    parent = parent_recipe(loaded, "a")
    assert parent.document["models"] == {"a": {"source": "./base", "adapters": ["./lora-a"]}}
    document = {"models": {"a": {"adapter": "org/lora"}}}
    assert pinned_document(document, {"org/lora": "org/lora@1"})["models"] == {"a": {"adapter": "org/lora@1"}}


def test_the_file_of_a_recipe_says_it_so(folder: Path) -> None:
    data = recipe(folder).document
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(data)))
    assert load_recipe(folder / "recipe.yaml").models["a"].adapters == ("./lora-a",)


UNLIKE = {
    "a": {"target_modules": ["query"], "r": 4, "use_rslora": True, "bias": "all"},
    "b": {
        "target_modules": r".*\.(value|dense)",
        "exclude_modules": r".*layer\.0\.output.*",
        "rank_pattern": {"layer.1.attention.self.value": 2},
        "alpha_pattern": {"value": 3},
        "lora_bias": True,
    },
    "c": {"target_modules": ["key"], "layers_to_transform": [1], "modules_to_save": ["pooler"], "use_dora": True},
}


def test_adapters_that_agree_in_nothing_add_up(tmp_path: Path) -> None:
    """Other layers, ranks, factors, biases: what comes out is the base and all that peft makes of each."""
    torch.manual_seed(1)
    model = BertModel(BertConfig(**SMALL, max_position_embeddings=32))
    made = {name: train(tmp_path / name, model, **settings) for name, settings in UNLIKE.items()}
    base = load_file(made["a"].model / "model.safetensors")
    data = {
        "base": str(made["a"].model),
        "models": {name: {"adapter": str(trained.adapter)} for name, trained in made.items()},
        "merge": {"method": "task-arithmetic", "weight": {"a": 1.0, "b": -0.5, "c": 0.25}},
    }
    found = read(mergetool.run(data, output=tmp_path / "out").path)
    assert found.keys() == base.keys()
    for name, start in base.items():
        changes = [trained.merged[name].double() - start.double() for trained in made.values()]
        wanted = start.double() + changes[0] - 0.5 * changes[1] + 0.25 * changes[2]
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
