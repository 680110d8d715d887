"""Averages by losses, against the softmax by hand and losses that transformers tells."""

import math

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool import SourceError, merge_state_dicts
from tests.statistics.networks import LABELS, TEXTS, inputs_of, opened, write_classifier, write_dense, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cocktail")
    for seed, name in enumerate("ab"):
        write_classifier(folder / f"bert-{name}", seed)
        write_dense(folder / f"llama-{name}", seed=seed)
    write_rows(folder / "rows.jsonl")
    return folder


def loss_of(folder, kind):
    """What transformers says when it is given the labels, one text after the other."""
    model, found = opened(folder, kind), []
    with torch.no_grad():
        for place, inputs in enumerate(inputs_of(folder)):
            ids = inputs["input_ids"]
            if kind == "AutoModelForCausalLM":
                found.append(float(model(**inputs, labels=ids).loss) if ids.shape[1] > 1 else 0.0)
            else:
                found.append(float(model(**inputs, labels=torch.tensor([place % len(LABELS)])).loss))
    return sum(found) / len(TEXTS)


@pytest.mark.parametrize(
    ("kind", "auto"), [("bert", "AutoModelForSequenceClassification"), ("llama", "AutoModelForCausalLM")]
)
def test_models_count_by_the_softmax_of_their_losses(place, tmp_path, kind, auto):
    asked = {
        "models": {name: str(place / f"{kind}-{name}") for name in "ab"},
        "calibration": {"data": str(place / "rows.jsonl")},
        "merge": {"method": "lm-cocktail", "temperature": 0.5},
    }
    result = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path)
    first, second = (math.exp(-loss_of(place / f"{kind}-{name}", auto) / 0.5) for name in "ab")
    share, found = first / (first + second), load_file(result.path / "model.safetensors")
    assert abs(share - 0.5) > 0.01
    a, b = (load_file(place / f"{kind}-{name}" / "model.safetensors") for name in "ab")
    for name, value in found.items():
        assert torch.allclose(value, share * a[name] + (1 - share) * b[name], atol=1e-5), name
    assert "weight of a" in (result.path / "mergetool.json").read_text()


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, 4.0), (1.0, (4 * math.e + 2) / (math.e + 1)), (1e9, 3.0)])
def test_the_temperature_says_how_even_weights_are(temperature, expected):
    statistics = {"a": {"w": torch.tensor(1.0)}, "b": {"w": torch.tensor(2.0)}}
    models = {"a": {"w": torch.tensor([4.0])}, "b": {"w": torch.tensor([2.0])}}
    found = merge_state_dicts("lm-cocktail", models, statistics=statistics, temperature=temperature)
    assert float(found["w"]) == pytest.approx(expected, rel=1e-6)


def test_rows_without_classes_are_told_for_classifiers(place, tmp_path):
    asked = {
        "models": {name: str(place / f"bert-{name}") for name in "ab"},
        "calibration": {"data": str(write_rows(tmp_path / "rows.jsonl", labels=False))},
        "merge": {"method": "lm-cocktail"},
    }
    with pytest.raises(SourceError, match="has no field 'label'") as error:
        mergetool.plan(asked)
    assert '{"label": 0}' in error.value.fix
