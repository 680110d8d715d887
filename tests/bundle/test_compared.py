"""Routers that compare inputs with more directions than experts keep, or fewer."""

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool.bundle import expert
from mergetool.bundle.manifest import read_manifest
from mergetool.engine.growing import change_bundle
from mergetool.engine.run import Flags
from mergetool.errors import RecipeError
from mergetool.kernels.routing import mean_distance
from mergetool.testing.classifiers import save_experts, text_inputs, tiny_config
from tests.bundle.tiny import OPTIONS, make_bundle, tiny_inputs

KIND = transformers.BertForSequenceClassification
MORE = 10


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_experts(
        tmp_path_factory.mktemp("experts"), KIND, tiny_config(KIND), transformers.BertModel, tasks="abcd"
    )


def recipe(paths, tasks, method="mass", **settings):
    merge = {"method": method, "router": {"rank": MORE}, **settings}
    return {"base": str(paths["base"]), "models": {task: str(paths[task]) for task in tasks}, "merge": merge}


@pytest.fixture(scope="module")
def bundle(paths, tmp_path_factory):
    return mergetool.run(recipe(paths, "abcd"), output=tmp_path_factory.mktemp("made") / "out").path


def test_inputs_are_compared_with_as_many_directions_as_were_asked_for(paths, bundle):
    model, base = mergetool.load_bundle(bundle), load_file(paths["base"] / "model.safetensors")
    router = model.manifest.router
    assert max(model.manifest.parameters[router.matrices[0]].ranks) < MORE
    bases = []
    for name in router.matrices:
        changes = [load_file(paths[task] / "model.safetensors")[f"bert.{name}"] - base[name] for task in "abcd"]
        bases.append([torch.linalg.svd(change.double())[2][:MORE].float() for change in changes])
    found = model.route(**text_inputs()).distances
    expected = mean_distance(model.first_pass.features(text_inputs()), bases, "likelihood")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)  # (bfloat16)


def test_answers_of_a_known_task_do_not_depend_on_it(paths, bundle, tmp_path):
    plain = mergetool.run(recipe(paths, "abcd", router={}), output=tmp_path / "out").path
    one, other = (mergetool.load_bundle(each)(tasks=["b"], **text_inputs()).logits for each in (bundle, plain))
    assert torch.equal(one, other)
    assert "compared.safetensors" in read_manifest(bundle).files
    assert "compared.safetensors" not in read_manifest(plain).files


def test_a_bundle_that_grew_compares_what_the_whole_one_does(paths, bundle, tmp_path):
    some = mergetool.run(recipe(paths, "abc"), output=tmp_path / "some").path
    expert._header.cache_clear()
    grown = change_bundle(some, {"d": str(paths["d"])}, flags=Flags(tmp_path / "grown")).path
    assert expert._header.cache_info().misses == 2  # of files that all experts have something in
    found, whole = (load_file(each / "compared.safetensors") for each in (grown, bundle))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    fewer = load_file(change_bundle(grown, {}, ["a"]).path / "compared.safetensors")
    assert all(torch.equal(fewer[key], whole[f"{int(key[0]) + 1}{key[1:]}"]) for key in fewer)


def test_networks_whose_matrices_lie_the_other_way_are_read_on_their_left(tmp_path):
    options = replace(OPTIONS, rank=4)
    same = replace(options, router=replace(options.router, rank=4))
    (tmp_path / "plain").mkdir()
    (tmp_path / "told").mkdir()
    plain = mergetool.load_bundle(make_bundle(tmp_path / "plain", "gpt2", options=options))
    told = mergetool.load_bundle(make_bundle(tmp_path / "told", "gpt2", options=same))
    inputs = tiny_inputs("gpt2")
    assert torch.equal(told.route(**inputs).distances, plain.route(**inputs).distances)


def test_what_has_no_effect_is_refused(paths, tmp_path):
    for method, settings in (("emr", {}), ("mass", {"router": {"rank": 4, "kind": "arrow"}})):
        with pytest.raises(RecipeError, match=r"leave `?(it|router\.rank)`? out"):
            mergetool.run(recipe(paths, "ab", method, **settings), output=tmp_path / "out")
