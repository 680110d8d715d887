"""Whole mergekit files in the forms that people write (mergekit/files.yaml) give mergekit's numbers."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

import mergetool
from tests.peers.checkpoints import sample, summary, tensors, write_families

FOLDER = Path(__file__).parent / "mergekit"
CASES = yaml.safe_load((FOLDER / "files.yaml").read_text())
EXPECTED = load_file(FOLDER / "files.safetensors")
ENDS = ("model.norm.weight", "lm_head.weight")
OURS = {"bases-of-their-own": ENDS}
"""mergekit takes as many models for what lies behind the layers as the first slice has; we take those of the last."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_families(folder)
    return folder


def expected(case):
    """mergekit's numbers: the sum and norm of each tensor, and a sample of its elements."""
    return {name.partition("/")[2]: numbers for name, numbers in EXPECTED.items() if name.startswith(f"{case}/")}


@pytest.fixture
def merge(models, tmp_path, monkeypatch):
    """Run a mergekit file beside the models; all merged tensors."""
    monkeypatch.chdir(models)

    def run(recipe):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        mergetool.run(tmp_path / "recipe.yml", output=tmp_path / "out")
        with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_numbers_of_mergekit(case, merge):
    merged, theirs = merge(CASES[case]), expected(case)
    assert set(merged) == set(theirs)
    for name in set(merged) - set(OURS.get(case, ())):
        numbers = theirs[name]
        np.testing.assert_allclose(summary(merged[name]), numbers[:2], rtol=1e-5, atol=1e-4, err_msg=name)
        kept = sample(name, merged[name])[: len(numbers) - 2]
        np.testing.assert_allclose(kept, numbers[2:], rtol=0, atol=2e-6, err_msg=name)


def test_what_lies_behind_the_layers_is_of_all_models_of_the_last_slice(merge):
    merged, theirs = merge(CASES["bases-of-their-own"]), expected("bases-of-their-own")
    for name in ENDS:
        own, base, d = (tensors("llama", model)[name] for model in ("a", "base", "d"))
        np.testing.assert_allclose(merged[name], own + 0.5 * (base - own) + 0.25 * (d - own), rtol=0, atol=1e-6)
        np.testing.assert_allclose(theirs[name][:2], summary(own + 0.5 * (base - own)), rtol=1e-5, atol=1e-4)
