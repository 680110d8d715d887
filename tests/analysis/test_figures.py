"""Every figure of an analysis, against a rewrite in float64 of real models."""

import math
from itertools import combinations

import pytest
import torch

import mergetool
from mergetool.kernels.spectral import concatenated, interference, truncated_svd
from tests.analysis.models import state

NAMES = ("tales", "code", "letters")


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])


def cosine(a, b):
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.fixture(scope="module")
def weights(family):
    return {name: state(family / name) for name in ("base", *NAMES)}


@pytest.fixture(scope="module")
def analysis(family):
    models = {name: str(family / name) for name in NAMES}
    recipe = {"base": str(family / "base"), "models": models, "merge": {"method": "task-arithmetic"}}
    return mergetool.analyze(recipe)


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def check_group(facts, by_model, pairs, weights, names):
    """All figures of some tensors."""
    base = flat(weights["base"], names)
    own = [flat(weights[name], names) for name in NAMES]
    changes = [each - base for each in own]
    signs = torch.stack(changes).sign()
    mass, total = sum(each.abs().sum() for each in changes), sum(changes)
    mean = (base + total / 3).float()
    lost = (mean.bfloat16().double() - mean.double()).norm() / (total / 3).norm()
    expected = {
        "parameters": len(base),
        "conflict": float(((signs > 0).any(0) & (signs < 0).any(0)).double().mean()),
        "conflict_by_chance": 0.75,
        "cancelled": float(1 - total.abs().sum() / mass),
        "cosine": sum(cosine(a, b) for a, b in combinations(changes, 2)) / 3,
        "kinship": sum(cosine(a, b) for a, b in combinations([base, *own], 2)) / 6,
        "error_bfloat16": float(lost),
    }
    assert {key: facts[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4)
    for row, name, change, whole in zip(by_model, NAMES, changes, own, strict=True):
        assert row["model"] == name
        told = {
            "norm": float(change.norm()),
            "relative": float(change.norm() / base.norm()),
            "max": float(change.abs().max()),
            "share_changed": float((change != 0).double().mean()),
            "kinship": cosine(base, whole),
            "share_of_sum": float(change @ total / (total @ total)),
        }
        assert {key: row[key] for key in told} == pytest.approx(told, rel=1e-4, abs=1e-5)
    for row, (i, j) in zip(pairs, combinations(range(3), 2), strict=True):
        both = (signs[i] != 0) & (signs[j] != 0)
        apart = (own[i] - own[j]).norm() / ((own[i].norm() + own[j].norm()) / 2)
        assert (row["a"], row["b"]) == (NAMES[i], NAMES[j])
        told = {
            "cosine": cosine(changes[i], changes[j]),
            "kinship": cosine(own[i], own[j]),
            "opposed": float((signs[i] != signs[j])[both].double().mean()),
            "distance": float(apart),
        }
        assert {key: row[key] for key in told} == pytest.approx(told, rel=1e-4, abs=1e-5)


def test_the_whole_and_its_models_and_pairs(analysis, weights):
    names = list(weights["base"])
    check_group(analysis.facts["whole"], analysis.rows("models"), analysis.rows("pairs"), weights, names)
    assert analysis.facts["whole"]["base_norm"] == pytest.approx(float(flat(weights["base"], names).norm()), rel=1e-5)
    assert analysis.facts["cost"]["sampled"] == 1.0


def test_layers(analysis, weights):
    rows = analysis.rows("layers")
    assert [(row["layer"], row["depth"], row["tensors"]) for row in rows] == [
        ("outside the layers", None, 3),
        *((f"model.layers.{depth}", depth, 9) for depth in range(3)),
    ]
    for row in rows[1:]:
        names = [name for name in weights["base"] if name.startswith(f"{row['layer']}.")]
        by_model, pairs = (
            [each for each in analysis.rows(section) if each["layer"] == row["layer"]]
            for section in ("layers_by_model", "pairs_by_layer")
        )
        check_group(row, by_model, pairs, weights, names)


def test_roles_cells_and_tensors(analysis, weights):
    role = "mlp.up_proj.weight"
    names = [f"model.layers.{depth}.{role}" for depth in range(3)]
    by_model, pairs = (
        [each for each in analysis.rows(section) if each["role"] == role]
        for section in ("roles_by_model", "pairs_by_role")
    )
    check_group(only(analysis.rows("roles"), role=role), by_model, pairs, weights, names)
    cell = only(analysis.rows("cells"), role=role, depth=1)
    tensor = only(analysis.rows("tensors"), tensor=names[1])
    own = [row for row in analysis.rows("tensors_by_model") if row["tensor"] == names[1]]
    assert (tensor["state"], tensor["shape"], tensor["dtypes"]) == ("changed", [96, 48], ["F32"])
    for facts in (cell, tensor):
        base = weights["base"][names[1]]
        signs = torch.stack([(weights[name][names[1]] - base).sign() for name in NAMES])
        conflict = float(((signs > 0).any(0) & (signs < 0).any(0)).double().mean())
        assert facts["conflict"] == pytest.approx(conflict, rel=1e-5)
    assert [row["model"] for row in own] == list(NAMES)
    assert own[0]["norm"] == pytest.approx(float((weights["tales"][names[1]] - base).norm()), rel=1e-5)


def test_redundancy(analysis, weights):
    names = list(weights["base"])
    change = flat(weights["code"], names) - flat(weights["base"], names)
    sizes = change.abs().sort(descending=True).values
    for row in analysis.rows("redundancy"):
        if row["model"] == "code":
            count = round(row["density"] * len(sizes))
            energy, mass = ((sizes[:count] ** power).sum() / (sizes**power).sum() for power in (2, 1))
            assert (row["energy"], row["mass"]) == pytest.approx((float(energy), float(mass)), rel=0.02, abs=0.01)


def test_spectra_interference_and_alignment(analysis, weights):
    name = "model.layers.1.self_attn.q_proj.weight"
    changes = [weights[model][name] - weights["base"][name] for model in NAMES]
    for row, change in zip([r for r in analysis.rows("spectra") if r["tensor"] == name], changes, strict=True):
        s = torch.linalg.svdvals(change)
        energy = s.square() / s.square().sum()
        edge = s[0] / (change.square().mean().sqrt() * 2 * math.sqrt(48))
        expected = {
            "effective_rank": float(1 / energy.square().sum()),
            "stable_rank": float(1 / energy[0]),
            "energy_1": float(energy[0]),
            "energy_4": float(energy[:4].sum()),
            "energy_16": float(energy[:16].sum()),
            "edge": float(edge),
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert row["leading"] == pytest.approx((s[:16] / s[0]).tolist(), rel=1e-3)
    factors = [truncated_svd(change, 16) for change in changes]
    row = only(analysis.rows("interference"), tensor=name)
    assert row["kept"] == 16
    assert row["interference"] == pytest.approx(interference(concatenated(factors)).normalised, rel=1e-3)
    for row in (row for row in analysis.rows("alignment") if row["tensor"] == name):
        a, b = (factors[NAMES.index(row[key])] for key in "ab")
        assert row["output"] == pytest.approx(float((a.u.mT @ b.u).square().sum() / 16), rel=1e-3)
        assert row["input"] == pytest.approx(float((a.v.mT @ b.v).square().sum() / 16), rel=1e-3)


def test_no_figure_depends_on_the_number_of_threads(family, recipe, analysis):
    facts = [dict(mergetool.analyze(recipe(), workers=count).facts) for count in (1, 3)]
    for each in facts:
        del each["cost"]
    assert facts[0] == facts[1] == {key: value for key, value in analysis.facts.items() if key != "cost"}


def test_without_a_base_models_are_compared_with_their_mean(recipe, weights):
    found = mergetool.analyze(recipe(base=None, method="linear"))
    names = list(weights["base"])
    own = {model: flat(weights[model], names) for model in NAMES}
    mean = sum(own.values()) / 3
    assert found.facts["compared_with"] == "mean"
    for row in found.rows("models"):
        assert row["norm"] == pytest.approx(float((own[row["model"]] - mean).norm()), rel=1e-5)
        assert row["share_of_sum"] is None
    for row in found.rows("pairs"):
        assert row["kinship"] == pytest.approx(cosine(own[row["a"]], own[row["b"]]), rel=1e-5)
    assert [each["kind"] for each in found.advice] == ["method"]
