"""Gram matrices behind merged blocks, against networks that are merged and run block by block by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool import PlanError
from mergetool.planning.cost import estimate
from tests.files import content
from tests.statistics.networks import TEXTS, inputs_of, opened, write_classifier, write_dense, write_rows

KINDS = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    for seed, name in enumerate("ab"):
        write_classifier(folder / f"bert-{name}", seed)
        write_dense(folder / f"llama-{name}", seed=seed)
    write_rows(folder / "a.jsonl", TEXTS[:4])
    write_rows(folder / "b.jsonl", TEXTS[4:])
    return folder


@pytest.fixture
def recipe(place):
    def make(kind, **more):
        return {
            "models": {name: str(place / f"{kind}-{name}") for name in "ab"},
            "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"},
            "merge": {"method": "regmean-plus", "alpha": 0.8, **more},
        }

    return make


def grams_by_hand(place, kind, name, merged, own, block):
    """What goes into the linear layers of one block of a model whose blocks before that are the merged ones."""
    model = opened(place / f"{kind}-{name}", KINDS[kind])
    state = dict(merged)
    prefix = f"{BLOCKS[kind]}.{block}."
    state |= {key: value for key, value in own.items() if key.startswith(prefix)}
    model.load_state_dict(state, strict=False)
    seen = {}
    layers = {
        key: each for key, each in model.named_modules() if key.startswith(prefix) and hasattr(each, "in_features")
    }
    for key, each in layers.items():
        each.register_forward_pre_hook(lambda _, given, key=key: seen.setdefault(key, []).append(given[0][0]))
    texts = TEXTS[:4] if name == "a" else TEXTS[4:]
    with torch.no_grad():
        for example in inputs_of(place / f"{kind}-{name}", texts):
            model(**example)
    rows = {key: torch.cat(value).double() for key, value in seen.items()}
    return {f"{key}.weight": (value.T @ value / len(value)).float() for key, value in rows.items()}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_each_block_is_merged_by_what_the_merged_ones_before_it_make(place, recipe, tmp_path, kind):
    """The whole result, block by block, with regmean of grams that were measured by hand on networks put together."""
    found = load_file(mergetool.run(recipe(kind), output=tmp_path / "out", cache=tmp_path).path / "model.safetensors")
    own = {name: load_file(place / f"{kind}-{name}" / "model.safetensors") for name in "ab"}
    merged = {key: (value + own["b"][key]) / 2 for key, value in own["a"].items()}
    for block in range(2 if kind == "bert" else 3):
        grams = {name: grams_by_hand(place, kind, name, merged, own[name], block) for name in "ab"}
        prefix = f"{BLOCKS[kind]}.{block}."
        parts = {name: {key: value for key, value in own[name].items() if key.startswith(prefix)} for name in "ab"}
        merged |= mergetool.merge_state_dicts("regmean", parts, statistics=grams, alpha=0.8)
    for key, value in merged.items():
        if key.startswith(BLOCKS[kind]):
            assert torch.allclose(found[key], value, atol=2e-5), key


def test_a_head_is_merged_by_what_the_merged_blocks_make(place, recipe, tmp_path):
    found = load_file(mergetool.run(recipe("bert"), output=tmp_path / "out", cache=tmp_path).path / "model.safetensors")
    own = {name: load_file(place / f"bert-{name}" / "model.safetensors") for name in "ab"}
    grams = {}
    for name, texts in (("a", TEXTS[:4]), ("b", TEXTS[4:])):
        model = opened(place / f"bert-{name}")
        mine = {key: value for key, value in found.items() if ".pooler." not in key and "classifier" not in key}
        model.load_state_dict(mine, strict=False)
        with torch.no_grad():
            every = [model.bert(**each) for each in inputs_of(place / f"bert-{name}", texts)]
        pooled = torch.cat([each.pooler_output for each in every])
        states = torch.cat([each.last_hidden_state[:, 0] for each in every])
        grams[name] = {"classifier.weight": pooled.T @ pooled / len(pooled)}
        grams[name] |= {"bert.pooler.dense.weight": states.T @ states / len(states)}
    heads = {name: {key: own[name][key] for key in grams["a"]} for name in "ab"}
    expected = mergetool.merge_state_dicts("regmean", heads, statistics=grams, alpha=0.8)
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-4), key


def test_copies_of_one_model_are_regmean_of_them(place, tmp_path):
    """Where nothing changes in the blocks below, inputs are the model's own."""
    rows = {"data": str(place / "a.jsonl")}
    asked = {"models": dict.fromkeys("ab", str(place / "bert-a")), "calibration": rows}
    for method in ("regmean-plus", "regmean"):
        mergetool.run({**asked, "merge": {"method": method}}, output=tmp_path / method, cache=tmp_path)
    found, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("regmean-plus", "regmean"))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def test_it_is_measured_once_for_these_models_and_numbers(recipe, tmp_path):
    first = mergetool.run(recipe("bert"), output=tmp_path / "one", cache=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    again = mergetool.run(recipe("bert"), output=tmp_path / "two", cache=tmp_path)
    assert content(first.path) == content(again.path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()} == kept
    mergetool.run(recipe("bert", alpha=0.5), output=tmp_path / "three", cache=tmp_path)
    assert len(list((tmp_path / "statistics").iterdir())) == 4
    assert len(json.loads((first.path / "mergetool.json").read_text())["statistics"]) == 2


def test_an_override_holds_for_what_comes_after_it(place, recipe, tmp_path):
    """A block that is copied from one model is what the next one sees."""
    own = load_file(place / "bert-a" / "model.safetensors")
    asked = recipe("bert", overrides=[{"match": "bert.encoder.layer.0.*", "use": "a"}])
    found = load_file(mergetool.run(asked, output=tmp_path / "out", cache=tmp_path).path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert found[name].equal(own[name])
    plain = load_file(mergetool.run(recipe("bert"), output=tmp_path / "p", cache=tmp_path).path / "model.safetensors")
    last = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.allclose(found[last], plain[last], atol=1e-4)


def test_it_is_no_measure_of_one_model(place, tmp_path):
    with pytest.raises(PlanError, match="measure of several models") as error:
        mergetool.measure(place / "bert-a", "merged-gram", place / "a.jsonl", cache=tmp_path)
    assert "run a recipe" in error.value.fix


def test_all_models_must_fit_the_memory_at_once(recipe):
    plan = mergetool.plan(recipe("bert"))
    alone = mergetool.plan({**recipe("bert"), "merge": {"method": "regmean"}})
    peak, smaller = (estimate(each, workers=1, memory=None).peak_memory for each in (plan, alone))
    assert peak > smaller
    with pytest.raises(PlanError, match="all models together need") as error:
        estimate(plan, workers=1, memory=(peak + smaller) // 2)
    assert "--memory" in error.value.fix


def test_slices_are_told_to_take_regmean(recipe):
    asked = {**recipe("llama"), "slices": [{"a": [0, 2], "b": [0, 2]}], "outside": {"first": "a", "last": "b"}}
    with pytest.raises(PlanError, match="another one than the models") as error:
        mergetool.plan(asked)
    assert "method: regmean" in error.value.fix
    mergetool.plan({**asked, "merge": {"method": "regmean"}})
