"""Gradients of the loss at a model, against one backward pass of transformers' own loss."""

import pytest
import torch

import mergetool
from mergetool import PlanError
from tests.statistics.networks import inputs_of, opened, write_classifier, write_dense, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient")
    write_classifier(folder / "bert")
    write_dense(folder / "llama")
    write_rows(folder / "rows.jsonl")
    return folder


def gradient(model, examples, labels):
    """Of the mean of the losses that transformers computes, by name."""
    model.zero_grad()
    losses = [model(**example, labels=label).loss for example, label in zip(examples, labels, strict=True)]
    (sum(losses) / len(losses)).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def classes(count):
    return [torch.tensor([number % 3]) for number in range(count)]


def test_it_is_the_gradient_of_the_mean_loss(place, tmp_path):
    found = mergetool.measure(place / "bert", "gradient", place / "rows.jsonl", cache=tmp_path)
    examples = inputs_of(place / "bert")
    expected = gradient(opened(place / "bert"), examples, classes(len(examples)))
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


def test_a_step_against_it_lowers_the_loss_of_a_language_model(place, tmp_path):
    found = mergetool.measure(place / "llama", "gradient", place / "rows.jsonl", cache=tmp_path)
    model = opened(place / "llama", "AutoModelForCausalLM")

    def loss():
        with torch.no_grad():
            says = [(each, model(**each).logits[0].log_softmax(-1)) for each in inputs_of(place / "llama")]
        return -sum(float(s[:-1].gather(-1, e["input_ids"][0, 1:, None]).sum()) for e, s in says) / len(says)

    before = loss()
    size = sum(float(value.square().sum()) for value in found.values())
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.sub_(found[name], alpha=1e-3 / size)
    assert loss() - before == pytest.approx(-1e-3, rel=0.1)


def test_squares_are_those_of_batches(place, tmp_path):
    found = mergetool.measure(place / "bert", "gradient-squares", place / "rows.jsonl", batch=3, cache=tmp_path)
    model, examples = opened(place / "bert"), inputs_of(place / "bert")
    labels, name = classes(len(examples)), "bert.encoder.layer.1.output.dense.weight"
    each = [gradient(model, examples[i : i + 3], labels[i : i + 3])[name].clone() for i in (0, 3, 6)]
    assert torch.allclose(found[name], sum(value**2 for value in each) / 3, rtol=1e-4, atol=1e-8)


def test_batches_of_one_row_are_the_fisher_information_of_what_is_given(place, tmp_path):
    squares = mergetool.measure(place / "bert", "gradient-squares", place / "rows.jsonl", batch=1, cache=tmp_path)
    fisher = mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", labels="given", cache=tmp_path)
    for name, value in fisher.items():
        assert torch.allclose(squares[name], value, rtol=1e-4, atol=1e-9), name


def test_a_head_of_one_value_is_refused(place, tmp_path):
    write_classifier(tmp_path / "value", num_labels=1, id2label={0: "x"}, label2id={"x": 0})
    with pytest.raises(PlanError, match="a value, not a class"):
        mergetool.measure(tmp_path / "value", "gradient", place / "rows.jsonl", cache=tmp_path)
