"""Bundles are compared by what their experts add, in how many directions, and by heads and router."""

from dataclasses import replace

import pytest
import torch

import mergetool
from mergetool.bundle.build import build
from mergetool.bundle.expert import open_expert
from mergetool.bundle.store import FactorStore
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of
from tests.bundle.tiny import OPTIONS, FileExperts, make_bundle
from tests.files import tensors, write_model


def again(folder, name, *, tasks="abc", **changes):
    """Another bundle of the same experts."""
    paths = {each: folder / "models" / each for each in ("base", *tasks)}
    (folder / name).mkdir()
    build(FileExperts(paths), folder / name, FactorStore(folder / "store"), replace(OPTIONS, **changes))
    return folder / name


def read(source, name):
    values = torch.empty(source.specs[name].shape)
    source.read_bytes(name, 0, bytes_of(values.reshape(-1)))
    return values.double()


def test_changes_are_compared_whatever_factors_they_are_kept_in(tmp_path):
    bundle = make_bundle(tmp_path, "llama")
    other = again(tmp_path, "other", rank=2)
    found = mergetool.diff(bundle, other)
    base = open_model(tmp_path / "models" / "base")
    experts = [open_expert(path, "b") for path in (bundle, other)]
    mine = {row["tensor"].removeprefix("b: "): row for row in found.rows if row["tensor"].startswith("b: ")}
    assert set(mine) == set(base.specs)
    for name, row in mine.items():
        one, two = (read(expert, name) - read(base, name) for expert in experts)
        assert row["relative"] == pytest.approx(float((two - one).norm() / one.norm()), abs=1e-5), name
        assert row["cosine"] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-5)
    ranks = [each for each in found.files if each.key.startswith("ranks.b.")]
    assert {each.b for each in ranks} == {2}
    assert all(each.a > 2 for each in ranks)
    assert [each.key for each in found.files if not each.key.startswith("ranks.")] == []
    assert (found.identical, found.remarks) == (False, ())


def test_the_same_experts_make_the_same_bundle(tmp_path):
    bundle = make_bundle(tmp_path, "llama")
    found = mergetool.diff(bundle, again(tmp_path, "other"), workers=2)
    assert found.identical
    assert {row["state"] for row in found.rows} == {"identical"}
    narrow = mergetool.diff(bundle, again(tmp_path, "narrow", dtype="bfloat16"))
    assert 0 < narrow.total.relative < 2**-7
    assert [(each.key, each.a, each.b) for each in narrow.files] == [("dtype", "float32", "bfloat16")]


def test_an_expert_that_left_a_tensor_alone_adds_nothing_there(tmp_path):
    shapes = {"model.layers.0.mlp.weight": (32, 32), "model.layers.1.mlp.weight": (32, 32)}
    base = tensors(0, shapes)
    write_model(tmp_path / "base", base)
    for seed, name in enumerate("ab", 1):
        own = {key: value + 0.1 * tensors(seed, shapes)[key] for key, value in base.items()}
        write_model(
            tmp_path / name,
            own | ({"model.layers.1.mlp.weight": base["model.layers.1.mlp.weight"]} if name == "b" else {}),
        )
    recipe = {"base": str(tmp_path / "base"), "models": {name: str(tmp_path / name) for name in "ab"}}
    paths = [
        mergetool.run({**recipe, "merge": {"method": "tsv-compress", "rank": rank}}, output=tmp_path / f"r{rank}").path
        for rank in (4, 2)
    ]
    states = {row["tensor"]: row["state"] for row in mergetool.diff(*paths).rows}
    assert states.pop("b: model.layers.1.mlp.weight") == "identical"
    assert set(states.values()) == {"changed"}


def test_tasks_heads_router_and_base_are_told(tmp_path):
    bundle = make_bundle(tmp_path, "bert")  # with heads
    router = replace(OPTIONS.router, top_k=2)
    told = {each.key: (each.a, each.b) for each in mergetool.diff(bundle, again(tmp_path, "o", router=router)).files}
    assert told["router.top_k"] == (3, 2)
    assert told["tasks.a.head.num_classes"] == (3, None)
    fewer = mergetool.diff(bundle, again(tmp_path, "fewer", tasks="ab"))
    assert {row["tensor"].partition(":")[0] for row in fewer.rows} == {"a", "b"}
    assert any(each.key == "tasks.c.experts" and each.b is None for each in fewer.files)
    (tmp_path / "base2").mkdir()
    elsewhere = make_bundle(tmp_path / "base2", "bert", tasks="ab", heads=False)
    assert mergetool.diff(bundle, elsewhere).remarks == ()
    model = make_bundle(tmp_path / "gpt", "gpt2", tasks="ab") if (tmp_path / "gpt").mkdir() is None else None
    found = mergetool.diff(again(tmp_path, "ab", tasks="ab"), model)
    assert found.remarks == ("they are made for two bases",)
    assert not found.identical


def test_a_damaged_bundle_is_refused_with_its_file(tmp_path):
    bundle = make_bundle(tmp_path, "llama")
    other = again(tmp_path, "other")
    file = other / "factors" / "b.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(mergetool.SourceError, match="cannot be read") as caught:
        mergetool.diff(bundle, other)
    assert str(file) in caught.value.where
