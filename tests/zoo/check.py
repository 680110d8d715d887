"""Is a result what the merge should be? Opened by transformers, keys, values, logits and config compared."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.build import config_of
from tests.zoo.oracle import TOLERANCE, Rule, State, expected_logits, logits, opened


def assert_merged(
    folder: Path,
    model: type,
    base: State | None,
    models: Sequence[State],
    rule: Rule,
    inputs: Mapping[str, torch.Tensor],
    *,
    beside: str = "$^",
) -> nn.Module:
    """The result opens as `model` with every key in place (but names that match `beside`), and is the merge."""
    module, info = opened(folder, model)
    unexpected = [name for name in info["unexpected_keys"] if not re.search(beside, name)]
    assert not unexpected, f"transformers does not know {unexpected}"
    assert not info["missing_keys"], f"transformers misses {info['missing_keys']}"
    assert not info["mismatched_keys"], f"shapes differ: {info['mismatched_keys']}"
    _assert_same_tensors(module, rule(base, models))
    expected = expected_logits(base, models, rule, inputs, module)
    torch.testing.assert_close(logits(module, inputs), expected, rtol=0, atol=TOLERANCE)
    assert_config_is_true(folder, module)
    return module


def _assert_same_tensors(module: nn.Module, expected: State) -> None:
    """Parts that these inputs do not reach are compared, too."""
    for name, value in module.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_config_is_true(folder: Path, module: nn.Module) -> None:
    """config.json names the class, the vocabulary, and whether head and embeddings are one."""
    config = config_of(folder)
    assert type(module).__name__ in config["architectures"]
    try:
        embeddings, head = module.get_input_embeddings(), module.get_output_embeddings()
    except NotImplementedError:  # several parts, each with its own (CLIP)
        return
    if isinstance(embeddings, nn.Embedding):
        assert module.config.get_text_config().vocab_size == embeddings.num_embeddings
    if head is not None and embeddings is not None and module.config.model_type != "t5":  # there it means a scale
        tied = torch.equal(head.weight, embeddings.weight)
        assert _says_tied(module.config) == tied, f"config.json says tied: {not tied}"


def _says_tied(config: Any) -> bool:
    return bool(config.tie_word_embeddings)
