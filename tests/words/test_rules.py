"""Rows that the recipe names, new tokens, padding, and rows that nobody has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import PlanError, RecipeError
from tests.files import StoppedError, stop_after
from tests.words.models import SPECIAL, build, opened, save_tokenizer, train, vocabulary

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three Llamas: two vocabularies, and a third that has tokens of both."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "a": build(folder / "a", "llama", "stories", 1),
        "b": build(folder / "b", "llama", "letters", 2, size=320),
        "c": build(folder / "c", "llama", "letters", 3, size=310),
    }


def run(models, tmp_path, names="ab", method="linear", **sections):
    recipe = {"models": {name: str(models[name]) for name in names}, "merge": {"method": method}, **sections}
    return mergetool.run(recipe, output=tmp_path / "out").path


def rows(folder, name=HEAD):
    return load_file(folder / "model.safetensors")[name].double()


def alone(models, names="ab"):
    """A token that only the last model has, and its number there."""
    last = vocabulary(models[names[-1]])
    others = [vocabulary(models[name]) for name in names[:-1]]
    return next((token, last[token]) for token in sorted(last) if all(token not in other for other in others))


def test_a_row_that_one_model_has_is_that_row(models, tmp_path):
    token, number = alone(models)
    result = run(models, tmp_path, tokenizer={"source": "union"})
    assert torch.equal(rows(result)[vocabulary(result)[token]], rows(models["b"])[number])


def test_a_row_that_several_have_is_that_of_the_preferred_model(models, tmp_path):
    b, c = (vocabulary(models[name]) for name in "bc")
    token = next(token for token in sorted(b) if token in c and token not in vocabulary(models["a"]))
    result = run(models, tmp_path, "abc", tokenizer={"source": "union", "prefer": "c"})
    expected = (rows(models["b"])[b[token]] + 2 * rows(models["c"])[c[token]]) / 3
    assert torch.allclose(rows(result)[vocabulary(result)[token]], expected, atol=1e-7)
    with pytest.raises(RecipeError, match=r"tokenizer.prefer: there is no model 'd'"):
        run(models, tmp_path, "abc", tokenizer={"source": "union", "prefer": "d"})


def test_a_row_that_several_have_is_the_bases_or_else_their_mean(models, tmp_path):
    a, b, c = (vocabulary(models[name]) for name in "abc")
    token = next(token for token in sorted(b) if token in c and token not in a)
    mean = (rows(models["b"])[b[token]] + rows(models["c"])[c[token]]) / 2
    result = run(models, tmp_path, "abc", tokenizer={"source": "union"})
    assert torch.allclose(rows(result)[vocabulary(result)[token]], mean, atol=1e-7)
    based = {"models": {"a": str(models["a"]), "b": str(models["b"])}, "base": str(models["c"])}
    recipe = {**based, "merge": {"method": "task-arithmetic", "scale": 1.0}, "tokenizer": {"source": "union"}}
    result = mergetool.run(recipe, output=tmp_path / "based").path
    merged = rows(result)[vocabulary(result)[token]]
    assert torch.allclose(
        merged, rows(models["b"])[b[token]], atol=1e-6
    )  # a shows the base's row: no change of its own


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["model", "token", "id", "zero"])
def test_a_rule_names_the_row_of_a_token(models, tmp_path, kind, force):
    token, number = alone(models)
    row = {"model": {"from": "b"}, "token": {"from": "a", "token": "the"}, "id": {"from": "a", "id": 7}}
    rule = {**row, "zero": {"zero": True}}[kind] | ({"force": True} if force else {})
    own, other = rows(models["b"])[number], rows(models["a"])
    named = {"model": own, "token": other[vocabulary(models["a"])["the"]], "id": other[7], "zero": torch.zeros(16)}
    result = run(models, tmp_path, tokenizer={"source": "union", "tokens": {token: rule}})
    expected = named[kind] if force else (named[kind] + own) / 2
    assert torch.allclose(rows(result)[vocabulary(result)[token]], expected.double(), atol=1e-7)


@pytest.mark.parametrize("missing", ["mean", "zero", "nearest"])
def test_a_new_token_that_nobody_has(models, tmp_path, missing):
    known = sorted(vocabulary(models["a"]), key=len)[-2:]
    text = "".join(known)
    sections = {"source": "a", "tokens": {"<new>": {}, text: {}}, "missing": missing}
    result = run(models, tmp_path, "a", "passthrough", tokenizer=sections)
    own, found = rows(models["a"]), vocabulary(result)
    first, second = (own[vocabulary(models["a"])[token]] for token in known)
    expected = {"mean": own.mean(0), "zero": torch.zeros(16), "nearest": (first + second) / 2}[missing]
    assert torch.allclose(rows(result)[found[text]], expected.double(), atol=1e-7)
    assert len(rows(result)) == len(own) + 2
    tokenizer = hf.AutoTokenizer.from_pretrained(result)
    assert tokenizer("the<new>sea").input_ids[1] == found["<new>"]
    assert opened(result).config.vocab_size == len(own) + 2


@pytest.mark.parametrize(
    ("rule", "what"),
    [({"from": "a", "token": "<none>"}, "has no token '<none>'"), ({"from": "a", "id": 300}, "row 300 is wanted")],
)
def test_a_rule_for_a_row_that_is_not_there_is_refused(models, tmp_path, rule, what):
    with pytest.raises(PlanError, match=what):
        run(models, tmp_path, tokenizer={"source": "union", "tokens": {"<x>": rule}})


# -------------------------------------------------------------------- padding


def padded(folder, source, total, value=9.0):
    """The model with more rows than tokens, as some families have them."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name in (HEAD, EMBEDDINGS):
        more = torch.full((total - len(state[name]), 16), value)
        state[name] = torch.cat([state[name], more])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": total}))
    return folder


def test_padding_rows_stay_and_are_no_tokens(models, tmp_path):
    a = padded(tmp_path / "a", models["a"], 320)
    models = {"a": a, "b": models["b"]}
    assert len(rows(models["b"])) > 310
    result = run(models, tmp_path, tokenizer={"source": "a"})
    assert torch.equal(rows(result)[310:], rows(a)[310:])  # b has tokens of its own there, which are not these rows
    assert opened(result).config.vocab_size == 320


def test_new_tokens_take_the_place_of_padding(models, tmp_path):
    models = {"a": padded(tmp_path / "a", models["a"], 512), "b": models["b"]}
    result = run(models, tmp_path, tokenizer={"source": "union"})
    token, number = alone(models)
    assert len(rows(result)) == 512
    assert torch.equal(rows(result)[vocabulary(result)[token]], rows(models["b"])[number])
    assert torch.equal(rows(result)[-1], rows(models["a"])[-1])


@pytest.mark.parametrize(("multiple", "total"), [(64, 320), (1, 300), (7, 301)])
def test_rows_are_rounded_up_to_a_multiple_with_their_mean(models, tmp_path, multiple, total):
    models = {"a": padded(tmp_path / "a", models["a"], 512)}
    result = run(models, tmp_path, "a", "passthrough", tokenizer={"source": "a", "pad_to": multiple})
    assert len(rows(result)) == total
    assert torch.equal(rows(result)[:300], rows(models["a"])[:300])
    assert opened(result).config.vocab_size == total


def test_a_token_beyond_the_rows_has_no_row(models, tmp_path):
    b = tmp_path / "b"
    shutil.copytree(models["b"], b)
    made = train("bpe", "letters", 320)
    made.add_tokens(["<beyond>"])
    save_tokenizer(b, made)
    result = run({**models, "b": b}, tmp_path, tokenizer={"source": "union"})
    assert "<beyond>" not in vocabulary(result)
    with pytest.raises(PlanError, match="is wanted"):
        run({**models, "b": b}, tmp_path / "x", tokenizer={"source": "union", "tokens": {"<beyond>": "b"}})


# -------------------------------------------------------------------- beside others


def test_tied_and_untied_models(tmp_path):
    a = build(tmp_path / "a", "llama", "stories", 1, tie_word_embeddings=True)
    b = build(tmp_path / "b", "llama", "letters", 2)
    result = run({"a": a, "b": b}, tmp_path, tokenizer={"source": "union"})
    tied, own, found = vocabulary(a), vocabulary(b), vocabulary(result)
    for token in sorted(tied.keys() & own.keys()):
        expected = (rows(a, EMBEDDINGS)[tied[token]] + rows(b)[own[token]]) / 2
        assert torch.allclose(rows(result)[found[token]], expected, atol=1e-7)
    assert opened(result).config.tie_word_embeddings is False


def test_slices_and_vocabularies_compose(models, tmp_path):
    slices = [{"a": [0, 1]}, {"b": [0, 2]}]
    result = run(models, tmp_path, tokenizer={"source": "union"}, slices=slices, outside={"first": "a", "last": "b"})
    token, number = alone(models)
    own, found = vocabulary(models["a"]), vocabulary(result)
    assert torch.equal(rows(result)[found[token]], rows(models["b"])[number])
    only_a = next(token for token in own if token not in vocabulary(models["b"]))
    assert torch.equal(rows(result, EMBEDDINGS)[found[only_a]], rows(models["a"], EMBEDDINGS)[own[only_a]])
    assert torch.equal(rows(result)[found[only_a]], rows(models["a"])[own[only_a]])
    assert opened(result).config.num_hidden_layers == 3


def test_16_bit_rows_are_copied_to_the_bit(models, tmp_path):
    folders = {}
    for name in "ab":
        folders[name] = tmp_path / name
        shutil.copytree(models[name], folders[name])
        state = {key: value.bfloat16() for key, value in load_file(models[name] / "model.safetensors").items()}
        save_file(state, folders[name] / "model.safetensors", {"format": "pt"})
    use = [{"match": "*", "use": "b"}]
    recipe = {"method": "linear", "overrides": use}
    models_section = {name: str(folder) for name, folder in folders.items()}
    result = mergetool.run(
        {"models": models_section, "merge": recipe, "tokenizer": {"source": "union"}}, output=tmp_path / "out"
    ).path
    own, found = vocabulary(folders["b"]), vocabulary(result)
    numbers = torch.tensor([found[token] for token in own])
    state = load_file(result / "model.safetensors")[HEAD]
    assert state.dtype == torch.bfloat16
    assert torch.equal(
        state[numbers], load_file(folders["b"] / "model.safetensors")[HEAD][torch.tensor(list(own.values()))]
    )


def test_the_recipe_of_the_page_runs(models, tmp_path):
    document = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "vocabulary.yaml").read_text())
    second = build(tmp_path / "second", "llama", "letters", 2, special=[*SPECIAL, "<|im_start|>", "<|im_end|>"])
    document["models"] = {"first": str(models["a"]), "second": str(second)}
    result = mergetool.run(document, output=tmp_path / "out").path
    found, own = vocabulary(result), rows(result)
    assert len(own) % 64 == 0
    assert torch.allclose(own[found["<tool>"]], rows(models["a"])[1], atol=1e-7)
    assert not own[found["<spare>"]].any()
    tokenizer = hf.AutoTokenizer.from_pretrained(result)
    assert tokenizer.eos_token == "<|im_end|>"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n"
    opened(result)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_that_adds_tokens_brings_their_rows(models, tmp_path):
    """Training added a token to model and tokenizer, and saved both beside the adapter."""
    import peft

    model, tokenizer = hf.LlamaForCausalLM.from_pretrained(models["a"]), hf.AutoTokenizer.from_pretrained(models["a"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model.resize_token_embeddings(len(tokenizer))
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "r": 2}
    trained = peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=False))
    trained.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    row = trained.merge_and_unload().lm_head.weight[len(tokenizer) - 1].detach().double()
    chat = {"source": str(models["a"]), "adapters": [str(tmp_path / "lora")]}
    recipe = {"models": {"b": str(models["b"]), "chat": chat}, "merge": {"method": "linear"}}
    result = mergetool.run({**recipe, "tokenizer": {"source": "union"}}, output=tmp_path / "out").path
    assert torch.allclose(rows(result)[vocabulary(result)["<|im_end|>"]], row, atol=1e-6)
    assert hf.AutoTokenizer.from_pretrained(result).added_tokens_decoder[vocabulary(result)["<|im_end|>"]].special
    result = mergetool.run({**recipe, "tokenizer": {"source": "chat"}}, output=tmp_path / "own").path
    assert vocabulary(result) == tokenizer.get_vocab()
    opened(result)


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(models, tmp_path):
    recipe = {"models": {name: str(models[name]) for name in "ab"}, "merge": {"method": "linear"}}
    recipe["tokenizer"] = {"source": "union", "pad_to": 64, "tokens": {"<new>": {}}}
    expected = mergetool.run(recipe, output=tmp_path / "whole").path / "model.safetensors"
    with pytest.raises(StoppedError):
        mergetool.run(recipe, output=tmp_path / "out", workers=1, progress=stop_after(2))
    result = mergetool.run(recipe, output=tmp_path / "out")
    assert result.resumed
    assert (result.path / "model.safetensors").read_bytes() == expected.read_bytes()
