"""Embeddings and heads of models whose tokenizers differ are merged row by row, by the text of tokens."""

import pytest
import torch
import transformers as hf

import mergetool
from tests.words.models import FAMILIES, PROMPT, build, logits, opened, vocabulary

VOCABULARY_TENSORS = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    "transformer.wte.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
}


def merged(tmp_path, recipe):
    return mergetool.run(recipe, output=tmp_path / "out").path


def expected(folders, wanted, default):
    """The mean of all tensors in float64, and of the rows of each token; `default` is what a model lacks."""
    states = [opened(folder).state_dict() for folder in folders]
    owned = [vocabulary(folder) for folder in folders]
    result = {}
    for name in states[0]:
        if name not in VOCABULARY_TENSORS:
            result[name] = sum(state[name] for state in states) / len(states)
            continue
        rows = torch.zeros(max(wanted.values()) + 1, *states[0][name].shape[1:], dtype=torch.float64)
        for token, number in wanted.items():
            own = [state[name][ids[token]] if token in ids else None for state, ids in zip(states, owned, strict=True)]
            shown = default([each for each in own if each is not None], rows[number])
            rows[number] = sum(shown if each is None else each for each in own) / len(own)
        result[name] = rows
    return result


def only_owner_or_mean(rows, zeros):
    return sum(rows) / len(rows) if rows else zeros


def assert_like(folder, state, tolerance=2e-6):
    """The result opens, computes what the expected weights compute, and its tokenizer encodes."""
    result = opened(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    assert len(ids[0]) > 3
    reference = type(result)(result.config).double().eval()
    reference.load_state_dict(state)
    assert torch.allclose(logits(result, ids), logits(reference, ids), atol=tolerance, rtol=0)
    assert result.config.vocab_size >= len(tokenizer)


@pytest.mark.parametrize("source", ["union", "second", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_of_two_vocabularies_is_the_merge_by_token(tmp_path, family, source):
    size = 300 if FAMILIES[family][3] == "bpe" else 60
    first = build(tmp_path / "a", family, "stories", 1, size=size)
    second = build(tmp_path / "b", family, "letters", 2, size=size + (20 if source else 0))
    recipe = {"models": {"first": str(first), "second": str(second)}, "merge": {"method": "linear"}}
    ours, theirs = vocabulary(first), vocabulary(second)
    assert {token for token in ours if token in theirs and ours[token] != theirs[token]}
    wanted = theirs if source == "second" else ours
    result = merged(tmp_path, recipe | ({"tokenizer": {"source": source}} if source else {}))
    found = vocabulary(result)
    if source == "union":
        assert found.keys() == ours.keys() | theirs.keys()
        assert {token: found[token] for token in ours} == ours
    else:
        assert found == wanted
    assert_like(result, expected([first, second], found, only_owner_or_mean))
