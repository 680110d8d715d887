"""Bundles that know when they do not know: what they say of how sure they are, and what becomes of strange inputs."""

import pytest
import torch

import mergetool
from mergetool.bundle.answer import standing
from tests.bundle.tiny import make_bundle, tiny_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("known"), "bert")


@pytest.fixture(scope="module")
def model(folder):
    return mergetool.load_bundle(folder)


def test_the_runner_up_is_the_most_probable_of_the_others():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])
    assert standing("abc", probabilities, ("a", "c", None)) == (
        pytest.approx((0.5, 0.3, 0.6)),
        ("b", "b", "b"),
    )
    assert standing("a", torch.ones(1, 1), ("a",)) == ((1.0,), (None,))


def test_a_router_that_was_told_nothing_of_unknown_inputs_knows_all(model):
    answer = model(**tiny_inputs("bert"))
    assert answer.known == (True,) * 7
    own = [model.task_names.index(task) for task in answer.task]
    assert answer.probability == pytest.approx(answer.coefficients[range(7), own].tolist())
    assert all(other != task for other, task in zip(answer.runner_up, answer.task, strict=True))
    assert model(tasks=["b"], **tiny_inputs("bert")).probability == (1.0,) * 7
