"""Config, tokenizer and generation files: what travels with a merge, and what they then say."""

import json
import os

import pytest
import torch

import mergetool
from mergetool.checkpoints.side_files import model_files, side_files, tokenizer_files
from mergetool.errors import PlanError, RecipeError, SourceError
from mergetool.outputs.verify import verify_output
from mergetool.tensors.side_files import read_config
from tests.files import tensors, write_model, write_models

CARRIED = [
    "LICENSE",
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
    assert side_files(tmp_path) == CARRIED
    assert side_files(None) == []


def test_code_travels_with_all_that_it_imports(tmp_path):
    """What `auto_map` names, wherever it stands, what that imports in turn; not code of other repositories, or none."""
    files = {
        "config.json": '{"text_config": {"auto_map": {"AutoModel": "net.Net", "AutoConfig": "o/n--theirs.Config"}}}',
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": [null, "words.Fast"]}}',
        "net.py": "from .parts.rotary import (\n    turn,\n)\nfrom . import shared\nimport torch",
        "parts/rotary.py": "from ..deep import x",
        "parts/__init__.py": "",
        "deep.py": "",
        "shared.py": "from .shared import itself",
        "words.py": "from .. import outside",
        "theirs.py": "",
        "train.py": "from .net import Net",
    }
    (tmp_path / "parts").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert tokenizer_files(tmp_path) == ["tokenizer_config.json", "words.py"]
    assert model_files(tmp_path) == ["deep.py", "net.py", "parts/rotary.py", "shared.py"]


def test_a_module_outside_of_its_folder_is_refused(tmp_path):
    (tmp_path / "modules.json").write_text('[{"path": "../../home"}]')
    with pytest.raises(SourceError, match=r"'../../home', which is not in this folder"):
        side_files(tmp_path)


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


def lay(folder, **files):
    """Files by name, `__` for a dot and `___` for a slash."""
    for name, text in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_sentence_models_own_weights_are_copied_and_parents_that_differ_there_are_named(recipe, tmp_path):
    modules = json.dumps([{"path": ""}, {"path": "2_Dense"}])
    for name in "ab":
        lay(tmp_path / name, modules__json=modules, config__json="{}", tokenizer__json="{}")
        lay(tmp_path / name, **{"2_Dense___config__json": "{}", "2_Dense___model__safetensors": name})
        lay(tmp_path / name, **{"2_Dense___optimizer__pt": name})
    result = mergetool.run(recipe)
    assert "2_Dense/model.safetensors of model 'a' and model 'b' differ" in result.warnings[0]
    assert sorted(path.name for path in (result.path / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]
    assert (result.path / "2_Dense/model.safetensors").read_text() == "a"
    assert verify_output(result.path)["files_checked"] == 6
    (result.path / "2_Dense/model.safetensors").write_text("b")
    with pytest.raises(SourceError, match="SHA-256"):
        verify_output(result.path)


def test_what_the_first_model_lacks_comes_from_the_next_that_has_it_with_a_word(recipe, tmp_path):
    lay(tmp_path / "b", tokenizer__model="b", generation_config__json='"b"', config__json='{"x": 1}', NOTICE="b")
    result = mergetool.run(recipe)
    assert read_config(result.path) == {"x": 1, "torch_dtype": "bfloat16"}
    assert (result.path / "tokenizer.model").read_text() == (result.path / "NOTICE").read_text() == "b"
    assert result.warnings == (
        "model 'a' has no config.json: the result has that of model 'b'",
        "model 'a' has no tokenizer: the result has that of model 'b'",
    )


def test_a_tokenizer_of_none_is_refused_and_the_advice_helps(recipe, tmp_path):
    lay(tmp_path / "a", tokenizer__json='"a"', chat_template__jinja="a", generation_config__json="{}")
    with pytest.raises(PlanError, match="model 'b' has no tokenizer") as caught:
        mergetool.run(recipe | {"tokenizer": {"source": "b"}})
    assert caught.value.fix == "write tokenizer: {source: a}, or leave it out"
    assert (mergetool.run(recipe | {"tokenizer": {"source": "a"}}).path / "tokenizer.json").is_file()


def test_files_of_two_tokenizers_are_not_mixed(recipe, tmp_path):
    lay(tmp_path / "a", tokenizer__json='"a"', chat_template__jinja="a", generation_config__json="{}")
    lay(tmp_path / "b", tokenizer__model="b", additional_chat_templates___tool__jinja="b")
    result = mergetool.run(recipe | {"tokenizer": {"source": "b"}})
    assert {path.name for path in result.path.iterdir()} >= {"tokenizer.model", "additional_chat_templates"}
    assert not {path.name for path in result.path.iterdir()} & {"tokenizer.json", "chat_template.jinja"}
    assert result.warnings == (
        "model 'b', whose tokenizer it is, has no generation_config.json: the result has none either",
    )


def test_modules_and_processors_that_the_leader_lacks_are_named(recipe, tmp_path):
    lay(tmp_path / "a", config__json="{}")
    lay(tmp_path / "b", modules__json="[]", preprocessor_config__json="{}")
    result = mergetool.run(recipe)
    assert [word.partition(" has ")[2].partition(",")[0] for word in result.warnings] == [
        "sentence-transformers' modules (modules.json)",
        "a processor (preprocessor_config.json)",
    ]
