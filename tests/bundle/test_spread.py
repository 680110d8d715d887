"""Bundles whose base is dealt over memory and the disk by accelerate answer as whole ones do."""

from dataclasses import replace

import pytest
import torch
import transformers

import mergetool
from mergetool.errors import PlanError
from mergetool.testing.classifiers import save_experts, tiny_config
from tests.bundle.test_devices import made
from tests.bundle.tiny import OPTIONS, ROUTER, make_bundle, tiny_inputs
from tests.files import LONG


def half_of(bundle):
    return sum(parameter.nbytes for parameter in bundle.parameters()) // 2


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5", "gpt2"] if LONG else ["bert", "llama", "t5"])
def test_a_bundle_that_is_dealt_out_answers_as_a_whole_one(family, tmp_path):
    folder, inputs = make_bundle(tmp_path, family), tiny_inputs(family)
    whole = mergetool.load_bundle(folder)
    dealt = mergetool.load_bundle(folder, device_map="auto", memory=half_of(whole))
    assert "disk" in dealt.base.hf_device_map.values()
    for tasks in ("route", ["b"], ["a", "c"]):
        found, expected = dealt(tasks=tasks, **inputs), whole(tasks=tasks, **inputs)
        assert found.tasks == expected.tasks
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert any(parameter.is_meta for parameter in dealt.parameters())


def test_a_bundle_that_is_dealt_out_generates(tmp_path):
    folder = make_bundle(tmp_path, "llama")
    inputs = {key: value[1::2] for key, value in tiny_inputs("llama").items()}
    whole = mergetool.load_bundle(folder)
    dealt = mergetool.load_bundle(folder, device_map={"model": "disk", "lm_head": "cpu"})
    expected = whole.generate(**inputs, max_new_tokens=4)
    assert dealt.generate(**inputs, max_new_tokens=4).tolist() == expected.tolist()


def test_features_of_the_merged_model_are_those_of_a_whole_one(tmp_path):
    options = replace(OPTIONS, router=replace(ROUTER, features="merged", layers=("*",)))
    folder, inputs = make_bundle(tmp_path, "bert", options=options), tiny_inputs("bert")
    whole = mergetool.load_bundle(folder)
    dealt = mergetool.load_bundle(folder, device_map="sequential", memory=half_of(whole))
    torch.testing.assert_close(dealt.route(**inputs).distances, whole.route(**inputs).distances)


def test_a_bundle_that_is_dealt_out_stays_where_it_is(tmp_path):
    folder = make_bundle(tmp_path, "llama")
    dealt = mergetool.load_bundle(folder, device_map="auto", memory=20_000)
    with pytest.raises(PlanError, match="stays where it is") as raised:
        dealt.to("cpu")
    assert raised.value.fix == "open it again, without device_map"
    assert mergetool.load_bundle(folder).to("cpu").device.type == "cpu"


def test_unknown_maps_and_bundles_of_classes_are_refused(tmp_path):
    with pytest.raises(PlanError, match="'everywhere' is none of auto, balanced"):
        mergetool.load_bundle(tmp_path, device_map="everywhere")
    kind = transformers.BertForSequenceClassification
    paths = save_experts(tmp_path / "models", kind, tiny_config(kind), transformers.BertModel)
    names = [name for name in paths if name != "base"]
    folder, _ = made(paths, tmp_path / "out", {"method": "tsv-compress"}, "cpu", names=names)
    with pytest.raises(PlanError, match="classes with heads of their own") as raised:
        mergetool.load_bundle(folder, device_map="auto")
    assert raised.value.fix == "leave device_map out, and move it whole: .to(device)"
