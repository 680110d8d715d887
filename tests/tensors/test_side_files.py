"""Config, tokenizer and generation files: what travels with a merge, and what they then say."""

import json
import os

import pytest
import torch

import mergetool
from mergetool.errors import RecipeError, SourceError
from mergetool.tensors.side_files import carried_files, read_config
from tests.files import tensors, write_model, write_models

CARRIED = [
    "added_tokens.json",
    "chat_template.jinja",
    "configuration_own.py",
    "generation_config.json",
    "merges.txt",
    "modeling_own.py",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = ["README.md", "training_args.bin", "optimizer.pt", "model.safetensors.index.json.bak", ".env", "notes.txt"]


def test_tokenizer_and_generation_files_travel_and_others_stay(tmp_path):
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer_folder").mkdir()
    os.mkfifo(tmp_path / "tokenizer.pipe")
    assert [path.name for path in carried_files(tmp_path)] == CARRIED
    assert carried_files(None) == []


@pytest.fixture
def recipe(tmp_path):
    write_models(tmp_path, names=("a", "b"), dtype=torch.bfloat16)
    models = {name: str(tmp_path / name) for name in "ab"}
    return {"models": models, "merge": {"method": "linear"}, "output": {"path": str(tmp_path / "out")}}


def test_the_tokenizer_may_be_that_of_another_model(recipe, tmp_path):
    for name in "ab":
        (tmp_path / name / "tokenizer.json").write_text(f'"{name}"')
        (tmp_path / name / "generation_config.json").write_text(f'"{name}"')
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name}))
    out = mergetool.run(recipe | {"tokenizer": {"source": "b"}}).path
    assert (out / "tokenizer.json").read_text() == (out / "generation_config.json").read_text() == '"b"'
    assert read_config(out)["model_type"] == "a"


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        ({"torch_dtype": "float32"}, "source", {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, "source", {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, "source", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"torch_dtype": 3}, "float16", {"torch_dtype": "float16"}),
        ({"a": 1}, "float16", {"a": 1, "torch_dtype": "float16"}),
        (
            {"dtype": "x", "text_config": {"dtype": "x"}, "vision_config": {"torch_dtype": "x", "b": {"dtype": "x"}}},
            "float16",
            {
                "dtype": "float16",
                "text_config": {"dtype": "float16"},
                "vision_config": {"torch_dtype": "float16", "b": {"dtype": "float16"}},
            },
        ),
        (
            {"dtype": "x", "text_config": {"dtype": "float32"}},
            "source",
            {"dtype": "bfloat16", "text_config": {"dtype": "float32"}},
        ),
    ],
)
def test_the_dtype_of_the_config_is_that_of_the_weights_wherever_it_stands(recipe, tmp_path, config, stored, expected):
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    recipe["output"]["dtype"] = stored
    assert read_config(mergetool.run(recipe).path) == expected


def test_the_dtype_is_that_of_most_weights(tmp_path):
    state = tensors(0, dtype=torch.bfloat16) | {"few": torch.ones(2)}
    write_model(tmp_path / "a", state, {"torch_dtype": "float32"})
    recipe = {"models": {"a": str(tmp_path / "a")}, "merge": {"method": "linear"}}
    assert read_config(mergetool.run(recipe, output=tmp_path / "out").path) == {"torch_dtype": "bfloat16"}


def test_a_config_with_any_text_survives(recipe, tmp_path):
    config = {"torch_dtype": "bfloat16", "token": "☃", "odd": "\ud800", "nan": [1, None, {"x": True}]}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    assert read_config(mergetool.run(recipe).path) == config


def test_a_model_without_a_config_gets_none(recipe):
    out = mergetool.run(recipe).path
    assert read_config(out) == {}
    assert not (out / "config.json").exists()


def test_a_config_too_large_to_be_one_is_refused(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(20_000_001)
    with pytest.raises(SourceError, match="far too large"):
        read_config(tmp_path)


def test_a_current_folder_whose_name_is_no_unicode_works(tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"\xff\xfe")
    write_model(odd / "a", tensors(0), {"torch_dtype": "float32"})
    monkeypatch.chdir(odd)
    out = mergetool.run({"models": {"a": "a"}, "merge": {"method": "linear"}}, output="out").path
    lock = json.loads((out / "mergetool.json").read_text("utf-8"))
    assert lock["inputs"]["a"][0]["file"] == "a/model.safetensors"
    with pytest.raises(RecipeError, match="expected Unicode text"):
        mergetool.run({"models": {"a": str(odd / "a")}, "merge": {"method": "linear"}})
