"""`verify` holds config.json against tensors and tokenizer; `--load` opens a result with transformers."""

import json

import pytest
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mergetool.cli.app import app
from mergetool.errors import SourceError
from mergetool.outputs.opening import open_and_run
from mergetool.outputs.verify import verify_output

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "eos_token_id": 2,
}


@pytest.fixture
def llama(tmp_path):
    """A Llama as transformers saves it."""
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_transformers_saved_is_right_and_runs(llama):
    told = CliRunner().invoke(app, ["verify", str(llama), "--load"])
    assert told.exit_code == 0, told.exception
    assert "opens as LlamaForCausalLM and runs" in " ".join(told.stdout.split())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL | {"num_labels": 3})),
        (
            transformers.ViTForImageClassification,
            transformers.ViTConfig(
                **{key: SMALL[key] for key in list(SMALL)[:4]}, image_size=32, patch_size=16, num_labels=3
            ),
        ),
        (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64),
        ),
    ],
)
def test_models_of_other_kinds_run(tmp_path, kind, config):
    kind(config).save_pretrained(tmp_path / "model")
    verify_output(tmp_path / "model")
    assert open_and_run(tmp_path / "model") == f"opens as {kind.__name__} and runs"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 65}, "has 64 rows, vocab_size is 65"),
        ({"num_hidden_layers": 3}, "there are 2 layers under model.layers, config.json counts"),
        ({"eos_token_id": 64}, "eos_token_id is 64, the embeddings have 64 rows"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is another matrix"),
    ],
)
def test_a_config_that_speaks_of_other_tensors_is_refused(llama, changes, told):
    change_config(llama, **changes)
    with pytest.raises(SourceError, match=told):
        verify_output(llama)


def test_missing_keys_are_refused_by_load(llama):
    state = load_file(llama / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"missing keys in LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        open_and_run(llama)


def test_infinities_that_were_let_through_excuse_no_other_value(llama):
    name = "model.norm.weight"
    state = load_file(llama / "model.safetensors")
    lock = {"output": {"files": {}}, "notes": {name: ["holds infinite values, as all that it was made from"]}}
    (llama / "mergetool.json").write_text(json.dumps(lock))
    state[name][0] = float("-inf")
    save_file(state, llama / "model.safetensors", {"format": "pt"})
    verify_output(llama)
    state[name][0] = float("nan")
    save_file(state, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=f"not finite: {name}"):
        verify_output(llama)
