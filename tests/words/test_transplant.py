"""A model gets another's tokenizer, and rows for tokens that it never had."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.checkpoints.notation import in_notation_of
from mergetool.errors import RecipeError
from tests.words.models import SPECIAL, build, opened, vocabulary

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def transplant(tmp_path, model, donor, missing="omp", **flags):
    recipe = {"models": {"model": str(model)}, "merge": {"method": "passthrough"}}
    tokenizer = {"source": str(donor), "missing": missing}
    return mergetool.run({**recipe, "tokenizer": tokenizer}, output=tmp_path / "out", **flags).path


def moved(folder, ends, seed):
    """A donor in the same space, turned: what tokens have to do with each other is the same."""
    state = load_file(folder / "model.safetensors")
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)))[0]
    for name in ends:
        state[name] = state[name] @ turn
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_are_found_again_where_the_donor_is_the_model_in_other_coordinates(tmp_path, family):
    model = build(tmp_path / "model", family, "stories", 1, size=310)
    donor = build(tmp_path / "donor", family, "stories", 1, size=310)
    matrices = [name for name in (EMBEDDINGS, HEAD) if name in load_file(model / "model.safetensors")]
    moved(donor, matrices, 5)
    own = vocabulary(model)
    lost = sorted(token for token in own if token.startswith("Ġ"))[:4]
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {f"@{n}" if t in lost else t: n for t, n in content["model"]["vocab"].items()}
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if not {"".join(pair), *pair} & set(lost)]
    (model / "tokenizer.json").write_text(json.dumps(content))
    result = transplant(tmp_path, model, donor)
    assert vocabulary(result) == vocabulary(donor)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, result))
    for name in matrices:
        assert torch.allclose(before[name], after[name], atol=1e-5)
    opened(result)


def test_a_donor_of_another_architecture_and_kind_of_tokenizer(tmp_path):
    """GPT-2's names and byte-level notation, tied, with one special token for all, to SentencePiece's notation."""
    model = build(tmp_path / "model", "gemma3", "letters", 1, size=60)
    donor = build(tmp_path / "donor", "gpt2", "stories", 2, special=["<|end|>"])
    tokenizer = hf.AutoTokenizer.from_pretrained(donor)
    tokenizer.eos_token = tokenizer.bos_token = "<|end|>"
    tokenizer.save_pretrained(donor)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5}))
    own, theirs = vocabulary(model), vocabulary(donor)
    result = transplant(tmp_path, model, donor)
    assert vocabulary(result) == theirs
    before, after = (load_file(folder / "model.safetensors")[EMBEDDINGS] for folder in (model, result))
    shared = [token for token in own if token.replace("▁", "Ġ") in theirs]
    assert any(token.startswith("▁") for token in shared)
    for token in shared:
        assert torch.equal(after[theirs[token.replace("▁", "Ġ")]], before[own[token]])
    config = opened(result).config
    assert (config.eos_token_id, config.vocab_size) == (theirs["<|end|>"], len(theirs))
    assert json.loads((result / "generation_config.json").read_text())["eos_token_id"] == theirs["<|end|>"]
    assert torch.isfinite(after).all()


def test_special_tokens_are_matched_by_their_roles(tmp_path):
    for name, end in (("ours", "</s>"), ("theirs", "<|end|>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
    ours, theirs = {0: "</s>", 1: "▁the", 2: "sea"}, {0: "Ġthe", 5: "<|end|>"}
    found = in_notation_of(ours, tmp_path / "ours", theirs, tmp_path / "theirs")
    assert found == {0: "<|end|>", 1: "Ġthe", 2: "sea"}


def test_a_tokenizer_that_is_alone_in_its_folder(tmp_path):
    model = build(tmp_path / "model", "llama", "stories", 1)
    other = build(tmp_path / "other", "llama", "letters", 2, special=[*SPECIAL, "<new>"])
    (other / "model.safetensors").unlink()
    result = transplant(tmp_path, model, other, "mean")
    rows = load_file(model / "model.safetensors")[HEAD].double()
    found = load_file(result / "model.safetensors")[HEAD].double()
    assert torch.allclose(found[vocabulary(result)["<new>"]], rows.mean(0), atol=1e-6)
    opened(result)


def test_workers_and_the_order_of_work_do_not_change_a_bit(tmp_path):
    model = build(tmp_path / "model", "llama", "stories", 1)
    donor = build(tmp_path / "donor", "llama", "letters", 2, size=400)
    files = [transplant(tmp_path / str(n), model, donor, workers=n) / "model.safetensors" for n in (1, 3)]
    assert files[0].read_bytes() == files[1].read_bytes()
    lock = json.loads((files[0].parent / "mergetool.json").read_text())
    assert lock["inputs"]["tokenizer.source model.safetensors"][0]["sha256"]
    assert lock["vocabulary"][HEAD]["model"]["made of shared tokens"] > 20


@pytest.mark.parametrize("source", ["union", "model"])
def test_rows_of_a_donor_need_a_donor(tmp_path, source):
    recipe = {"models": {"model": "./m"}, "merge": {"method": "passthrough"}}
    with pytest.raises(RecipeError, match="rows from those of another model") as caught:
        mergetool.load_recipe({**recipe, "tokenizer": {"source": source, "missing": "omp"}})
    assert "missing: mean" in caught.value.fix
