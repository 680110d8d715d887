"""The plan of a bundle: which files will be written, how large they get at most, what is kept of every tensor."""

import json

import pytest

import mergetool
from mergetool.planning.cost import estimate
from mergetool.planning.report import describe
from tests.files import write_models

SHAPES = {"model.layers.0.a.weight": (12, 8), "model.layers.1.a.weight": (12, 8), "norm": (9,)}


def written(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("method", "exact"),
    [
        ({"method": "tsv-compress", "rank": 2, "size": 9.0}, True),
        ({"method": "tsv-compress"}, False),
        ({"method": "mass", "rank": {"energy": 0.5}}, False),
        ({"method": "mass", "router": {"features": "merged"}}, False),
    ],
)
def test_the_files_of_a_bundle_are_those_that_were_planned(tmp_path, method, exact):
    write_models(tmp_path, shapes=SHAPES)
    recipe = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "ab"},
        "merge": method,
    }
    plan = mergetool.plan(recipe)
    result = mergetool.run(recipe, output=tmp_path / "out")
    found = written(result.path)
    planned = {file.name: file for file in plan.files}
    assert planned.keys() <= found.keys()
    assert all(not name.endswith(".safetensors") or name in planned for name in found)
    for name, file in planned.items():
        assert found[name] == file.size if exact or not file.at_most else found[name] <= file.size
    large = sum(size for name, size in found.items() if name in planned)
    assert large <= plan.bytes_out
    told = describe(plan, estimate(plan, workers=1, memory=None))
    assert [step["method"] for step in told["steps"]].count("in full") == 2  # `norm` of both experts
    assert json.loads(json.dumps(told))["bytes_out"] == plan.bytes_out
