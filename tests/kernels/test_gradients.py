"""Task vectors of gradient descent on quadratics, whose alignment and linearity are known."""

import math

import pytest
import torch

from mergetool.kernels.gradients import Descent, descent

CURVATURE = [torch.tensor([1.0, 2, 5]).double(), torch.tensor([3.0, 1, 1]).double()]
CENTRE = [torch.tensor([1.0, 1, 1]).double(), torch.tensor([-1.0, 2, 0.5]).double()]


def loss(task, at):
    return float(0.5 * (CURVATURE[task] * (at - CENTRE[task]) ** 2).sum())


def gradient(task, at):
    return CURVATURE[task] * (at - CENTRE[task])


def trained(task, steps):
    at = torch.zeros(3).double()
    for _ in range(steps):
        at = at - 0.1 * gradient(task, at)
    return at


@pytest.mark.parametrize(
    ("steps", "alignment", "linearity"),
    [
        (1, (1.0, 1.0), (0.77666667, 0.88207547)),
        (5, (0.96501710, 0.98187914), (0.56318604, 0.67080921)),
        (50, (0.84417954, 0.87026429), None),
    ],
)
def test_steps_down_a_quadratic_are_as_aligned_and_linear_as_they_are(steps, alignment, linearity):
    for task in (0, 1):
        zero, end = torch.zeros(3).double(), trained(task, steps)
        found = descent(end, gradient(task, zero))
        assert found.alignment == pytest.approx(alignment[task], abs=5e-9)
        if linearity:
            assert found.linearity(loss(task, zero), loss(task, end)) == pytest.approx(linearity[task], abs=5e-9)
        if steps == 1:
            assert found.step == pytest.approx(0.1)


def test_slices_add_up_and_preconditioning_turns_signs_of_adam_into_gradients():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(1000, generator=generator) * torch.logspace(-3, 3, 1000)
    squares = slope.double() ** 2
    moved = -0.01 * slope.sign()  # the first step of Adam
    whole = descent(moved, slope, squares)
    slices = [slice(begin, begin + 300) for begin in range(0, 1000, 300)]
    parts = sum((descent(moved[each], slope[each], squares[each]) for each in slices), Descent())
    assert whole.preconditioned == pytest.approx(1.0, abs=1e-4)
    assert whole.alignment < 0.6
    for number in ("alignment", "preconditioned", "step"):
        assert getattr(parts, number) == pytest.approx(getattr(whole, number), rel=1e-12)


def test_nothing_moved_and_no_slope_are_no_numbers_to_trust():
    zero, some = torch.zeros(4), torch.ones(4)
    assert math.isnan(descent(zero, some).alignment)
    assert math.isnan(descent(some, zero).step)
    assert math.isnan(descent(some, zero).linearity(1.0, 0.5))
