"""Experts that changed nearly the same are named, and what each expert costs is told."""

import shlex
import shutil

import pytest
import torch
import transformers

import mergetool
from mergetool.bundle.alike import alike, cosines
from mergetool.bundle.manifest import read_manifest
from mergetool.bundle.verify import facts_about_bundle
from mergetool.errors import SourceError
from mergetool.testing.classifiers import save_experts, tiny_config
from tests.cli.conftest import call  # noqa: F401  (a fixture)

KIND = transformers.BertForSequenceClassification
COMMANDS = (["inspect"], ["bundle", "list"], ["bundle", "list", "--json"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three experts, and `near`: a with a tenth of its change as noise."""
    folder = tmp_path_factory.mktemp("experts")
    paths = save_experts(folder, KIND, tiny_config(KIND), transformers.BertModel, tasks="abc")
    base = transformers.BertModel.from_pretrained(paths["base"]).state_dict()
    expert = KIND.from_pretrained(paths["a"])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in expert.bert.named_parameters():
            if name in base:
                value.add_(0.1 * (value - base[name]).std(correction=0) * torch.randn_like(value))
    expert.save_pretrained(folder / "near")
    return {**paths, "near": folder / "near"}


def make(paths, names, folder, method="mass", **settings):
    models = {name: str(paths[name]) for name in names}
    recipe = {"base": str(paths["base"]), "models": models, "merge": {"method": method, **settings}}
    return mergetool.run(recipe, output=folder)


@pytest.fixture(scope="module")
def made(paths, tmp_path_factory):
    return make(paths, ("a", "b", "near", "c"), tmp_path_factory.mktemp("alike") / "out")


def test_the_cosine_is_that_of_all_changes_together(paths, tmp_path):
    exact = {"rank": 1.0, "factors": "float32", "size": 100.0}
    folder = make(paths, ("a", "b", "near"), tmp_path / "out", "tsv-compress", **exact).path
    manifest = read_manifest(folder)
    weights = {
        name: {
            key.removeprefix("bert."): value for key, value in KIND.from_pretrained(paths[name]).state_dict().items()
        }
        for name in manifest.names
    }
    base = transformers.BertModel.from_pretrained(paths["base"]).state_dict()
    changes = [
        torch.cat([(weights[task][name] - base[name]).double().flatten() for name in manifest.parameters])
        for task in manifest.names
    ]
    unit = torch.stack([change / change.norm() for change in changes])
    torch.testing.assert_close(cosines(folder, manifest), unit @ unit.mT, rtol=0, atol=1e-5)


def test_a_bundle_with_a_near_copy_says_so(made):
    [pair] = alike(made.path, read_manifest(made.path))
    assert (pair.one, pair.other) == ("a", "near")
    assert 0.9 < pair.cosine < 1
    [note] = [note for note in made.notes if "changed nearly the same" in note]
    assert note.startswith("`a` and `near` changed nearly the same (cosine 0.9")


@pytest.mark.parametrize("method", ["twin", "emr"])
def test_bundles_of_other_kinds_say_it_too(paths, tmp_path, call, method):  # noqa: F811
    result = make(paths, ("a", "b", "near"), tmp_path / "out", method)
    assert [note.split(" changed")[0] for note in result.notes if "nearly the same" in note] == ["`a` and `near`"]
    code, _, said = call("inspect", result.path)
    assert code == 0
    assert "leave one out: run its recipe again without it" in said


def test_experts_that_differ_are_not_named(paths, tmp_path):
    result = make(paths, "abc", tmp_path / "out")
    assert not any("nearly the same" in note for note in result.notes)
    assert facts_about_bundle(result.path)["alike"] == []


def test_the_command_that_is_named_takes_the_copy_out(made, tmp_path, call):  # noqa: F811
    place = shutil.copytree(made.path, tmp_path / "with spaces")
    says = [call(*command, place) for command in COMMANDS]
    [line] = {line for code, _, said in says for line in said.splitlines() if code == 0 and "nearly" in line}
    assert all(line in said for _, _, said in says)
    assert call(*shlex.split(line.split("leave one out: mergetool ")[1]))[0] == 0
    assert read_manifest(place).names == ("a", "b", "c")
    assert not any("nearly" in call(*command, place)[2] for command in COMMANDS)


def test_what_each_expert_costs_is_told(made, call):  # noqa: F811
    manifest = read_manifest(made.path)
    for place, task in enumerate(facts_about_bundle(made.path)["tasks"]):
        ranks = [parameter.ranks[place] for parameter in manifest.parameters.values() if parameter.ranks]
        assert (task["rank"], task["directions"]) == (max(ranks), sum(ranks))
        assert task["bytes"] == (made.path / manifest.tasks[place].factors).stat().st_size
        beside = (made.path / manifest.tasks[place].head.file).parent
        assert task["head_bytes"] == sum(path.stat().st_size for path in beside.iterdir())
    _, told, _ = call("inspect", made.path)
    assert "head bytes" in told
    assert "directions" in told


def test_a_damaged_file_is_named(paths, tmp_path):
    folder = make(paths, "ab", tmp_path / "out").path
    (folder / "factors/b.safetensors").write_bytes(b"nothing")
    with pytest.raises(SourceError, match=r"factors/b\.safetensors: cannot be read"):
        facts_about_bundle(folder)
