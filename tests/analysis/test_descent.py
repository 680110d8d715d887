"""Task vectors beside gradients: of models that really went down their losses by steps of a known length."""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import mergetool
from mergetool import PlanError, SourceError
from mergetool.analysis.descent_page import descent
from mergetool.cli.app import app
from mergetool.pages import Page, render
from tests.statistics.networks import inputs_of, opened, write_classifier, write_rows
from tests.zoo.text import save_tokenizer

TEXTS = {
    "a": ("w1 w2 w3", "w4 w5", "w6 w7 w8", "w9 w10 w11"),
    "b": ("w20 w21", "w22 w23 w24", "w25 w26", "w27 w28 w29"),
}
RATE = 1e-3


def loss_of(model, folder, task):
    examples = inputs_of(folder, TEXTS[task])
    return sum(model(**each, labels=torch.tensor([n % 3])).loss for n, each in enumerate(examples)) / len(examples)


def step_down(model, folder, task):
    """One step of gradient descent on the body, the head as it is. Returns the loss before."""
    body = list(model.base_model.parameters())
    loss = loss_of(model, folder, task)
    with torch.no_grad():
        for value, slope in zip(body, torch.autograd.grad(loss, body, allow_unused=True), strict=True):
            if slope is not None:
                value.sub_(slope, alpha=RATE)
    return loss.item()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and two tasks with heads of their own: `a` took one step, `b` ten, each of which was saved."""
    folder = tmp_path_factory.mktemp("descent")
    write_classifier(folder / "whole")
    transformers.BertModel.from_pretrained(folder / "whole").save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    told = {}
    for task, steps in (("a", 1), ("b", 10)):
        model = opened(folder / "whole")
        torch.manual_seed(ord(task))
        with torch.no_grad():
            model.classifier.weight.normal_(std=0.5)
        before = [step_down(model, folder / "whole", task)]
        for number in range(2, steps + 1):
            model.save_pretrained(folder / "runs" / f"checkpoint-{number - 1}")
            step_down(model, folder / "whole", task)
        if steps > 1:
            model.save_pretrained(folder / "runs" / f"checkpoint-{steps}")
        model.save_pretrained(folder / task)
        save_tokenizer(folder / task)
        told[task] = before[0], loss_of(model, folder / "whole", task).item()
        write_rows(folder / f"{task}.jsonl", TEXTS[task])
    (folder / "told.json").write_text(json.dumps(told))
    recipe = {"base": str(folder / "base"), "models": {task: str(folder / task) for task in "ab"}}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "merge": {"method": "task-arithmetic", "scale": 1.0}}))
    return folder


@pytest.fixture(scope="module")
def analysis(place):
    return mergetool.analyze(
        place / "recipe.yaml",
        data={task: place / f"{task}.jsonl" for task in "ab"},
        checkpoints={"b": place / "runs"},
        cache=place / "cache",
    )


def test_one_step_of_gradient_descent_is_the_gradient(analysis, place):
    told = json.loads((place / "told.json").read_text())
    for row in analysis.rows("descent"):
        before, after = told[row["model"]]
        assert row["loss_base"] == pytest.approx(before, rel=1e-4)
        assert row["loss_tuned"] == pytest.approx(after, rel=1e-4)
    one, ten = analysis.rows("descent")
    assert one["alignment"] == pytest.approx(1.0, abs=1e-3)
    assert one["step"] == pytest.approx(RATE, rel=1e-2)
    assert one["linearity"] == pytest.approx(1.0, abs=0.2)
    assert 0.5 < ten["alignment"] < 1.0
    assert {row["layer"] for row in analysis.rows("descent_by_layer")} >= {"outside the layers"}
    for row in analysis.rows("descent_by_layer"):
        assert row["model"] == "b" or row["alignment"] == pytest.approx(1.0, abs=2e-3)


def test_crosstalk_is_what_a_task_vector_does_to_another_loss(analysis, place):
    """Of a small step, the change of the loss itself."""
    shares = {(row["loss"], row["model"]): row["crosstalk"] for row in analysis.rows("crosstalk")}
    assert shares["a", "a"] == shares["b", "b"] == pytest.approx(1.0)
    base = transformers.BertModel.from_pretrained(place / "base").state_dict()
    own, other = opened(place / "b"), opened(place / "a")
    moved = {name: value - base[name] for name, value in other.bert.state_dict().items()}
    small = 1e-2
    own.bert.load_state_dict(base)
    before = loss_of(own, place / "whole", "b").item()
    own.bert.load_state_dict({name: value + small * moved[name] for name, value in base.items()})
    fall = (before - loss_of(own, place / "whole", "b").item()) / small
    (row,) = [row for row in analysis.rows("descent") if row["model"] == "b"]
    promised = (row["loss_base"] - row["loss_tuned"]) / row["linearity"]
    assert shares["b", "a"] == pytest.approx(fall / promised, abs=0.02)


def test_losses_along_the_merge_are_those_of_the_models(analysis, place):
    rows = {(row["model"], row["scale"]): row["loss"] for row in analysis.rows("scales")}
    base = transformers.BertModel.from_pretrained(place / "base").state_dict()
    parts = [opened(place / task).bert.state_dict() for task in "ab"]
    for task in "ab":
        model = opened(place / task)
        for scale in (0.0, 0.5, 2.0):
            moved = {
                n: v + scale * sum(part[n] - v for part in parts) if v.is_floating_point() else v
                for n, v in base.items()
            }
            model.bert.load_state_dict(moved)
            assert rows[task, scale] == pytest.approx(loss_of(model, place / "whole", task).item(), rel=1e-4)
    (advice,) = [each for each in analysis.advice if each["formula"].startswith("mean over tasks of loss")]
    assert advice["title"] == "scale the merge's change by 2"


def test_models_are_compared_by_what_their_blocks_make_of_the_rows(analysis, place):
    rows = analysis.rows("likeness")
    pairs = {(row["a"], row["b"]) for row in rows}
    assert pairs == {("base", "a"), ("base", "b"), ("a", "b")}
    last = max(row["block"] for row in rows)
    cka = {(row["a"], row["b"]): row["cka"] for row in rows if row["block"] == last}
    with torch.no_grad():
        said = [
            torch.cat(
                [
                    transformers.BertModel.from_pretrained(place / name)(**each).last_hidden_state.mean(1)
                    for texts in TEXTS.values()
                    for each in inputs_of(place / "base", texts)
                ]
            ).double()
            for name in ("base", "b")
        ]
    kernels = [(table - table.mean(0)) @ (table - table.mean(0)).T for table in said]
    by_hand = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert cka["base", "b"] == pytest.approx(float(by_hand), abs=1e-5)


def test_checkpoints_are_held_beside_the_finished_model_in_the_order_of_the_run(analysis):
    rows = analysis.rows("path")
    assert [row["checkpoint"] for row in rows] == [f"checkpoint-{number}" for number in range(1, 11)]
    assert rows[-1]["length"] == rows[-1]["cosine"] == pytest.approx(1.0)
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    (advice,) = [each for each in analysis.advice if each["kind"] == "checkpoint"]
    first = next(row for row in rows if row["cosine"] > 0.9)["checkpoint"]
    assert advice["fix"].endswith(f"b: .../{first}")


def test_a_page_has_a_chapter_of_it(analysis):
    page = render(Page("Analysis", "", [descent(analysis.facts)]))
    assert "Task vectors and losses" in page
    for caption in (
        "Alignment, layer by layer",
        "each task vector brings",
        "along the merge",
        "How alike",
        "a run's checkpoints",
    ):
        assert caption.replace("'", "&#39;") in page, caption


def test_the_command_shows_it(place, analysis):
    shown = CliRunner().invoke(
        app,
        ["analyze", str(place / "recipe.yaml"), "--data", f"a={place / 'a.jsonl'}", "--cache", str(place / "cache")],
    )
    assert shown.exit_code == 0, shown.output
    assert "Task vectors beside the gradient at the base" in shown.stdout


def test_what_cannot_be_followed_says_why(place, tmp_path):
    with pytest.raises(PlanError, match="no model 'x'") as error:
        mergetool.analyze(place / "recipe.yaml", data={"x": place / "a.jsonl"})
    assert "the models are: a, b" in error.value.fix
    with pytest.raises(SourceError, match="holds no checkpoints"):
        mergetool.analyze(place / "recipe.yaml", checkpoints={"a": tmp_path})
    recipe = {"models": {task: str(place / task) for task in "ab"}, "merge": {"method": "linear"}}
    with pytest.raises(PlanError, match="has no base"):
        mergetool.analyze(recipe, data={"a": place / "a.jsonl"})
