"""Whatever a network is called and whatever its tensors are: a model is the same with its tokens in another order.

Merged with itself in that order, each model must come out as it is. Which tensors have a row for every token,
transformers knows here: input and output embeddings of the module, and what is added to its logits.
"""

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from tests.turns import some
from tests.zoo.build import build, copy_side_files
from tests.zoo.families import FAMILIES, VOCAB
from tests.zoo.oracle import opened
from tests.zoo.text import save_tokenizer, token_list

KEPT = 8
"""Numbers that stay: of special tokens, and of images in those that see."""
WORDS = [name for name, family in FAMILIES.items() if family.text]


def in_another_order(module, order):
    """Permute the rows of tokens of a module, each tensor once however often it is named."""
    reads = module.text_model if hasattr(module, "text_model") else module
    parts = [reads.get_input_embeddings(), module.get_output_embeddings()]
    tensors = [part.weight for part in parts if part is not None]
    tensors += [part.bias for part in parts if getattr(part, "bias", None) is not None]
    tensors += [value for name, value in module.named_buffers() if name == "final_logits_bias"]
    done = set()
    with torch.no_grad():
        for tensor in tensors:
            if tensor.data_ptr() not in done:
                done.add(tensor.data_ptr())
                axis = tensor.shape.index(VOCAB)
                tensor.copy_(tensor.index_select(axis, order))


@pytest.mark.parametrize("family", some(WORDS))
def test_a_model_and_itself_with_its_tokens_in_another_order(tmp_path, family):
    kind = FAMILIES[family]
    first = build(tmp_path / "first", family, 1)
    module, _ = opened(first, kind.model)
    order = torch.cat(
        [torch.arange(KEPT), KEPT + torch.randperm(VOCAB - KEPT, generator=torch.Generator().manual_seed(1))]
    )
    in_another_order(module, order)
    second = tmp_path / "second"
    module.float().save_pretrained(second)
    copy_side_files(first, second)
    save_tokenizer(second, [token_list()[number] for number in order])
    recipe = {"models": {"first": str(first), "second": str(second)}, "merge": {"method": "linear"}}
    result = mergetool.run(recipe, output=tmp_path / "out").path
    before, after = (load_file(folder / "model.safetensors") for folder in (first, result))
    assert before.keys() == after.keys()
    other = load_file(second / "model.safetensors")
    assert any(not torch.equal(other[name], before[name]) for name in before if name in other)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)
