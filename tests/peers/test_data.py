"""Methods that need data give the numbers of FusionBench or of their authors' own code, measured and merged here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

import mergetool
from mergetool.kernels.own_inputs import least_disturbing
from mergetool.kernels.zipping import zip_units
from mergetool.methods.merge3 import Merge3
from tests.peers import small
from tests.peers.checkpoints import noise, sample, summary, tensors

EXPECTED = load_file(Path(__file__).parent / "data.safetensors")
BUILD = "from tests.arch.networks import MLP\nfrom torch import nn\n\n\ndef build():\n    net = MLP({})\n"
BUILD += "    for layer in net.layers:\n        layer.bias = None\n    return net\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("base", "a", "b"):
        small.bert(name).save_pretrained(folder / name)
        each = zip(small.rows(name), small.labels(name), strict=True)
        lines = (json.dumps({"text": row, "label": label}) for row, label in each)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def result(place, tmp_path, merge, names="ab", **more):
    recipe = {
        "models": {name: str(place / name) for name in names},
        "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in names},
        "merge": merge,
        "compute": {"dtype": "float64"},
        **more,
    }
    return load_tensors(mergetool.run(recipe, output=tmp_path / "out", cache=tmp_path).path / "model.safetensors")


def hold(method, found, names=None, rtol=1e-6):
    arrays = {name: found[name].double().numpy() for name in sorted(names or found)}
    samples = np.concatenate([sample(name, array) for name, array in arrays.items()])
    np.testing.assert_allclose(samples, EXPECTED[f"{method}/samples"], rtol=rtol, atol=rtol)
    totals = np.stack([summary(array) for array in arrays.values()])
    np.testing.assert_allclose(totals, EXPECTED[f"{method}/summary"], rtol=rtol, atol=10 * rtol)


def test_regmean(place, tmp_path):
    found = result(place, tmp_path, {"method": "regmean", "alpha": 0.7, "ridge": 0.0})
    hold("regmean", found, rtol=2e-6)
    linear = [name for name, x in found.items() if x.dim() == 2 and "embeddings" not in name]
    hold("regmean-mergebench", found, linear, rtol=2e-6)


def test_regmean_plus(place, tmp_path):
    found = result(place, tmp_path, {"method": "regmean-plus", "alpha": 0.7, "ridge": 0.0})
    hold("regmean-plus", found, [name for name in found if "encoder.layer" in name], rtol=2e-6)


def test_fisher_merges_what_was_measured():
    states = {name: dict(small.bert(name).named_parameters()) for name in "ab"}
    states = {name: {key: x.detach() for key, x in state.items()} for name, state in states.items()}
    information = {
        name: {
            key: torch.from_numpy(noise(f"fisher/{name}/{key}", tuple(x.shape)) ** 2 + 0.01) for key, x in each.items()
        }
        for name, each in states.items()
    }
    found = mergetool.merge_state_dicts("fisher", states, statistics=information, floor=0.0, dtype="float64")
    hold("fisher", found)


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_ada_merging(place, tmp_path, per):
    settings = {"method": "ada-merging", "per": per, "steps": 8, "rate": 0.02, "batch": small.ROWS}
    hold(f"ada-merging-{per}", result(place, tmp_path, settings, base=str(place / "base")))


def test_activation_scale(place, tmp_path):
    """Biases and what is in the embeddings are as they were merged, or (norms) not the authors'."""
    asked = {"calibration": {"base": {"data": str(place / "base.jsonl")}}, "base": str(place / "base")}
    scale = {"then": [{"step": "activation-scale", "least": 0.4}]}
    found = result(place, tmp_path, {"method": "task-arithmetic", "weight": 0.5}, **asked, **scale)
    hold("activation-scale", found, [name for name in found if name.endswith("weight") and "embed" not in name])


def test_lm_cocktail(place, tmp_path):
    asked = {"calibration": {"data": str(place / "a.jsonl")}}
    asked |= {"models": {"start": str(place / "base"), **{name: str(place / name) for name in "ab"}}}
    found = result(place, tmp_path, {"method": "lm-cocktail", "temperature": 0.2}, **asked)
    states = [small.bert(name).state_dict() for name in ("base", "a", "b")]
    for name, value in found.items():
        parts = (weight * each[name] for weight, each in zip(EXPECTED["lm-cocktail"], states, strict=True))
        torch.testing.assert_close(value, sum(parts), rtol=1e-6, atol=1e-6)


def test_wudi_disturbs_no_task_more_than_300_steps_of_adam_do():
    base = tensors("llama", "base")
    names = sorted(name for name in base if "layers.0." in name and "_proj" in name)
    for name, theirs in zip(names, EXPECTED["wudi"], strict=True):
        deltas = [torch.from_numpy(tensors_of(model)[name] - base[name]).double() for model in "abcd"]
        found = least_disturbing([delta.clone() for delta in deltas], 0.0, normalize=True)
        ours = sum(float(((found - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)
        assert ours < 0.999 * theirs


def tensors_of(model, known={}):  # noqa: B006  (made once)
    return known.setdefault(model, tensors("llama", model))


def test_safemerge():
    states = {name: {key: torch.from_numpy(x).double() for key, x in tensors_of(name).items()} for name in "abc"}
    base = {key: torch.from_numpy(x).double() for key, x in tensors_of("base").items()}
    found = mergetool.merge_state_dicts("safemerge", states, base, threshold=small.COSINE, keep=0.8, dtype="float64")
    changed = {name: found[name] for name in found if "_proj" in name}
    assert 0 < sum(bool((x - states["a"][name]).abs().max() > 1e-9) for name, x in changed.items()) < len(changed)
    hold("safemerge", changed)


def alike(models):
    said = noise("zipit/shared", (60, 12)) @ noise("zipit/mix", (12, 8 * models))
    return np.corrcoef((said + noise("zipit/own", said.shape)).T)


def test_zipit_joins_what_its_authors_code_joins():
    theirs = EXPECTED["zipit"].astype(int)
    for models, alpha in ((2, 0.3), (2, 1.0), (3, 1.0)):
        now, theirs = theirs[: 8 * models], theirs[8 * models :]
        ours = zip_units(alike(models), np.repeat(np.arange(models), 8), 8, alpha, 1.0)
        assert (np.equal.outer(ours, ours) == np.equal.outer(now, now)).all()


def test_ot_fusion():
    """Its authors' networks have no biases; here a head without one could be an embedding, so there are zeros."""
    models = {name: small.mlp(name) for name in "ba"}
    zeros = {name.replace("weight", "bias"): torch.zeros(len(x)) for name, x in models["a"].items()}
    models = {name: {**state, **zeros} for name, state in models.items()}
    found = mergetool.merge_state_dicts("ot-fusion", models, architecture="mlp")
    hold("ot-fusion", found, [name for name in found if name.endswith("weight")])


def test_git_rebasin_by_activations(tmp_path):
    (tmp_path / "nets.py").write_text(BUILD.format(small.WIDTHS))
    save_file({"x": small.inputs()}, tmp_path / "x.safetensors")
    match = {"by": "activations", "data": f"{tmp_path}/x.safetensors", "network": f"{tmp_path}/nets.py:build"}
    models = {name: small.mlp(name) for name in "ab"}
    found = mergetool.merge_state_dicts(
        {"method": "git-rebasin", "match": match}, models, architecture="mlp", trust_code=True
    )
    hold("git-rebasin", found)


def test_the_penalty_is_that_of_lorahub():
    inner = {"method": "linear", "weight": {"search": [-1.5, 1.5]}}
    search = Merge3(inner=inner, tasks=({"name": "any"},), search={"penalty": 0.05})
    assert search.penalty((0.5, -1.5, 0.0, 0.25)) == pytest.approx(float(EXPECTED["lorahub"][0]))
