"""A chat template of a model, of the package, of a file; and all files that tell what ends a text follow it."""

import json
import shutil

import pytest
import transformers as hf

import mergetool
from mergetool.errors import PlanError
from mergetool.recipe.words import TEMPLATES
from tests.words.models import SPECIAL, build, opened, vocabulary

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
]
TEXT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a model that talks: with a token that ends a turn, a template, and other settings for generating."""
    folder = tmp_path_factory.mktemp("models")
    base = build(folder / "base", "llama", "stories", 1)
    chat = build(folder / "chat", "llama", "letters", 2, special=[*SPECIAL, "<|im_end|>"])
    end = vocabulary(chat)["<|im_end|>"]
    tokenizer = hf.AutoTokenizer.from_pretrained(chat)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEXT
    tokenizer.save_pretrained(chat)
    for path, change in ((chat, {"eos_token_id": [end, 2], "temperature": 0.3}), (base, {"eos_token_id": 2})):
        (path / "generation_config.json").write_text(json.dumps(change))
    return {"base": base, "chat": chat}


def run(models, tmp_path, **sections):
    recipe = {"models": {name: str(folder) for name, folder in models.items() if name != "base"}}
    recipe |= {"base": str(models["base"]), "merge": {"method": "task-arithmetic"}, **sections}
    return mergetool.run(recipe, output=tmp_path / "out")


def said(folder):
    return hf.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def end_of(folder):
    """What ends a text, as every file tells it."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return tokenizer.eos_token, generation, opened(folder).config.eos_token_id, tokenizer.eos_token_id


@pytest.mark.parametrize("source", ["union", "base", "chat"])
def test_the_template_of_a_model_brings_its_end_of_turn(models, tmp_path, source):
    tokens = {"tokens": {"<|im_end|>": "chat"}} if source == "base" else {}
    result = run(models, tmp_path, chat_template="chat", tokenizer={"source": source, **tokens}).path
    found = vocabulary(result)
    text, generation, config, own = end_of(result)
    assert (text, own) == ("<|im_end|>", found["<|im_end|>"])
    assert generation == [found["<|im_end|>"], found["</s>"]]
    assert config in (generation, found["</s>"])
    assert said(result) == said(models["chat"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_comes_with_the_package(models, tmp_path, name):
    sections = {"source": "union"} if name == "chatml" else {"source": "base"}
    result = run(models, tmp_path, chat_template=name, tokenizer=sections)
    expected = {
        "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nyes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "<s> [INST] hello [/INST] yes</s> [INST] so [/INST]",
        "alpaca": "### Instruction:\nhello\n\n### Response:\nyes</s>\n\n### Instruction:\nso\n\n### Response:\n",
        "exaone": "[|system|][|endofturn|]\n[|user|]hello\n[|assistant|]yes[|endofturn|]\n[|user|]so\n[|assistant|]",
    }[name]
    assert said(result.path) == expected
    warned = any("ends a turn with" in words for words in result.warnings)
    assert warned == (name in ("llama3", "exaone"))
    if name == "chatml":
        assert end_of(result.path)[0] == "<|im_end|>"
        assert end_of(result.path)[1] == vocabulary(result.path)["<|im_end|>"]


def test_a_token_that_ends_turns_is_added_as_advised(models, tmp_path):
    import yaml

    (words,) = [each for each in run(models, tmp_path, chat_template="llama3").warnings if "ends a turn" in each]
    advised = yaml.safe_load(words[words.index("tokenizer:") :])
    result = run(models, tmp_path / "again", chat_template="llama3", **advised)
    assert not [each for each in result.warnings if "ends a turn" in each]
    assert end_of(result.path)[0] == "<|eot_id|>"


def test_a_template_in_a_file_or_in_the_recipe(models, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEXT)
    for name, template in (("file", {"file": str(tmp_path / "mine.jinja")}), ("text", {"text": TEXT})):
        result = run(models, tmp_path / name, chat_template=template).path
        assert said(result) == "user: hello</s>assistant: yes</s>user: so</s>"
    with pytest.raises(PlanError, match="cannot be read"):
        run(models, tmp_path / "x", chat_template={"file": "none.jinja"})


def test_the_template_of_most_models(models, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(models["base"], second)
    (second / "chat_template.jinja").write_text("other")
    third = tmp_path / "third"
    shutil.copytree(models["chat"], third)
    result = run({**models, "second": second, "third": third}, tmp_path, chat_template="auto").path
    assert (result / "chat_template.jinja").read_text() == TEXT


@pytest.mark.parametrize("asked", ["base", "auto"])
def test_a_model_without_a_template(models, tmp_path, asked):
    with pytest.raises(PlanError) as caught:
        run({"base": models["base"], "a": models["base"]}, tmp_path, chat_template=asked)
    assert "chatml" in caught.value.fix


def test_a_template_in_the_tokenizers_settings_is_replaced_there_too(models, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models["base"], base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": several}))
    result = run({**models, "base": base}, tmp_path, chat_template="base").path
    assert (result / "chat_template.jinja").read_text() == "d"
    assert json.loads((result / "tokenizer_config.json").read_text())["chat_template"] == "d"
