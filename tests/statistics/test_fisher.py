"""The diagonal of the Fisher information: by naive code, and in closed form where there is one."""

import pytest
import torch

import mergetool
from mergetool import MergeError, PlanError, RecipeError
from tests.statistics.networks import TEXTS, inputs_of, opened, write_classifier, write_dense, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher")
    write_classifier(folder / "bert")
    write_dense(folder / "llama")
    write_dense(folder / "tied", tie_word_embeddings=True)
    write_rows(folder / "rows.jsonl")
    return folder


def naive(model, examples, likelihoods):
    """One backward pass for each likelihood of each example, everything dense."""
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for number, example in enumerate(examples):
        for share, which in likelihoods(model(**example).logits[0], number, example):
            model.zero_grad()
            which(model(**example).logits[0].log_softmax(-1)).backward()
            for name, value in model.named_parameters():
                if value.grad is not None:
                    sums[name] += share * value.grad**2
    return {name: value / len(examples) for name, value in sums.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value.detach(), rtol=1e-4, atol=1e-7 * float(value.abs().max())), name


def given(logits, number, example):
    yield 1.0, lambda says: says[number % 3]


def exact(logits, number, example):
    for label, share in enumerate(logits.softmax(-1).tolist()):
        yield share, lambda says, label=label: says[label]


def next_tokens(logits, number, example):
    ids = example["input_ids"][0, 1:]
    yield 1.0, lambda says: says[:-1].gather(-1, ids[:, None]).sum()


@pytest.mark.parametrize(("labels", "likelihoods"), [("given", given), ("exact", exact)])
def test_it_is_the_mean_of_squared_gradients_of_single_rows(place, tmp_path, labels, likelihoods):
    found = mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", labels=labels, cache=tmp_path)
    assert_same(found, naive(opened(place / "bert"), inputs_of(place / "bert"), likelihoods))


def test_it_is_not_the_square_of_the_gradient_of_all_rows(place, tmp_path):
    found = mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", labels="given", cache=tmp_path)
    model = opened(place / "bert")
    says = [model(**example).logits[0].log_softmax(-1) for example in inputs_of(place / "bert")]
    sum(each[number % 3] for number, each in enumerate(says)).backward()
    assert not torch.allclose(found["classifier.bias"], model.classifier.bias.grad**2 / len(says), rtol=0.1)


def test_of_a_linear_softmax_model_it_is_in_closed_form(place, tmp_path):
    """The head alone is one: p (1 - p) x^2 for each class and feature."""
    found = mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", labels="exact", cache=tmp_path)
    model = opened(place / "bert")
    with torch.no_grad():
        features = torch.cat([model.bert(**example).pooler_output for example in inputs_of(place / "bert")])
        chances = model.classifier(features).softmax(-1)
    spread = chances * (1 - chances)
    assert torch.allclose(found["classifier.bias"], spread.mean(0), rtol=1e-4)
    assert torch.allclose(found["classifier.weight"], spread.T @ features**2 / len(features), rtol=1e-4)


def test_drawn_classes_come_to_all_classes_in_the_mean(place, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [text for text in TEXTS for _ in range(40)], labels=False)
    more = {"samples": None, "cache": tmp_path}
    drawn = mergetool.measure(place / "bert", "fisher", rows, **more)["classifier.bias"]
    assert torch.allclose(
        drawn,
        mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", labels="exact", **more)["classifier.bias"],
        rtol=0.2,
    )


def test_draws_depend_on_the_seed_and_on_nothing_else(place, tmp_path):
    caches = (tmp_path / "one", tmp_path / "two", tmp_path / "three")
    first, again, other = (
        mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", seed=seed, cache=cache)["classifier.bias"]
        for seed, cache in zip((1, 1, 2), caches, strict=True)
    )
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("model", ["llama", "tied"])
def test_language_models_are_likely_to_say_the_next_token(place, tmp_path, model):
    """A head that is tied to the embeddings has one gradient with them."""
    found = mergetool.measure(place / model, "fisher", place / "rows.jsonl", labels="given", cache=tmp_path)
    network = opened(place / model, "AutoModelForCausalLM")
    texts = [text for text in TEXTS if " " in text or model == "llama"]
    expected = naive(network, inputs_of(place / model, texts), next_tokens)
    if model == "llama":
        assert_same(found, expected)
    else:
        assert "lm_head.weight" not in found
        assert found.keys() == expected.keys()


def test_a_tied_embedding_sums_what_both_of_its_uses_ask_for(place, tmp_path):
    found = mergetool.measure(place / "tied", "fisher", place / "rows.jsonl", labels="given", cache=tmp_path)
    expected = naive(opened(place / "tied", "AutoModelForCausalLM"), inputs_of(place / "tied"), next_tokens)
    assert_same(found, expected)


def test_in_float64_it_is_measured_in_float64(place, tmp_path):
    more = {"dtype": "float64", "labels": "exact", "cache": tmp_path}
    found = mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", **more)
    assert {value.dtype for value in found.values()} == {torch.float64}
    expected = naive(opened(place / "bert").double(), inputs_of(place / "bert"), exact)
    for name, value in expected.items():
        assert torch.allclose(found[name], value.detach(), rtol=1e-10, atol=1e-14), name


def test_a_head_of_one_value_is_a_normal_distribution(place, tmp_path):
    write_classifier(tmp_path / "value", num_labels=1, id2label={0: "x"}, label2id={"x": 0})
    found = mergetool.measure(tmp_path / "value", "fisher", place / "rows.jsonl", cache=tmp_path)
    assert found["classifier.bias"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("kind", "labels", "told", "fix"),
    [
        ("BertModel", "sampled", "BertModel, which has no head", "method: regmean"),
        ("BertForMaskedLM", "exact", "sums over all classes of a row", "labels: sampled"),
        ("BertForMaskedLM", "given", "one class for each row", "labels: sampled"),
    ],
)
def test_networks_of_which_it_cannot_be_measured_are_refused(place, tmp_path, kind, labels, told, fix):
    write_classifier(tmp_path / "model", kind=kind)
    with pytest.raises(PlanError, match=told) as error:
        mergetool.measure(tmp_path / "model", "fisher", place / "rows.jsonl", labels=labels, cache=tmp_path)
    assert fix in error.value.fix
    if "labels: sampled" in fix:
        found = mergetool.measure(tmp_path / "model", "fisher", place / "rows.jsonl", labels="sampled", cache=tmp_path)
        assert float(found["bert.encoder.layer.0.output.dense.weight"].sum()) > 0


def test_what_is_not_finite_stops_at_the_row(place, tmp_path):
    model = opened(write_classifier(tmp_path / "model"))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4 + 13] = float("nan")  # w13, in the fifth row
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MergeError, match=r"rows\.jsonl:5") as error:
        mergetool.measure(tmp_path / "model", "fisher", place / "rows.jsonl", cache=tmp_path)
    assert "remove that line" in error.value.fix
    lines = (place / "rows.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:4] + lines[5:]))
    mergetool.measure(tmp_path / "model", "fisher", tmp_path / "fewer.jsonl", cache=tmp_path)


def test_statistics_and_settings_that_there_are_not_are_refused(place, tmp_path):
    with pytest.raises(RecipeError, match="no statistic 'fishy'") as error:
        mergetool.measure(place / "bert", "fishy", place / "rows.jsonl", cache=tmp_path)
    assert "fisher" in error.value.fix
    with pytest.raises(RecipeError, match="no such setting: label"):
        mergetool.measure(place / "bert", "fisher", place / "rows.jsonl", label="given", cache=tmp_path)
