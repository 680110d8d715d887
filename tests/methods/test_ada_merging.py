"""Learnt coefficients: their gradient by finite differences, what they come to, and the sum that they make."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool import PlanError, SourceError, merge_state_dicts
from mergetool.engine.together import PlanMerger
from mergetool.planning.measures import key_of_statistic
from mergetool.statistics.coefficients import Coefficients, Learning, entropies
from mergetool.statistics.measure import Running, opened
from mergetool.testing.toys import assert_near, toy_models
from tests.files import LONG, content
from tests.statistics.networks import TEXTS, inputs_of, write_classifier, write_near, write_rows
from tests.statistics.networks import opened as loaded

LEARNING = {"method": "ada-merging", "steps": 8, "rate": 0.02, "batch": 3}


DIFFERENTIATED = [
    ("bert", {}),
    ("bert", {"loss": "cross-entropy"}),
    ("bert", {"density": 0.3}),
    ("bert", {"per": "model"}),
    ("llama", {"loss": "cross-entropy"}),
    ("llama", {}),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_near(tmp_path_factory.mktemp("ada"))


@pytest.fixture
def recipe(place):
    def make(kind="bert", **more):
        return {
            "base": str(place / f"{kind}-base"),
            "models": {name: str(place / f"{kind}-{name}") for name in "ab"},
            "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"},
            "merge": {**LEARNING, **more},
        }

    return make


def learning_of(recipe):
    """The loss of a recipe's models in float64, and all their rows."""
    plan = mergetool.plan({**recipe, "compute": {"dtype": "float64"}})
    asked = {name: plan.sources[key_of_statistic(name)].asked for name in recipe["models"]}
    running, nowhere = Running(torch.device("cpu"), room=2**30), Path("of statistics, which are not kept")
    networks = {name: opened(each, running, nowhere) for name, each in asked.items()}
    settings = asked["a"].statistic
    assert isinstance(settings, Coefficients)
    return Learning(settings, networks, PlanMerger(plan)), {name: each.examples for name, each in asked.items()}


@pytest.mark.parametrize(
    ("kind", "settings"),
    DIFFERENTIATED if LONG else DIFFERENTIATED[1:5],
)
def test_the_gradient_is_that_of_finite_differences(recipe, kind, settings):
    learning, rows = learning_of(recipe(kind, **settings))
    values = learning.start() + 0.1 * torch.rand(learning.start().shape, generator=torch.Generator().manual_seed(0))
    step, tolerance = (1e-5, 1e-7) if kind == "bert" else (3e-3, 3e-5)  # norms of Llama round to float32
    gradient = learning.gradient(values, rows)
    for row, column in ((0, 0), (1, 0), (0, gradient.shape[1] // 2), (1, gradient.shape[1] - 1)):
        moved = torch.zeros_like(values)
        moved[row, column] = step
        expected = (learning.loss(values + moved, rows) - learning.loss(values - moved, rows)) / (2 * step)
        assert float(gradient[row, column]) == pytest.approx(expected, rel=1e-5, abs=tolerance)
    assert gradient.abs().max() > 1e-3


def test_the_loss_is_the_entropy_of_the_merged_model_s_answers(place, recipe):
    learning, rows = learning_of(recipe(per="model"))
    values = torch.tensor([[0.7], [0.2]], dtype=torch.float64)
    own = {n: load_file(place / f"bert-{n}" / "model.safetensors") for n in ("base", "a", "b")}
    task = {key: 0.7 * (own["a"][key] - value) + 0.2 * (own["b"][key] - value) for key, value in own["base"].items()}
    model, expected = loaded(place / "bert-base").double(), 0.0
    model.load_state_dict({key: own["base"][key].double() + value for key, value in task.items()}, strict=False)
    for texts in (TEXTS[:4], TEXTS[4:]):
        with torch.no_grad():
            says = [model(**each).logits.softmax(-1) for each in inputs_of(place / "bert-base", texts)]
        expected += sum(float(-(each * each.log()).sum()) for each in says) / len(texts)
    assert learning.loss(values, rows) == pytest.approx(expected, rel=1e-5)


def test_answers_to_every_token_are_as_unsure_as_they_are_on_average():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 100.0]]])
    assert float(entropies(logits)) == pytest.approx(torch.tensor(2.0).log().item() / 2)


@pytest.mark.parametrize(("kind", "loss"), [("bert", "entropy"), ("bert", "cross-entropy"), ("llama", "cross-entropy")])
def test_learning_makes_the_loss_smaller(recipe, tmp_path, kind, loss):
    asked = recipe(kind, loss=loss, batch=4)
    learning, rows = learning_of(asked)
    result = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path)
    kept = json.loads((result.path / "mergetool.json").read_text())["statistics"]
    found = [load_file(tmp_path / "statistics" / f"{kept[f'model {n!r}']['key']}.safetensors") for n in "ab"]
    values = torch.stack([torch.stack([each[name] for name in learning.vectors]) for each in found])
    assert learning.loss(values, rows) < learning.loss(learning.start(), rows) - 1e-3
    assert float(values.min()) >= 0
    assert float(values.max()) <= 1


def test_the_result_is_the_sum_of_task_vectors_by_what_was_learnt(place, recipe, tmp_path):
    result = mergetool.run(recipe(), output=tmp_path / "out", cache=tmp_path)
    lock = json.loads((result.path / "mergetool.json").read_text())
    keys = [lock["statistics"][f"model {name!r}"]["key"] for name in "ab"]
    learnt = [load_file(tmp_path / "statistics" / f"{key}.safetensors") for key in keys]
    base, a, b = (load_file(place / f"bert-{name}" / "model.safetensors") for name in ("base", "a", "b"))
    found = load_file(result.path / "model.safetensors")
    for key, value in base.items():
        expected = value + learnt[0][key] * (a[key] - value) + learnt[1][key] * (b[key] - value)
        assert torch.allclose(found[key], expected.float(), atol=1e-6), key
    assert len({round(float(each), 4) for each in learnt[0].values()}) > 3
    assert "coefficient of a" in (result.path / "mergetool.json").read_text()


def test_a_model_has_one_coefficient_where_that_is_asked(recipe, tmp_path):
    mergetool.run(recipe(per="model"), output=tmp_path / "out", cache=tmp_path)
    for path in (tmp_path / "statistics").iterdir():
        assert len({float(each) for each in load_file(path).values()}) == 1


def test_what_changes_no_answer_stays_as_it_starts(place, recipe, tmp_path):
    """A model that is the base itself has no task vector, so nothing can be learnt of it."""
    asked = recipe()
    asked["models"]["b"] = asked["base"]
    result = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path)
    key = json.loads((result.path / "mergetool.json").read_text())["statistics"]["model 'b'"]["key"]
    assert {float(each) for each in load_file(tmp_path / "statistics" / f"{key}.safetensors").values()} == {0.3}


def test_it_is_learnt_once_and_the_same_again_and_anew_for_another_base(place, recipe, tmp_path):
    first = mergetool.run(recipe(), output=tmp_path / "one", cache=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    again = mergetool.run(recipe(), output=tmp_path / "two", cache=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()} == kept
    apart = mergetool.run(recipe(), output=tmp_path / "three", cache=tmp_path / "other")
    assert content(first.path) == content(again.path) == content(apart.path)
    mergetool.run({**recipe(), "base": str(place / "bert-a")}, output=tmp_path / "four", cache=tmp_path)
    assert len(list((tmp_path / "statistics").iterdir())) == 4


def test_heads_of_their_own_answer_for_their_rows(place, recipe, tmp_path):
    """A head of two classes beside one of three, which the result copies."""
    write_classifier(tmp_path / "two", 5, num_labels=2, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    asked = recipe(overrides=[{"match": "classifier.*", "use": "a"}])
    asked["models"]["b"] = str(tmp_path / "two")
    result = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path)
    assert loaded(result.path).num_labels == 3


def test_losing_signs_and_small_entries_are_left_out():
    """By hand: half of the entries of each, and of those the ones that the sum agrees with."""
    base, ones = {"w": torch.zeros(4)}, torch.tensor(1.0)
    models = {"a": {"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}, "b": {"w": torch.tensor([-1.0, -5.0, 2.0, -3.0])}}
    statistics = {"a": {"w": ones / 2}, "b": {"w": ones}}
    found = merge_state_dicts("ada-merging", models, base, statistics=statistics, density=0.5)
    assert found["w"].tolist() == [2.0, -5.0, 0.0, -3.0]


def test_what_was_not_learnt_is_as_at_the_start():
    base, models = toy_models("ab", exact=False)
    found = merge_state_dicts("ada-merging", models, base, statistics={"a": {}, "b": {}}, start=0.4)
    for name in ("model.layers.0.mlp.up_proj.weight", "logit_scale"):
        expected = base[name] + 0.4 * sum(model[name] - base[name] for model in models.values())
        assert_near({name: found[name]}, {name: expected}, tolerance=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "told", "fix"),
    [
        ("BertModel", {}, "no head", "tsv-merge"),
        ("BertForMaskedLM", {"loss": "cross-entropy"}, "one for each token", "loss: entropy"),
    ],
)
def test_heads_that_cannot_be_unsure_are_told(recipe, tmp_path, kind, changes, told, fix):
    write_classifier(tmp_path / "other", kind=kind)
    asked = recipe(**changes)
    asked["models"] = dict.fromkeys("ab", str(tmp_path / "other"))
    with pytest.raises(PlanError, match=told) as error:
        mergetool.plan({**asked, "base": str(tmp_path / "other")})
    assert fix in error.value.fix


def test_cross_entropy_wants_classes_in_the_rows(place, recipe, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", labels=False)
    with pytest.raises(SourceError, match="has no field 'label'"):
        mergetool.plan({**recipe(loss="cross-entropy"), "calibration": {"data": str(rows)}})
