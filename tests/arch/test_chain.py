import pytest

from mergetool.arch.match import resolve
from mergetool.errors import PlanError


def hidden(spec, tensor, axis):
    return [[(f.size, f.space) for f in segment] for segment in spec.tensors[tensor].axes[axis]]


def test_layers_with_telling_shapes_are_ordered_whatever_they_are_called():
    spec = resolve(
        "mlp",
        {
            "out.weight": (4, 7),
            "hidden1.weight": (9, 9),
            "hidden10.weight": (7, 9),
            "hidden1.bias": (9,),
            "entry.weight": (9, 6),
            "out.bias": (4,),
        },
    )
    assert hidden(spec, "entry.weight", 1) == [[(6, None)]]
    assert hidden(spec, "hidden1.weight", 0) == [[(9, "hidden.1")]]
    assert hidden(spec, "out.weight", 1) == [[(7, "hidden.2")]]
    assert hidden(spec, "out.bias", 0) == [[(4, None)]]
    assert spec.tensors["out.bias"].depth == (3, 4)


def test_two_runs_that_fit_in_either_order_are_refused():
    with pytest.raises(PlanError, match=r"more than one order in which the layers fit: a\.weight \(5, 5\)") as caught:
        resolve("mlp", {"a.weight": (5, 5), "b.weight": (5, 5)})
    assert "architecture file" in caught.value.fix


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match="no order in which the layers fit"):
        resolve("mlp", {"fc1.weight": (5, 3), "fc2.weight": (2, 4)})


def test_a_flattened_image_gives_every_channel_its_pixels():
    spec = resolve("vgg", {"features.0.weight": (6, 3, 3, 3), "classifier.0.weight": (5, 6 * 49)})
    assert hidden(spec, "classifier.0.weight", 1) == [[(6, "hidden.0"), (49, None)]]


def test_norms_belong_to_the_layer_before_them_or_of_their_number():
    sequential = {"net.0.weight": (6, 3), "net.1.weight": (6,), "net.1.running_mean": (6,), "net.3.weight": (2, 6)}
    spec = resolve("mlp", sequential)
    assert hidden(spec, "net.1.running_mean", 0) == [[(6, "hidden.0")]]
    assert not spec.tensors["net.1.running_mean"].matched
    numbered = {
        "fc1.weight": (6, 3),
        "fc2.weight": (6, 6),
        "fc3.weight": (2, 6),
        "bn1.weight": (6,),
        "bn2.weight": (6,),
    }
    spec = resolve("mlp", numbered)
    assert hidden(spec, "bn1.weight", 0) == [[(6, "hidden.0")]]
    assert hidden(spec, "bn2.weight", 0) == [[(6, "hidden.1")]]


def test_a_vector_of_unknown_place_is_refused():
    with pytest.raises(PlanError, match=r"cannot tell which layer norm\.weight \(6,\) belongs to"):
        resolve("mlp", {"fc1.weight": (6, 3), "fc2.weight": (6, 6), "fc3.weight": (2, 6), "norm.weight": (6,)})


def test_what_is_no_layer_is_refused():
    with pytest.raises(PlanError, match=r"kernel \(6, 3, 3, 3\) is no layer"):
        resolve("mlp", {"kernel": (6, 3, 3, 3)})
    with pytest.raises(PlanError, match="there are no layers"):
        resolve("mlp", {"bias": (6,)})
