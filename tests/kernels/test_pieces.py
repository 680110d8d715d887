"""Cutting tensors into pieces by the layouts of their axes."""

import pytest
import torch

from mergetool.kernels.pieces import cut, families
from mergetool.kernels.spaces import Factor, Space
from tests.kernels import toys


def pieces_of(spaces, **tensors):
    spaces, layouts = toys.network(spaces, tensors)
    return cut(spaces, layouts)


def test_a_flatten_keeps_pixels_out_of_the_face():
    spaces = toys.space_map(Space("c", 3), Space("h", 5))
    (piece,) = pieces_of(spaces, dense=[[["h"]], [["c", 4]]])
    assert piece.shape == (5, 3, 4)
    x = torch.arange(60.0).reshape(5, 12)
    assert torch.equal(piece.view(x), x.reshape(5, 3, 4))


def test_channels_behind_pixels_are_brought_forward():
    spaces = toys.space_map(Space("c", 3))
    (piece,) = pieces_of(spaces, dense=[[[5]], [[4, "c"]]])
    assert piece.shape == (3, 1, 20)
    x = torch.arange(60.0).reshape(5, 12)
    assert torch.equal(piece.view(x)[1, 0], x.reshape(5, 4, 3)[:, :, 1].reshape(-1))


def test_segments_become_pieces_and_those_that_do_not_move_are_left_out():
    spaces = toys.space_map(Space("a", 2), Space("b", 3))
    pieces = pieces_of(spaces, fused=[[["a"], [4], ["b"]], [[5]]])
    assert [piece.shape for piece in pieces] == [(2, 1, 5), (3, 1, 5)]
    x = torch.arange(45.0).reshape(9, 5)
    assert torch.equal(pieces[1].view(x)[:, 0], x[6:])


def test_a_head_that_cannot_move_still_indexes_what_moves_within_it():
    spaces = toys.space_map(Space("head", 2, "fixed"), Space("vo", 3, within="head"))
    plain, nested = pieces_of(spaces, scale=[[["head"]], [["head", "vo"]]], v=[[["head", "vo"]]])
    assert [factor.space for factor in nested.faces[0]] == ["head", "vo"]
    assert plain.shape == (6, 1, 2)  # the scale's own axis of heads is fixed


def test_vocabulary_and_other_fixed_spaces_are_not_faces():
    spaces = toys.space_map(Space("vocab", 7, "fixed"), Space("d", 4))
    (piece,) = pieces_of(spaces, embed=[[["vocab"]], [["d"]]], bias=[[["vocab"]]])
    assert piece.tensor == "embed"
    assert piece.shape == (4, 1, 7)


def test_long_fixed_axes_are_taken_in_parts(monkeypatch):
    spaces = toys.space_map(Space("vocab", 7, "fixed"), Space("d", 4), Space("h", 6))
    layouts = {"embed": [[["vocab"]], [["d"]]], "up": [[["h"]], [["d"]]], "fused": [[["h"], ["vocab"]], [["d"]]]}
    whole = pieces_of(spaces, **layouts)
    monkeypatch.setattr("mergetool.kernels.pieces.LONGEST", 3)
    parts = pieces_of(spaces, **layouts)
    assert [piece.shape for piece in parts if piece.tensor == "embed"] == [(4, 1, 3), (4, 1, 3), (4, 1, 1)]
    assert next(piece.shape for piece in parts if piece.tensor == "fused") == (6, 4, 1)
    for name, rows in (("embed", 7), ("up", 6), ("fused", 13)):
        x = torch.randn(rows, 4)
        ours = sorted(torch.cat([piece.view(x).flatten() for piece in parts if piece.tensor == name]).tolist())
        assert ours == sorted(torch.cat([piece.view(x).flatten() for piece in whole if piece.tensor == name]).tolist())


def test_faces_that_share_a_space_or_lie_within_one_are_one_family():
    spaces, layouts = toys.llama()
    found = families(spaces, cut(spaces, layouts))
    assert [family.spaces for family in found] == [("stream",), ("kv", "q", "vo"), ("ffn",)]
    side_by_side = toys.space_map(Space("head", 2), Space("qk", 3))
    both = pieces_of(side_by_side, q=[[["head", "qk"]]], gain=[[["qk"]]])
    assert [family.spaces for family in families(side_by_side, both)] == [("head", "qk")]


def test_a_sign_that_cannot_act_does_not_make_two_faces():
    spaces = {"a": Space("a", 3)}
    layouts = {"x": (((Factor(3, "a", True),),),), "y": (((Factor(3, "a", False),),),)}
    assert len({face for piece in cut(spaces, layouts) for face in piece.faces}) == 1


def test_three_moving_axes_are_refused_by_name():
    spaces = toys.space_map(Space("a", 2), Space("b", 3))
    with pytest.raises(ValueError, match="3 axes of cube"):
        pieces_of(spaces, cube=[[["a"]], [["b"]], [["a"]]])
