"""Parameters that are joined or divided while a checkpoint is loaded, told from marks."""

import torch

from mergetool.networks.places import composed, fragments_of, marks, whole_of

SHAPES = {"a": (3, 4), "b": (3, 4), "qkv": (6, 2)}


def loaded(join):
    return [join(marks(SHAPES, digit)) for digit in range(3)]


def assert_found(join):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    expected = join(tensors)
    fragments = fragments_of(SHAPES, loaded(join))
    assert torch.equal(composed(tuple(expected.shape), fragments, tensors.get), expected)
    return fragments


def test_tensors_that_are_stacked_joined_or_turned_are_found():
    assert len(assert_found(lambda t: torch.stack([t["b"], t["a"]]))) == 2
    assert len(assert_found(lambda t: torch.cat([t["a"], t["b"]], 1))) == 2
    assert all(fragment.order is None for fragment in assert_found(lambda t: t["qkv"][2:4]))
    assert_found(lambda t: t["a"].mT)
    assert_found(lambda t: t["qkv"].view(3, 2, 2).transpose(0, 1).reshape(6, 2))


def test_what_no_expert_changed_counts_as_nothing():
    fragments = fragments_of(SHAPES, loaded(lambda t: torch.stack([t["a"], t["b"]])))
    found = composed((2, 3, 4), fragments, {"b": torch.ones(3, 4)}.get)
    assert found[0].sum() == 0
    assert found[1].sum() == 12


def test_a_parameter_that_the_checkpoint_lacks_is_made_of_nothing():
    for value in (torch.zeros(3, 4), torch.ones(3, 4), torch.randn(3, 4), torch.full((3, 4), 7.0)):
        assert fragments_of(SHAPES, [value] * 3) == ()
    assert whole_of(SHAPES, torch.zeros(3, 4)) is None
    assert whole_of(SHAPES, marks(SHAPES, 0)["b"]) == "b"
