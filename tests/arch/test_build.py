"""What the language can say beyond the families that come with the tool."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergetool.arch.match import resolve
from mergetool.arch.verify import prove, runner
from mergetool.errors import PlanError
from tests.arch.networks import randomised


def build(tmp_path, text, shapes, config=None):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return resolve(str(path), shapes, config)


def test_one_unknown_on_an_axis_is_solved_for(tmp_path):
    text = """
    spaces:
      head: {symmetry: fixed, size: heads}
      qk: fixed
      vo: fixed
    tensors:
      qkv: head qk + head qk + head vo
      out: 2 head vo
    """
    spec = build(tmp_path, text, {"qkv": (3 * (5 + 5 + 2),), "out": (2 * 3 * 2,)}, {"heads": 3})
    assert {name: space.size for name, space in spec.spaces.items()} == {"head": 3, "qk": 5, "vo": 2}


def test_a_size_that_no_key_and_no_axis_tells_is_asked_for(tmp_path):
    text = "spaces:\n  a:\n  b:\ntensors:\n  w: a b\n"
    with pytest.raises(PlanError, match="shapes do not tell the size of 'a'"):
        build(tmp_path, text, {"w": (12,)})


def test_a_size_that_cannot_be_computed_names_its_space(tmp_path):
    text = "spaces:\n  a: {size: width // heads}\ntensors:\n  w: a _\n"
    with pytest.raises(PlanError, match="architecture mine: space 'a': cannot compute 'width // heads'"):
        build(tmp_path, text, {"w": (12,)}, {"width": 12, "heads": 0})


def test_spaces_said_to_be_one_must_have_one_size(tmp_path):
    text = "spaces:\n  a:\n  b: fixed\ntensors:\n  w: a, b\nidentities:\n  - {space: a, is: b}\n"
    assert list(build(tmp_path, text, {"w": (3, 3)}).spaces) == ["b"]
    with pytest.raises(PlanError, match="'a' is said to be 'b', but their sizes are 4 and 3"):
        build(tmp_path, text, {"w": (4, 3)})


def test_new_channels_can_stand_behind_the_old_ones(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.last = nn.Linear(3, 4), nn.Linear(4, 7), nn.Linear(7, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(functional.relu(functional.pad(x, (0, 3)) + self.wide(x)))

    text = """
    spaces:
      narrow:
      wide:
    tensors:
      first.weight: narrow, _
      first.bias: narrow
      wide.weight: wide, narrow
      wide.bias: wide
      last.weight: _, wide
      last.bias: _
    identities:
      - {space: wide, is: narrow, pad: PLACE}
    """
    net = randomised(Net())
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    run = runner(net, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    spec = build(tmp_path, text.replace("PLACE", "end"), shapes)
    assert {name: space.size for name, space in spec.spaces.items()} == {"narrow": 4, "wide.back": 3}
    assert prove(run, net.state_dict(), spec) < 1e-10
    with pytest.raises(PlanError, match="narrow"):
        prove(run, net.state_dict(), build(tmp_path, text.replace("PLACE", "centre"), shapes))


def test_a_padded_space_behind_another_factor_is_refused(tmp_path):
    text = """
    spaces:
      a:
      b:
    tensors:
      v: a
      w: 2 b
    identities:
      - {space: b, is: a, pad: end}
    """
    with pytest.raises(PlanError, match="must be the first factor"):
        build(tmp_path, text, {"v": (2,), "w": (6,)})


def test_grouped_convolutions_nest_channels_in_groups(tmp_path):
    net = randomised(
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=3), nn.Flatten())
    )
    net.append(nn.Linear(6 * 4, 2))
    net = randomised(net)
    text = """
    spaces:
      group: {size: 3}
      inner: {within: group}
      outer: {within: group}
    tensors:
      0.weight: group inner, _, _, _
      0.bias: group inner
      1.weight: group inner
      1.bias: group inner
      3.weight: group outer, _, _, _
      3.bias: group outer
      5.weight: _, group outer 4
      5.bias: _
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    run = runner(net, torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    # Inside a group the kernel's columns are shuffled too, but by a different element for every group: no axis of
    # the (out, in / groups) kernel can say that, so `inner` is declared fixed.
    spec = build(tmp_path, text.replace("inner: {within: group}", "inner: {within: group, symmetry: fixed}"), shapes)
    assert [group.kind for group in spec.groups] == ["nested"]
    assert prove(run, net.state_dict(), spec) < 1e-10
    with pytest.raises(PlanError):
        prove(run, net.state_dict(), build(tmp_path, text, shapes))
