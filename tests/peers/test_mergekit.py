"""Every recipe of mergekit/cases.yaml gives mergekit's numbers; where ours are meant to differ, they do."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

import mergetool
from mergetool.errors import RecipeError
from tests.peers.checkpoints import CONFIGS, sample, shapes, summary, tensors, write_families

FOLDER = Path(__file__).parent / "mergekit"
CASES = yaml.safe_load((FOLDER / "cases.yaml").read_text())
EXPECTED = load_file(FOLDER / "outputs.safetensors")
ON_A_SPHERE = ("slerp", "nuslerp", "multislerp", "karcher")
BFLOAT16 = 2**-8  # half the distance between neighbours, relative to the value, twice

ZERO = (
    "model.layers.0.self_attn.v_proj.weight"  # the base's is zero: we walk the straight line, mergekit a quarter circle
)
EVEN = "model.layers.1.mlp.up_proj.weight"  # the two models disagree exactly: we keep the base, mergekit elects plus
OPPOSITE = {  # minus the base, and minus twice the base: mergekit divides by a sine of rounding errors
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
}
OURS = {
    "slerp-edges": {ZERO},
    "slerp-edges-reversed": {ZERO},
    "nuslerp-edges": {ZERO, *OPPOSITE},
    "ties-exact-disagreement": {EVEN},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_families(folder)
    return folder


@pytest.fixture
def merge(models, tmp_path, monkeypatch):
    """Run a mergekit recipe beside the models; all merged tensors as float32."""
    monkeypatch.chdir(models)

    def run(recipe):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        mergetool.run(tmp_path / "recipe.yml", output=tmp_path / "out")
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
            return {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118

    return run


def expected(case):
    """mergekit's numbers for each tensor: the sampled elements, and (sum, norm) of all."""
    family = next(name for name in CONFIGS if f"{name}/" in str(CASES[case]))
    samples, found = EXPECTED[f"{case}/samples"], {}
    for name, totals in zip(sorted(shapes(family)), EXPECTED[f"{case}/summary"], strict=True):
        length = sample(name, np.empty(shapes(family)[name], np.float32)).size
        found[name], samples = (samples[:length], totals), samples[length:]
    assert not samples.size
    return found


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("random")])
def test_a_mergekit_recipe_gives_the_numbers_of_mergekit(case, merge):
    merged, theirs = merge(CASES[case]), expected(case)
    assert set(merged) == set(theirs)
    relative = BFLOAT16 if CASES[case].get("out_dtype") == "bfloat16" else 0
    absolute = 2e-5 if CASES[case]["merge_method"] in ON_A_SPHERE else 2e-6
    if CASES[case]["merge_method"] == "arcee_fusion":
        _assert_the_same_but_for_a_few(merged, theirs)
        return
    for name in set(merged) - OURS.get(case, set()):
        samples, totals = theirs[name]
        np.testing.assert_allclose(sample(name, merged[name]), samples, rtol=relative, atol=absolute, err_msg=name)
        np.testing.assert_allclose(summary(merged[name]), totals, rtol=1e-5, atol=1e-4, err_msg=name)


def _assert_the_same_but_for_a_few(merged, theirs):
    """Near the threshold mergekit's importances are rounding errors of logarithms: other entries are taken over."""
    found = np.concatenate([sample(name, merged[name]) for name in sorted(merged)])
    samples = np.concatenate([theirs[name][0] for name in sorted(merged)])
    assert (np.abs(found - samples) > 2e-6).mean() < 0.01


@pytest.mark.parametrize("case", ["slerp-edges", "slerp-edges-reversed"])
def test_slerp_with_a_zero_vector_walks_the_straight_line(case, merge):
    t = 0.3 if case == "slerp-edges" else 0.7  # counted from the zero vector
    vector = tensors("edges", "a")[ZERO]
    np.testing.assert_allclose(merge(CASES[case])[ZERO], t * vector, rtol=0, atol=1e-6)
    theirs, _ = expected(case)[ZERO]
    np.testing.assert_allclose(theirs, np.sin(t * np.pi / 2) * sample(ZERO, vector), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("random")])
def test_as_many_entries_are_kept_as_mergekit_keeps_of_each_rank_and_rescaled_alike(case, merge):
    merged, theirs = merge(CASES[case]), expected(case)
    ours = {name: sample(name, tensor) for name, tensor in merged.items()}
    for found in (ours, {name: samples for name, (samples, _) in theirs.items()}):
        ranks, kept = _kept(found, rescaled="as-it-is" not in case)
        thirds = [kept[(ranks >= low) & (ranks <= low + 1 / 3)].mean() for low in (0, 1 / 3, 2 / 3)]
        wanted = (0.4, 0.6, 0.8) if "della" in case else (0.6, 0.6, 0.6)
        np.testing.assert_allclose(thirds, wanted, atol=4 * (0.25 * 3 / len(kept)) ** 0.5)


@cache
def _llama(model):
    return tensors("llama", model)


@cache
def _ranks(name):
    """Where sampled entries of what c has changed stand in their rows, from 0 to 1."""
    base, model = (_llama(which)[name] for which in ("base", "c"))
    return sample(name, np.abs(model - base).argsort(1).argsort(1) / (base.shape[1] - 1))


def _kept(found, *, rescaled):
    """Of sampled entries of all matrices the rank in their row, from 0 to 1, and whether they are kept."""
    all_ranks, all_kept = [], []
    for name, samples in found.items():
        base, model = (_llama(which)[name] for which in ("base", "c"))
        if base.ndim < 2:
            continue
        delta, ranks = sample(name, model - base), _ranks(name)
        change = samples - sample(name, base)
        kept = np.abs(change) > 1e-6
        factors = change[kept & (np.abs(delta) > 1e-3)] / delta[kept & (np.abs(delta) > 1e-3)]
        np.testing.assert_allclose(factors, np.median(factors), rtol=1e-3)
        assert 1.1 < np.median(factors) < 2 if rescaled else abs(np.median(factors) - 1) < 1e-3
        all_ranks.append(ranks)
        all_kept.append(kept)
    return np.concatenate(all_ranks), np.concatenate(all_kept)


def test_nuslerp_without_a_circle_walks_the_straight_line(merge):
    merged, base, other = merge(CASES["nuslerp-edges"]), tensors("edges", "base"), tensors("edges", "a")
    for name in (ZERO, *OPPOSITE):
        np.testing.assert_allclose(merged[name], 0.7 * base[name] + 0.3 * other[name], rtol=0, atol=1e-6)
    assert max(np.abs(expected("nuslerp-edges")[name][0]).max() for name in OPPOSITE) > 100


def test_ties_keeps_the_base_where_a_vote_ends_even(merge):
    base, a, b = (tensors("edges", model)[EVEN] for model in ("base", "a", "b"))
    np.testing.assert_array_equal(merge(CASES["ties-exact-disagreement"])[EVEN], base)
    theirs, _ = expected("ties-exact-disagreement")[EVEN]
    np.testing.assert_allclose(theirs, sample(EVEN, np.maximum(a, b)), rtol=0, atol=1e-6)


def test_weights_that_add_up_to_zero_are_refused_where_mergekit_writes_nan(merge):
    models = [{"model": "llama/a", "parameters": {"weight": 1}}, {"model": "llama/b", "parameters": {"weight": -1}}]
    with pytest.raises(RecipeError, match="add up to 0"):
        merge({"merge_method": "linear", "models": models})


def test_the_samples_cover_every_tensor_of_every_case():
    assert {key.partition("/")[0] for key in EXPECTED} == set(CASES)
    assert all(np.isfinite(numbers).all() for numbers in EXPECTED.values())
