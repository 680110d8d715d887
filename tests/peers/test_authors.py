"""Methods that are no peer's give the numbers of their authors' own code, or of FusionBench."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import mergetool
from tests.peers.checkpoints import sample, summary, tensors

EXPECTED = load_file(Path(__file__).parent / "authors.safetensors")
SETTINGS = {
    "magmax": {"scale": 0.5},
    "pcb": {"density": 0.1, "scale": 1.2},
    "consensus": {"threshold": 0.4, "agreeing": 2, "scale": 0.3},
    "cabs": {"density": 0.25, "block": 16, "weight": 1.2},
    "localize-and-stitch": {"density": 0.05, "boundary": "drop"},
    "opcm": {"share": 0.5},
    "free": {"variant": "authors", "cutoff": 0.4, "scale": 0.5},
}


def state(model):
    return {name: torch.from_numpy(array).double() for name, array in tensors("llama", model).items()}


@pytest.mark.parametrize(("method", "settings"), SETTINGS.items(), ids=list(SETTINGS))
def test_it_gives_the_numbers_of_the_authors_code(method, settings):
    models = {model: state(model) for model in ("ab" if method == "cabs" else "abcd")}
    merged = mergetool.merge_state_dicts(method, models, state("base"), **settings)
    found = {name: merged[name].numpy() for name in sorted(merged)}
    samples = np.concatenate([sample(name, array) for name, array in found.items()])
    np.testing.assert_allclose(samples, EXPECTED[f"{method}/samples"], rtol=1e-6, atol=1e-8)
    totals = np.stack([summary(array) for array in found.values()])
    np.testing.assert_allclose(totals, EXPECTED[f"{method}/summary"], rtol=1e-6, atol=1e-6)
