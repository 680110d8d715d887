"""The gradient of a loss, as transformers' own loss gives it."""

import pytest
import torch

import mergetool
from mergetool import PlanError
from mergetool.statistics.gradient import SQUARED
from tests.statistics.networks import TEXTS, inputs_of, opened, write_classifier, write_dense, write_rows

SEVERAL = tuple(text for text in TEXTS if " " in text)
"""Of one token none comes next."""


def naive(model, examples, labels, batch):
    """Means over rows, and over batches of squares, of what `backward` leaves."""
    own = []
    for example, label in zip(examples, labels, strict=True):
        model.zero_grad()
        model(**example, labels=label).loss.backward()
        own.append(
            {n: v.grad.clone() if v.grad is not None else torch.zeros_like(v) for n, v in model.named_parameters()}
        )
    mean = {name: sum(each[name] for each in own) / len(own) for name in own[0]}
    parts = [own[start : start + batch] for start in range(0, len(own), batch)]
    squares = {
        name: sum((sum(each[name] for each in part) / len(part)) ** 2 for part in parts) / len(parts) for name in own[0]
    }
    return mean | {f"{SQUARED}{name}": value for name, value in squares.items()}


@pytest.mark.parametrize("kind", ["bert", "llama", "tied"])
def test_it_is_what_backward_gives(tmp_path, kind):
    rows = write_rows(tmp_path / "rows.jsonl", SEVERAL)
    if kind == "bert":
        write_classifier(tmp_path / kind)
        model, labels = opened(tmp_path / kind), [torch.tensor([n % 3]) for n in range(len(SEVERAL))]
    else:
        write_dense(tmp_path / kind, tie_word_embeddings=kind == "tied")
        model = opened(tmp_path / kind, "AutoModelForCausalLM")
        labels = [example["input_ids"] for example in inputs_of(tmp_path / kind, SEVERAL)]
    examples = inputs_of(tmp_path / kind, SEVERAL)
    expected = naive(model, examples, labels, 3)
    found = mergetool.measure(tmp_path / kind, "gradient", rows, batch=3, cache=tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max())), name


def test_a_model_whose_loss_is_not_known_is_refused(tmp_path):
    write_classifier(tmp_path / "bert", kind="BertModel")
    with pytest.raises(PlanError, match="BertModel, whose loss is not known"):
        mergetool.measure(tmp_path / "bert", "gradient", write_rows(tmp_path / "rows.jsonl"), cache=tmp_path)
