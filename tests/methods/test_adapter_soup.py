"""Choosing models by their rows, against features that transformers tells."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool import RecipeError, merge_state_dicts
from tests.statistics.networks import inputs_of, opened, write_classifier, write_rows

ROWS = {"base": ["w1 w2 w3", "w2 w1"], "a": ["w40 w41", "w42 w43 w40"], "b": ["w3 w1", "w2 w3 w1"], "c": ["w1 w9 w2"]}


@pytest.fixture
def asked(tmp_path):
    for seed, name in enumerate(ROWS):
        write_classifier(tmp_path / name, seed)
        write_rows(tmp_path / f"{name}.jsonl", ROWS[name], labels=False)
    return {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "abc"},
        "calibration": {name: {"data": str(tmp_path / f"{name}.jsonl")} for name in ROWS},
        "merge": {"method": "adapter-soup"},
    }


def features(folder, texts):
    """What the base makes of texts, one after the other."""
    model = opened(folder, "AutoModel")
    with torch.no_grad():
        return torch.stack([model(**each).last_hidden_state[0].mean(0) for each in inputs_of(folder, texts)]).mean(0)


def test_the_models_whose_rows_are_like_the_new_ones_are_averaged(asked, tmp_path):
    result = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path)
    said = {name: features(tmp_path / "base", texts) for name, texts in ROWS.items()}
    near = {name: float(torch.cosine_similarity(said[name], said["base"], dim=0)) for name in "abc"}
    out, *kept = sorted(near, key=near.get)
    assert out == "a"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in kept)
    for name, value in load_file(result.path / "model.safetensors").items():
        assert torch.allclose(value, (first[name] + second[name]) / 2, atol=1e-6), name
    lock = json.loads((result.path / "mergetool.json").read_text())
    told = json.dumps(lock)
    assert all(f'"likeness of {name}"' in told for name in "abc")
    assert set(lock["statistics"]) == {"base", *(f"base on rows of '{name}'" for name in "abc")}
    found = mergetool.measure(asked["base"], "features", asked["calibration"]["a"]["data"], cache=tmp_path, memory=1)
    assert torch.allclose(found["classifier.weight"].flatten(), said["a"], atol=1e-5)  # layer by layer, here


def test_where_nothing_is_left_out_it_is_told_and_steps_may_follow():
    state = {"w": torch.tensor([1.0, 2.0])}
    models = {"a": {"w": torch.tensor([3.0, 2.0])}, "b": {"w": torch.tensor([1.0, 6.0])}}
    said = {"a": {"w": torch.tensor([[[[1.0, 0.0]]]])}, "b": {"w": torch.tensor([[[[0.0, 1.0]]]])}}
    more = {"base": state, "statistics": {**said, "base": {"w": torch.tensor([[[[0.9, 1.0]]]])}}}
    assert merge_state_dicts("adapter-soup", models, **more)["w"].tolist() == [2.0, 4.0]
    assert merge_state_dicts("adapter-soup", models, keep=1, **more)["w"].tolist() == [1.0, 6.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"calibration": {"data": "rows.jsonl"}}, "all are the same"),
        ({"calibration": {name: {"data": "rows.jsonl"} for name in "abc"}}, "nothing for the base"),
        ({"then": [{"step": "activation-scale"}]}, "both measure the base"),
    ],
)
def test_what_compares_nothing_is_told(asked, change, match):
    with pytest.raises(RecipeError, match=match):
        mergetool.plan({**asked, **change})
