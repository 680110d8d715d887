"""Claims on inputs, against definitions written out."""

import torch

from mergetool.kernels.claims import claims, fit, left_out

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2, 2]]
Y[6] = 0  # an input of no task


def kernel(x, y):
    return torch.stack([torch.stack([(-((a - b) ** 2).sum()).exp() for b in y]) for a in x])


def test_weights_solve_the_ridge_regression():
    weights, _ = fit(X, Y)
    expected = torch.linalg.solve(kernel(X, X) + 0.03 * torch.eye(7), Y)
    torch.testing.assert_close(weights, expected)
    new = X[:2] + 0.1
    torch.testing.assert_close(claims(new, X, weights), kernel(new, X) @ expected)


def test_an_example_is_claimed_by_its_task_and_nothing_far_away_by_any():
    weights, _ = fit(X, Y)
    assert claims(X, X, weights)[:6].argmax(1).tolist() == [0, 0, 1, 1, 2, 2]
    assert claims(X + 99, X, weights).abs().max() == 0


def test_what_is_left_out_is_as_if_it_had_not_been_there():
    weights, inverse = fit(X, Y)
    groups = [[0], [1, 6], [4, 5, 6]]
    for found, group in zip(left_out(Y, weights, inverse, groups), groups, strict=True):
        rest = [place for place in range(7) if place not in group]
        fewer, _ = fit(X[rest], Y[rest])
        torch.testing.assert_close(found, claims(X[group[:1]], X[rest], fewer)[0])
