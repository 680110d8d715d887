"""The optimizer of the quickstart beside torch's, which is the same in bfloat16."""

import pytest
import torch

from scripts.demo.muon import Muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has none")
def test_steps_are_those_of_torch_up_to_the_rounding_of_bfloat16():
    torch.manual_seed(0)
    start = [torch.randn(12, 20), torch.randn(20, 12)]
    gradients = [[torch.randn_like(each) for each in start] for _ in range(3)]
    ends = []
    for kind in (Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(each.clone()) for each in start]
        optimizer = kind(weights, lr=0.02)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient
            optimizer.step()
        ends.append(weights)
    for mine, theirs, before in zip(*ends, start, strict=True):
        moved = (theirs - before).norm()
        assert 0.1 < moved < 1
        assert (mine - theirs).norm() < 0.02 * moved
