"""Each rule lets through what an operation allows, no more (the proof fails) and no less (the sizes are listed)."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergetool.arch.trace import traced
from mergetool.arch.verify import failures, general_position, runner


class Between(nn.Module):
    """A layer, an operation, a layer; `w` is a parameter for the operation."""

    def __init__(self, operation, shape, *, units, reads):
        super().__init__()
        self.a, self.b = nn.Linear(4, units), nn.Linear(reads, 3)
        self.w = nn.Parameter(torch.ones(shape))
        self.operation = operation

    def forward(self, x):
        return self.b(self.operation(self.a(x), self.w))


MASK = torch.tensor([[True], [False], [True], [False], [False]])

# operation: what it does, the shape of its parameter, units before, units after, sizes of the spaces that may move
CASES = {
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (7, 6), 6, 7, [6, 7]),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...i,oi->...o", x, w), (7, 6), 6, 7, [6, 7]),
    "matmul": (lambda x, w: x @ w, (6, 7), 6, 7, [6, 7]),
    "matmul transposed": (lambda x, w: x @ w.T, (7, 6), 6, 7, [6, 7]),
    "matmul with a vector": (lambda x, w: x * (x @ w)[:, None], (6,), 6, 6, [6]),
    "bmm": (lambda x, w: torch.bmm(x.view(5, 2, 3), w.expand(5, 3, 7)).flatten(1), (3, 7), 6, 14, [2, 3, 7]),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w), (6, 6), 6, 6, [6]),
    "repeat": (lambda x, w: x.repeat(1, 2) * w, (12,), 6, 12, [6]),
    "repeat_interleave": (lambda x, w: x.repeat_interleave(2, 1) * w, (12,), 6, 12, [6]),
    "stack": (lambda x, w: torch.stack([x, x * w], 1).flatten(1), (6,), 6, 12, [6]),
    "cat": (lambda x, w: torch.cat([x, x @ w], 1), (6, 5), 6, 11, [5, 6]),
    "glu": (lambda x, w: functional.glu(x) * w, (6,), 12, 6, [6]),
    "chunk": (lambda x, w: torch.mul(*x.chunk(2, 1)) * w, (6,), 12, 6, [6]),
    "split": (lambda x, w: torch.cat(x.split([2, 4], 1)[::-1], 1) * w, (6,), 6, 6, [2, 4]),
    "unbind": (lambda x, w: torch.stack(x.view(-1, 2, 3).unbind(1)[::-1], 1).flatten(1) * w, (6,), 6, 6, [3]),
    "select": (lambda x, w: x.view(-1, 2, 3)[:, 0] * w, (3,), 6, 3, [3]),
    "slice with a step": (lambda x, w: x[:, ::2] * w, (3,), 6, 3, []),
    "negative slice": (lambda x, w: x[:, -4:] * w, (4,), 6, 4, [4]),
    "index of another axis": (lambda x, w: x[torch.tensor([0, 2, 1])] * w, (6,), 6, 6, [6]),
    "index": (lambda x, w: x.view(-1, 2, 3)[:, torch.tensor([1, 0, 1])].flatten(1) * w, (9,), 6, 9, [3]),
    "flip of another axis": (lambda x, w: x.flip(0) * w, (6,), 6, 6, [6]),
    "flip": (lambda x, w: x.flip(1) * w, (6,), 6, 6, []),
    "roll": (lambda x, w: x.roll(1, 1) * w, (6,), 6, 6, []),
    "cumsum": (lambda x, w: x.cumsum(1) * w, (6,), 6, 6, []),
    "softmax": (lambda x, w: x.softmax(1) * w, (6,), 6, 6, [6]),
    "centred": (lambda x, w: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * w, (6,), 6, 6, [6]),
    "largest": (lambda x, w: (x - x.amax(-1, keepdim=True)) * w, (6,), 6, 6, [6]),
    "rms_norm": (lambda x, w: functional.rms_norm(x, (6,), w), (6,), 6, 6, [6]),
    "pad": (lambda x, w: functional.pad(x, (1, 2)) @ w, (9, 7), 6, 7, [6, 7]),
    "pad by reflection": (lambda x, w: functional.pad(x, (1, 2), mode="reflect") * w, (9,), 6, 9, []),
    "where": (lambda x, w: torch.where(MASK, x, x * w), (6,), 6, 6, [6]),
    "masked_fill": (lambda x, w: x.masked_fill(MASK, 0.5) * w, (6,), 6, 6, [6]),
    "a constant that differs along the axis": (lambda x, w: x * torch.arange(6.0) * w, (6,), 6, 6, []),
    "a constant that does not": (lambda x, w: (x + torch.full((6,), 2.0)) * w, (6,), 6, 6, [6]),
    "new copies": (lambda x, w: (x[:, None] * w.expand(2, 6)).flatten(1), (6,), 6, 12, [6]),
    "convolution": (lambda x, w: functional.conv1d(x[:, :, None], w)[:, :, 0], (7, 6, 1), 6, 7, [6, 7]),
    "grouped convolution": (
        lambda x, w: functional.conv1d(x[:, :, None], w, groups=2)[:, :, 0],
        (8, 3, 1),
        6,
        8,
        [2, 3, 4],
    ),
    "squeeze and unsqueeze": (lambda x, w: x.unsqueeze(1).squeeze(1).T.contiguous().T * w, (6,), 6, 6, [6]),
    "in place": (lambda x, w: x.mul_(w).relu_(), (6,), 6, 6, [6]),
    "an embedding": (
        lambda x, w: x + functional.embedding(torch.tensor([0, 1, 2, 1, 0]), w),
        (3, 6),
        6,
        6,
        [6],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_lets_its_axes_move_as_far_as_it_may(case):
    operation, shape, units, reads, sizes = CASES[case]
    module = Between(operation, shape, units=units, reads=reads)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    spec = traced(module, x)
    assert failures(runner(module, x), general_position(module), spec) == ()
    assert sorted(space.size for space in spec.spaces.values()) == sizes
