"""Modules that the user's own code builds, without config.json: measured on tensors, against sums in float64."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool import MergetoolError
from mergetool.testing.toys import assert_near

NETS = """from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.first, self.norm, self.head = nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)

    def forward(self, x, place):
        return self.head(self.norm(self.first(x + self.table(place))).relu())

def build():
    return Net()

def half():
    return nn.Sequential(nn.Linear(6, 7))
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(x.shape, generator=generator) for name, x in network().state_dict().items()}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        x = torch.randn(30, 6, generator=generator)
        place = torch.randint(0, 5, (30,), generator=generator)
        save_file({"x": x, "place": place}, tmp_path / f"{name}.safetensors")
    return {
        "models": {name: str(tmp_path / name) for name in "ab"},
        "architecture": f"{tmp_path}/nets.py:build",
        "calibration": {name: {"data": str(tmp_path / f"{name}.safetensors"), "samples": 20} for name in "ab"},
        "merge": {"method": "regmean"},
    }


def network():
    space = {}
    exec(NETS, space)
    return space["build"]()


def naive(folder, name):
    """Mean outer products of what goes into each linear layer, one row after the other."""
    net, rows = network().double(), load_file(folder / f"{name}.safetensors")
    net.load_state_dict(load_file(folder / name / "model.safetensors"))
    first, head = torch.zeros(6, 6).double(), torch.zeros(7, 7).double()
    with torch.no_grad():
        for x, place in zip(rows["x"][:20].double(), rows["place"][:20], strict=True):
            inside = x + net.table.weight[place]
            first += inside.outer(inside) / 20
            y = net.norm(net.first(inside)).relu()
            head += y.outer(y) / 20
    return {"first.weight": first, "head.weight": head, "table.weight": torch.zeros(6, 6)}


def run(recipe, folder, **flags):
    return mergetool.run(recipe, output=folder / "out", cache=folder / "cache", trust_code=True, **flags).path


def test_a_plain_module_is_merged_by_what_goes_into_its_layers(recipe, tmp_path):
    merged = load_file(run(recipe, tmp_path) / "model.safetensors")
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in "ab"}
    grams = {name: naive(tmp_path, name) for name in "ab"}
    assert_near(merged, mergetool.merge_state_dicts("regmean", states, statistics=grams), 1e-4)
    (kept, _) = sorted((tmp_path / "cache" / "statistics").glob("*.safetensors"))
    found = load_file(kept)
    assert any(all(torch.allclose(found[n], x.float(), atol=1e-4) for n, x in g.items()) for g in grams.values())


def test_a_plan_runs_no_code_and_tells_what_will_be_measured(recipe, tmp_path):
    (tmp_path / "nets.py").write_text("1 / 0")
    assert {key for key in mergetool.plan(recipe).sources if "statistic" in key} == {"(statistic) a", "(statistic) b"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "nets.py:half"}, "the network has no tensor 'first.bias'"),
        ({"merge": {"method": "fisher"}}, "fisher does not look at the architecture"),
        ({"architecture": "mlp"}, "regmean does not look at the architecture"),
        ({"calibration": {"data": "rows.jsonl"}}, "cannot be read as data"),
        ({"calibration": {"data": "wrong.safetensors"}}, "cannot be run through the network"),
        ({"calibration": {"data": "nan.safetensors"}}, "holds values that are not finite"),
        ({"calibration": {"data": "a.safetensors", "length": 5}}, "length is for rows of text"),
    ],
)
def test_what_cannot_be_measured_is_told(recipe, tmp_path, change, said):
    (tmp_path / "rows.jsonl").write_text('{"text": [1]}\n')
    save_file({"y": torch.zeros(2, 6)}, tmp_path / "wrong.safetensors")
    save_file({"x": torch.full((2, 6), torch.nan)}, tmp_path / "nan.safetensors")
    for key, value in change.items():
        if key == "architecture" and ":" in value:
            change = {key: f"{tmp_path}/{value}"}
        if key == "calibration":
            change = {key: {**value, "data": f"{tmp_path}/{value['data']}"}}
    with pytest.raises(MergetoolError, match=said):
        run({**recipe, **change}, tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_code_a_way_is_told(recipe, tmp_path):
    del recipe["architecture"]
    with pytest.raises(MergetoolError, match=r"no config\.json") as told:
        run(recipe, tmp_path)
    assert "architecture: FILE.py:FUNCTION" in told.value.fix


def test_code_is_run_only_where_it_is_trusted(recipe, tmp_path):
    with pytest.raises(MergetoolError, match="would execute Python code"):
        mergetool.run(recipe, output=tmp_path / "out")
