"""Every recipe of mergekit/vocabularies.yaml gives mergekit's rows, token by token."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import mergetool
from tests.peers.vocabularies import GIVEN, ROWS, SPECIAL, TOKENS, by_token, write_transplant, write_vocabularies

FOLDER = Path(__file__).parent / "mergekit"
CASES = yaml.safe_load((FOLDER / "vocabularies.yaml").read_text())
EXPECTED = load_file(FOLDER / "vocabularies.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_vocabularies(folder)
    return folder


def merged(models, recipe, tmp_path, monkeypatch):
    """Embeddings and head of a mergekit recipe that is run beside the models, in the order of tokens."""
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = mergetool.run(tmp_path / "recipe.yml", output=tmp_path / "out").path
    return by_token(result, load_file(result / "model.safetensors"))


@pytest.mark.parametrize("case", [case for case in CASES if case != "passthrough"])
def test_rows_are_those_of_mergekit(models, case, tmp_path, monkeypatch):
    ours = merged(models, CASES[case], tmp_path, monkeypatch)
    for name in ROWS:
        np.testing.assert_allclose(ours[name], EXPECTED[f"{case}/{name}"], atol=2e-6, rtol=0)


def test_rows_of_a_model_that_gives_no_embeddings_are_taken_all_the_same(models, tmp_path, monkeypatch):
    """In a stack mergekit looks for rows in the one model that gives the tensor, and writes zeros for other tokens."""
    ours = merged(models, CASES["passthrough"], tmp_path, monkeypatch)
    tokens = sorted({*TOKENS["base"], *TOKENS["a"]})
    for name, own, other in ((ROWS[0], "base", "a"), (ROWS[1], "a", "base")):
        theirs = EXPECTED[f"passthrough/{name}"]
        shared = np.array([token in TOKENS[own] for token in tokens])
        np.testing.assert_allclose(ours[name][shared], theirs[shared], atol=2e-6, rtol=0)
        rows = load_file(models / other / "model.safetensors")[name]
        lacking = [token for token in tokens if token not in TOKENS[own]]
        expected = np.array([rows[TOKENS[other].index(token)] for token in lacking]).reshape(-1, rows.shape[1])
        assert not theirs[~shared].any()
        np.testing.assert_array_equal(ours[name][~shared], expected)


@pytest.mark.parametrize("way", ["omp", "mean", "zero"])
def test_a_transplanted_tokenizer_has_the_rows_of_mergekit_tokensurgeon(way, tmp_path):
    write_transplant(tmp_path)
    recipe = {"models": {"model": str(tmp_path / "model")}, "merge": {"method": "passthrough"}}
    tokenizer = {"source": str(tmp_path / "donor"), "missing": way}
    result = mergetool.run({**recipe, "tokenizer": tokenizer}, output=tmp_path / "out").path
    found, own = (load_file(folder / "model.safetensors") for folder in (result, tmp_path / "model"))
    tokens, before = GIVEN["donor"][1], GIVEN["model"][1]
    new = slice(len(SPECIAL), len(SPECIAL) + 30)
    for name in ROWS:
        np.testing.assert_allclose(found[name][new], EXPECTED[f"{way}/{name}"], atol=2e-5, rtol=0)
        kept = [before.index(token) for token in tokens if token in before]
        np.testing.assert_array_equal(np.delete(found[name], new, 0), own[name][kept])
