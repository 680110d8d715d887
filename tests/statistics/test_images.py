"""Models of images are measured on files of pixels."""

import json

import numpy as np
import pytest
import torch
import transformers

import mergetool
from mergetool import PlanError, SourceError
from tests.files import content

COUNT = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3, initializer_range=0.5)
        transformers.ViTForImageClassification(config).save_pretrained(folder / name)
    for number, values in enumerate(pixels()):
        np.save(folder / f"{number}.npy", values)
    return folder


def pixels():
    return np.random.default_rng(0).normal(size=(COUNT, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def rows(place):
    return written(place, *({"image": f"{number}.npy", "label": number % 3} for number in range(COUNT)))


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_what_goes_into_a_layer_is_what_images_make(place, rows, tmp_path):
    found = mergetool.measure(place / "a", "gram", rows, field="image", cache=tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(place / "a").eval()
    with torch.no_grad():
        states = model(torch.from_numpy(pixels()), output_hidden_states=True).hidden_states
        inputs = model.vit.layers[1].layernorm_before(states[1]).reshape(-1, 16)
    name = next(name for name in found if ".1.attention" in name and "quer" in name)
    assert torch.allclose(found[name], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("statistic", "more"), [("gram", {}), ("fisher", {"labels": "given"})])
def test_layer_by_layer_is_the_same(place, rows, statistic, more, tmp_path):
    for folder, memory in (("a", {}), ("b", {"memory": 1})):
        mergetool.measure(place / "a", statistic, rows, field="image", cache=tmp_path / folder, **memory, **more)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_run_merges_models_of_images_by_what_it_measured(place, rows, tmp_path):
    recipe = {
        "models": {name: str(place / name) for name in "ab"},
        "calibration": {"data": str(rows), "field": "image"},
        "merge": {"method": "regmean"},
    }
    result = mergetool.run(recipe, output=tmp_path / "out", cache=tmp_path / "cache")
    transformers.ViTForImageClassification.from_pretrained(result.path)


def test_other_pixels_are_measured_anew(place, rows, tmp_path):
    mergetool.measure(place / "a", "gram", rows, field="image", cache=tmp_path)
    np.save(place / "4.npy", pixels()[4] + 1)
    mergetool.measure(place / "a", "gram", rows, field="image", cache=tmp_path)
    np.save(place / "4.npy", pixels()[4])
    mergetool.measure(place / "a", "gram", rows, field="image", cache=tmp_path)
    assert len(list((tmp_path / "statistics").iterdir())) == 2


@pytest.mark.parametrize(
    ("values", "told", "fix"),
    [
        (np.zeros((3, 16, 8)), "its image is 3 x 16 x 8, and the model takes 3 x 16 x 16", "numpy.save"),
        (np.full((3, 16, 16), np.nan), "values that are not finite", "anew"),
        (np.array(["a"]), "holds no numbers", "numpy.save"),
        (b"no array", "is no array of numpy", "numpy.save"),
        (None, "cannot be read: No such file", "check the path"),
    ],
)
def test_a_wrong_image_is_named_by_its_row(place, tmp_path, values, told, fix):
    if isinstance(values, bytes):
        (tmp_path / "wrong.npy").write_bytes(values)
    elif values is not None:
        np.save(tmp_path / "wrong.npy", values)
    path = written(tmp_path, {"image": str(place / "0.npy")}, {"image": "wrong.npy"})
    with pytest.raises(SourceError, match=told) as error:
        mergetool.measure(place / "a", "gram", path, field="image", cache=tmp_path)
    assert error.value.where == f"{path}:2"
    assert fix in error.value.fix


def test_texts_are_no_images(place, tmp_path):
    with pytest.raises(SourceError, match="names no image"):
        mergetool.measure(place / "a", "gram", written(tmp_path, {"text": [1, 2]}), cache=tmp_path)
    with pytest.raises(PlanError, match="length cuts texts"):
        mergetool.measure(place / "a", "gram", written(tmp_path, {"text": "x"}), length=4, cache=tmp_path)
