"""Tensors that are looked at in slices, in part, and through sketches: figures against float64, and what that costs."""

import math

import pytest
import torch

import mergetool
from mergetool.analysis.figures import places
from tests.files import write_model

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (1200, 1500)


def low_rank(seed, size):
    """A change of which a few directions stand out."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(side, 12, generator=generator, dtype=torch.float64) for side in SHAPE)
    sizes = size * torch.arange(1, 13) ** -1.0
    return (u * sizes) @ v.mT + 0.02 * size * torch.randn(SHAPE, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A base and two models with one large matrix, as they are stored: in three dtypes."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    base = 0.1 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    made = {
        "base": base.float(),
        "a": (base + low_rank(1, 1e-3)).float(),
        "b": (base + low_rank(2, 2e-3)).bfloat16(),
    }
    for name, weight in made.items():
        write_model(folder / name, {NAME: weight, "model.layers.1.mlp.up_proj.weight": weight.clone()})
    return folder, {name: weight.double() for name, weight in made.items()}


@pytest.fixture(scope="module")
def analysis(states):
    folder, _ = states
    models = {name: str(folder / name) for name in "ab"}
    return mergetool.analyze({"base": str(folder / "base"), "models": models, "merge": {"method": "task-arithmetic"}})


def test_sums_are_of_all_entries_and_signs_of_a_part(analysis, states):
    weights = states[1]
    changes = [weights[name] - weights["base"] for name in "ab"]
    row = analysis.rows("tensors")[0]
    cosine = float(torch.cosine_similarity(*(each.flatten() for each in changes), dim=0))
    assert row["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert row["dtypes"] == ["F32", "BF16"]
    for told, change in zip(analysis.rows("tensors_by_model"), changes, strict=False):
        assert told["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert told["share_changed"] == pytest.approx(float((change != 0).double().mean()), rel=1e-6)
        assert told["max"] == pytest.approx(float(change.abs().max()), rel=1e-5)
    assert analysis.facts["cost"]["sampled"] == pytest.approx(1 / 16, abs=0.01)
    conflict = float((changes[0] * changes[1] < 0).double().mean())
    assert row["conflict"] == pytest.approx(conflict, abs=0.02)
    assert analysis.rows("pairs")[0]["opposed"] == pytest.approx(conflict, abs=0.02)
    cancelled = 1 - float(sum(changes).abs().sum() / sum(each.abs().sum() for each in changes))
    assert row["cancelled"] == pytest.approx(cancelled, abs=0.02)
    for told in (told for told in analysis.rows("redundancy") if told["density"] == 0.1):
        sizes = changes["ab".index(told["model"])].abs().flatten().sort(descending=True).values
        held = float(sizes[: len(sizes) // 10].square().sum() / sizes.square().sum())
        assert told["energy"] == pytest.approx(held, rel=0.06)


def test_spectra_come_from_sketches(analysis, states):
    weights = states[1]
    for told, name in zip(analysis.rows("spectra"), "ab", strict=False):
        s = torch.linalg.svdvals(weights[name] - weights["base"])
        energy = s.square() / s.square().sum()
        expected = {
            "effective_rank": float(1 / energy.square().sum()),
            "stable_rank": float(1 / energy[0]),
            "energy_4": float(energy[:4].sum()),
            "energy_16": float(energy[:16].sum()),
        }
        assert {key: told[key] for key in expected} == pytest.approx(expected, rel=0.01)
        assert told["leading"][:12] == pytest.approx((s[:12] / s[0]).tolist(), rel=0.01)


def test_a_part_of_a_large_tensor_counts_for_all_of_it(states, tmp_path):
    """Beside a tensor that is looked at everywhere, and in which the models agree."""
    weights = states[1]
    for place, (name, weight) in enumerate(weights.items()):
        write_model(tmp_path / name, {"large": weight.float(), "small": torch.full((500, 500), float(place))})
    models = {name: str(tmp_path / name) for name in "ab"}
    found = mergetool.analyze(
        {"base": str(tmp_path / "base"), "models": models, "merge": {"method": "task-arithmetic"}}
    )
    changes = [weights[name] - weights["base"] for name in "ab"]
    conflict = float((changes[0] * changes[1] < 0).double().sum()) / (math.prod(SHAPE) + 500**2)
    assert found.facts["whole"]["conflict"] == pytest.approx(conflict, abs=0.02)


def test_threads_make_no_difference_here_either(analysis, states):
    folder, _ = states
    models = {name: str(folder / name) for name in "ab"}
    recipe = {"base": str(folder / "base"), "models": models, "merge": {"method": "task-arithmetic"}}
    one = mergetool.analyze(recipe, workers=1)
    assert [one.rows(section) for section in one.sections] == [analysis.rows(section) for section in one.sections]


def test_every_file_is_read_once_and_matrices_twice(analysis):
    stored = 2 * math.prod(SHAPE) * (4 + 4 + 2)
    assert analysis.facts["cost"]["bytes_read"] == 2 * stored


def test_float64_is_not_rounded_away(tmp_path):
    weight = torch.ones(8, 8, dtype=torch.float64)
    write_model(tmp_path / "base", {"w": weight})
    write_model(tmp_path / "a", {"w": weight + 1e-12})
    recipe = {"base": str(tmp_path / "base"), "models": {"a": str(tmp_path / "a")}}
    found = mergetool.analyze(recipe | {"merge": {"method": "task-arithmetic"}})
    assert found.rows("models")[0]["norm"] == pytest.approx(8e-12, rel=1e-3)
    assert found.rows("tensors")[0]["state"] == "changed"


def test_layers_are_numbered_where_several_follow():
    names = ["model.0.layers.2.up", "model.0.layers.3.up", "model.0.embed", "head.1.w"]
    found = [(each.layer, each.depth, each.role) for each in places(names).values()]
    assert found == [
        ("model.0.layers.2", 0, "up"),
        ("model.0.layers.3", 1, "up"),
        ("outside the layers", None, "model.0.embed"),
        ("outside the layers", None, "head.1.w"),
    ]
