"""Gram matrices of inputs, against what transformers shows of its hidden states, and their sharing."""

import pytest
import torch
import transformers
from safetensors import safe_open

import mergetool
from mergetool import MergeError
from mergetool.statistics import examples as batching
from mergetool.statistics.gram import InputSums
from tests.statistics.networks import TEXTS, inputs_of, opened, write_classifier, write_dense, write_rows
from tests.zoo.text import save_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gram")
    write_classifier(folder / "bert")
    write_dense(folder / "llama")
    write_dense(folder / "tied", tie_word_embeddings=True)
    write_rows(folder / "rows.jsonl")
    return folder


def mean_of_products(rows):
    return rows.T @ rows / len(rows)


def states(folder, kind, which):
    """Hidden states of all tokens, each text by itself."""
    model = opened(folder, kind)
    with torch.no_grad():
        every = [model(**example, output_hidden_states=True) for example in inputs_of(folder)]
    return torch.cat([which(model, each) for each in every])


def test_it_is_the_mean_over_tokens_of_what_goes_into_a_layer(place, tmp_path):
    found = mergetool.measure(place / "bert", "gram", place / "rows.jsonl", cache=tmp_path)
    kind = "AutoModelForSequenceClassification"
    for layer in (0, 1):
        rows = states(place / "bert", kind, lambda _, each, layer=layer: each.hidden_states[layer][0])
        gram = found[f"bert.encoder.layer.{layer}.attention.self.query.weight"]
        assert torch.allclose(gram, mean_of_products(rows), rtol=1e-4, atol=1e-5)
    pooled = states(place / "bert", kind, lambda model, each: model.bert.pooler(each.hidden_states[-1]))
    assert torch.allclose(found["classifier.weight"], mean_of_products(pooled), rtol=1e-4, atol=1e-5)
    assert found["bert.encoder.layer.0.output.dense.weight"].shape == (24, 24)


def test_it_is_of_linear_layers_and_of_nothing_else(place, tmp_path):
    found = mergetool.measure(place / "bert", "gram", place / "rows.jsonl", cache=tmp_path)
    linear = (name for name, module in opened(place / "bert").named_modules() if isinstance(module, torch.nn.Linear))
    assert found.keys() == {f"{name}.weight" for name in linear}


def test_layers_that_read_the_same_tensor_share_one(place, tmp_path):
    found = mergetool.measure(place / "llama", "gram", place / "rows.jsonl", cache=tmp_path)
    (path,) = (tmp_path / "statistics").iterdir()
    with safe_open(path, "pt") as file:
        kept = set(file.keys())
    shared = {"self_attn.q_proj": ("k_proj", "v_proj"), "mlp.gate_proj": ("up_proj",)}
    for layer in range(3):
        for first, others in shared.items():
            name = f"model.layers.{layer}.{first}.weight"
            for other in others:
                twin = f"{name.rpartition('.')[0].rpartition('.')[0]}.{other}.weight"
                assert found[twin].equal(found[name])
                assert (name in kept, twin in kept) == (True, False)
    assert "lm_head.weight" in kept


def test_a_head_that_is_the_embeddings_has_none(place, tmp_path):
    found = mergetool.measure(place / "tied", "gram", place / "rows.jsonl", cache=tmp_path)
    assert "model.embed_tokens.weight" not in found
    assert "lm_head.weight" not in found
    assert len(found) == 3 * 7


def test_how_rows_are_put_together_does_not_matter(place, tmp_path, monkeypatch):
    """Blocks equal the whole, and no row is padded."""
    rows = write_rows(tmp_path / "rows.jsonl", [*TEXTS, *reversed(TEXTS), "w9 w8 w7", "w30 w31"])
    together = mergetool.measure(place / "llama", "gram", rows, cache=tmp_path / "together")
    monkeypatch.setattr(batching, "BATCH_TOKENS", 1)
    apart = mergetool.measure(place / "llama", "gram", rows, cache=tmp_path / "apart")
    for name, value in together.items():
        assert torch.allclose(value, apart[name], rtol=1e-4, atol=1e-4), name


def test_weights_that_are_stored_turned_are_measured_by_their_inputs(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, n_inner=24)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    rows = write_rows(tmp_path / "rows.jsonl")
    found = mergetool.measure(tmp_path / "gpt2", "gram", rows, cache=tmp_path)
    shapes = {name.split(".")[-3] + "." + name.split(".")[-2]: tuple(value.shape) for name, value in found.items()}
    expected = {"attn.c_attn": 16, "attn.c_proj": 16, "mlp.c_fc": 16, "mlp.c_proj": 24}
    assert shapes == {name: (width, width) for name, width in expected.items()}
    (path,) = (tmp_path / "statistics").iterdir()
    with safe_open(path, "pt") as file:
        assert all(name in file.metadata()["turned"] for name in found)


def test_inputs_that_are_not_finite_stop_at_the_row(place, tmp_path):
    model = opened(write_classifier(tmp_path / "model"))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4 + 13] = float("inf")  # w13, in the fifth row
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MergeError, match=r"query.weight is not finite at .*rows\.jsonl:5"):
        mergetool.measure(tmp_path / "model", "gram", place / "rows.jsonl", cache=tmp_path)
    assert not (tmp_path / "statistics").exists()


def test_squares_that_are_too_large_for_the_dtype_are_told():
    sums, layer = InputSums("model 'a'"), torch.nn.Linear(3, 2)
    with sums.watching({"fc.weight": layer}):
        layer(torch.full((2, 3), 1e30))
    with pytest.raises(MergeError, match=r"squares of what goes into fc\.weight are too large"):
        sums.found({"fc.weight": layer}, torch.float32)
