"""What a finished run says about its result: inputs that are one and the same, variances that are none, buffers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool.engine.run import Flags, run_recipe
from mergetool.errors import MergeError
from mergetool.recipe import load_recipe
from tests.files import Watch, tensors, write_model, write_models


def recipe_of(folder, base="base", **merge):
    models = {name: str(folder / name) for name in "ab"}
    return {"base": str(folder / base), "models": models, "merge": {"method": "task-arithmetic", **merge}}


def test_a_model_with_the_content_of_another_is_named_in_summary_lock_and_progress(tmp_path):
    write_models(tmp_path, names=("base", "a"))
    shutil.copytree(tmp_path / "base", tmp_path / "b")
    watch = Watch()
    result = run_recipe(load_recipe(recipe_of(tmp_path)), Flags(output=tmp_path / "out"), watch)
    word = "model 'b' holds the same as the base, byte for byte: its task vector is zero"
    assert result.warnings == (word,)
    assert json.loads((tmp_path / "out/mergetool.json").read_text())["warnings"] == [word]
    assert f"warning: {word}" in watch.said


def test_the_same_model_twice_is_named_and_others_are_not(tmp_path):
    write_models(tmp_path, names=("base", "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    result = mergetool.run(recipe_of(tmp_path), output=tmp_path / "out")
    assert result.warnings == ("model 'b' holds the same as model 'a', byte for byte: it counts twice",)
    write_model(tmp_path / "b", tensors(7))
    assert mergetool.run(recipe_of(tmp_path), output=tmp_path / "other").warnings == ()


def normalised(folder, variance):
    count = torch.tensor(int(100 * variance))
    return write_model(folder, {"bn.running_var": torch.full((4,), variance), "bn.num_batches_tracked": count})


def test_variances_below_zero_stop_a_run_and_the_advice_helps(tmp_path):
    for name, variance in (("base", 1.0), ("a", 0.5), ("b", 0.25)):
        normalised(tmp_path / name, variance)
    with pytest.raises(MergeError, match=r"a variance of -0.25") as caught:
        mergetool.run(recipe_of(tmp_path), output=tmp_path / "out")
    assert caught.value.where.endswith("bn.running_var")
    assert caught.value.fix == ("use a smaller scale, or copy them: overrides: [{match: '*running_var', use: MODEL}]")
    mergetool.run(recipe_of(tmp_path, scale=0.5), output=tmp_path / "smaller")
    copied = recipe_of(tmp_path, overrides=[{"match": "*running_var", "use": "base"}])
    written = load_file(mergetool.run(copied, output=tmp_path / "copied").path / "model.safetensors")
    assert written["bn.running_var"].eq(1.0).all()


def test_whole_numbers_that_differ_are_the_leaders_without_a_word(tmp_path):
    """Positions and counters are nothing to be merged, and nothing to be told."""
    for place, name in enumerate(("base", "a", "b")):
        ids = torch.arange(4) + place
        write_model(
            tmp_path / name,
            tensors(place) | {"position_ids": ids, "mask": ids > 1, "num_batches_tracked": torch.tensor(place)},
        )
    result = mergetool.run(recipe_of(tmp_path), output=tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert written["position_ids"].tolist() == [0, 1, 2, 3]
    assert written["mask"].tolist() == [False, False, True, True]
    assert written["num_batches_tracked"] == 0
    assert result.warnings == ()
