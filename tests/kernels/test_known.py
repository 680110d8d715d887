"""Scores that tell unknown inputs, on numbers that can be checked by hand."""

import math

import pytest
import torch

from mergetool.kernels.known import doubt, participation, parts, seen, whole

FIRST, SECOND = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
X = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [9.0, 9.0]]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])


def test_beginnings_and_ends_are_judged_by_their_means():
    found = parts(X, MASK, [FIRST, SECOND])
    assert found.beginnings[0, 2].tolist() == [1.0, 0.0]
    assert found.ends[0, 2].tolist() == [0.0, 1.0]
    assert found.beginnings[0, 5].tolist() == pytest.approx([0.9, 0.1])  # (9, 3): 81 of 90
    assert found.ends[0, 5].tolist() == [0.0, 0.0]


def test_the_spread_is_the_variance_over_the_square_of_the_mean():
    # squares: 27 + 3 over 6 tokens = 5; the mean (1.5, 0.5) squared: 2.5
    assert float(parts(X, MASK, [FIRST]).spread) == pytest.approx(0.0, abs=1e-6)
    repeated = torch.ones(1, 4, 2)
    assert float(parts(repeated, torch.ones(1, 4), [FIRST]).spread) == pytest.approx(math.log(1e-6))


def test_what_two_tasks_explain_together_is_not_whole():
    bases = [[FIRST, SECOND]]
    glued = parts(X, MASK, bases[0])
    alone = parts(X[:, :3], MASK[:, :3], bases[0])
    assert float(whole([glued], MASK, bases, torch.tensor([0]))) < -5
    assert float(whole([alone], MASK[:, :3], bases, torch.tensor([0]))) == 0


def test_tokens_count_as_seen_by_the_nearest_task():
    table = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    ids = torch.tensor([[0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 0, 1, 0, 1, 0, 2]])
    words = torch.ones(2, 8, dtype=torch.bool)
    share, both = seen(table, ids, words, torch.tensor([0, 0]))
    assert share.tolist() == [0.5, 0.875]
    assert both.tolist() == [-1.0, 0.0]  # the last four of the first one are the other task's, all of them
    words[0, 4:] = False
    assert seen(table, ids, words, torch.tensor([0, 0]))[0].tolist() == [1.0, 0.875]


def test_doubt_is_0_about_what_is_usual_and_1_about_what_one_score_calls_strange():
    strange, usual = torch.tensor([0.0, -1.0]), torch.tensor([10.0, 0.0])
    scores = torch.tensor([[12.0, 0.0], [0.0, 0.0], [10.0, -1.0], [4.0, -0.8], [-1e9, 0.0]])
    assert doubt(scores, strange, usual).tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 3.0])


def test_features_on_a_line_have_one_dimension_and_round_ones_have_all():
    line = torch.linspace(-1, 1, 6)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    round_ = torch.cat([torch.eye(3), -torch.eye(3)])
    assert participation([line]) == pytest.approx(1.0)
    assert participation([100 * round_]) == pytest.approx(3.0)
    assert participation([line, line]) == pytest.approx(1.0)
    assert 1.5 < participation([line, 100 * round_]) < 3  # scales do not count
