"""Adapters merged by themselves, held against PEFT's `add_weighted_adapter`.

PEFT merges products in `svd`, `cat` and the kinds that end in `_svd`: there both agree. Its `linear` (here
`factor-sum`), `ties`, `dare_*` and `magnitude_prune` merge the factors one by one, which is no merge of what the
adapters do. Where PEFT is silently wrong, the truth is the dense sum in float64.
"""

import pytest
import torch
import transformers as hf
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

import mergetool
from tests.checkpoints.adapters.peft_oracle import quiet
from tests.files import LONG, write_recipe
from tests.outputs.test_merged_adapters import ALL, BERT, NETWORKS, llama, merged_by_peft, recipes, start, three, train
from tests.turns import pairs

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.2}
SAME = {"r": 3, "lora_alpha": 5}


def weighted_by_peft(folder, again, kind, weights=WEIGHTS, **settings):
    """The model with the adapters that PEFT merges as the active one."""
    with quiet():
        first, *others = weights
        model = PeftModel.from_pretrained(again(), folder / first, adapter_name=first)
        for name in others:
            model.load_adapter(folder / name, adapter_name=name)
        model.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type=kind, **settings)
        model.set_adapter("merged")
    return model


def changes(model, adapter):
    """What one adapter of a model adds to every layer."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    with torch.no_grad():
        return {name: layer.get_delta_weight(adapter) for name, layer in layers.items() if adapter in layer.r}


def ours(folder, again):
    """What our adapter adds to every layer."""
    with quiet():
        return changes(PeftModel.from_pretrained(again(), folder / "out"), "default")


def state(model):
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def truth(folder, again, weights=WEIGHTS):
    """The base and the weighted sum of what every adapter by itself makes of it, in float64, by name in memory."""
    base = state(again())
    total = {name: tensor.clone() for name, tensor in base.items()}
    for name, weight in weights.items():
        made = {key: tensor.double() for key, tensor in merged_by_peft(again, folder / name).items()}
        for key in total:
            total[key] += weight * (made[key] - base[key])
    return total


def differs(one, two):
    """The largest difference of any tensor of two states."""
    return max(float((one[name].double() - two[name]).abs().max()) for name in two)


def merge_on_base(folder, weights=WEIGHTS, rank=None, **output):
    """Our adapter of the same sum where the base's values are needed."""
    data = {
        "base": "base",
        "models": {name: {"adapter": name} for name in weights},
        "merge": {"method": "task-arithmetic", "weight": dict(weights)},
        "output": {"path": "out", "kind": "adapter", **({"rank": rank} if rank else {}), **output},
    }
    mergetool.run(write_recipe(folder / "based.yaml", **data))


# ---------------------------------------------------------------------- where both agree


KINDS = {
    "factors": ("linear", {}, "factor-sum", {"weight": WEIGHTS}),
    "stacked": ("cat", {}, "task-arithmetic", {"weight": WEIGHTS}),
    "svd": ("svd", {"svd_rank": 9}, "task-arithmetic", {"weight": WEIGHTS}),
    "svd, cut": ("svd", {"svd_rank": 4}, "task-arithmetic", {"weight": WEIGHTS, "rank": 4}),
    "ties": ("ties_svd", {"svd_rank": 32, "density": 0.4}, "ties", {"density": 0.4, "scale": 0.5, "rank": "exact"}),
    "ties, cut": ("ties_svd", {"svd_rank": 4, "density": 0.4}, "ties", {"density": 0.4, "scale": 0.5, "rank": 4}),
    "magnitudes": (
        "magnitude_prune_svd",
        {"svd_rank": 32, "density": 0.4},
        "breadcrumbs",
        {"density": 0.4, "gamma": 0.0, "weight": WEIGHTS, "rank": "exact"},
    ),
    "dare": (
        "dare_linear_svd",
        {"svd_rank": 32, "density": 1.0},
        "dare-linear",
        {"density": 1.0, "weight": WEIGHTS, "rank": "exact"},
    ),
    "dare-ties": (
        "dare_ties_svd",
        {"svd_rank": 32, "density": 1.0},
        "dare-ties",
        {"density": 1.0, "normalize": True, "scale": 0.5, "rank": "exact"},
    ),
}
"""PEFT's kind and settings, and our method and settings."""


@pytest.mark.parametrize(("case", "network"), pairs(KINDS, ["llama", "gpt2", "words"]))
def test_kinds_that_merge_products_are_ours(tmp_path, case, network):
    kind, settings, method, own = KINDS[case]
    make, targets = NETWORKS[network]
    if network == "llama":  # PEFT's SVD fails where a rank is above one side
        targets = {"target_modules": ["q_proj", "down_proj"]}
    again = three(tmp_path, make, same=SAME, **targets)
    alone, _ = recipes(tmp_path, method, **own)
    mergetool.run(alone)
    # PEFT's votes have no weights and its mean divides by the number of voters: one weight for all is our scale
    weights = WEIGHTS if "weight" in own else dict.fromkeys("abc", 0.5)
    theirs = changes(weighted_by_peft(tmp_path, again, kind, weights, **settings), "merged")
    made = ours(tmp_path, again)
    assert made.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(made[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_ranks_and_alphas_may_differ_by_module(tmp_path):
    again = start(tmp_path, llama)
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 11}}
    train(tmp_path, "a", again(), 1, target_modules=ALL, r=2, lora_alpha=3, **patterns)
    train(tmp_path, "b", again(), 2, target_modules=ALL, r=4, lora_alpha=16)
    weights = {"a": 0.7, "b": -0.4}
    alone, _ = recipes(tmp_path, "task-arithmetic", names="ab", weight=weights)
    mergetool.run(alone)
    theirs = changes(weighted_by_peft(tmp_path, again, "cat", weights), "merged")
    made = ours(tmp_path, again)
    for name in theirs:
        torch.testing.assert_close(made[name], theirs[name], rtol=0, atol=1e-5, msg=name)


# ---------------------------------------------------------------------- where they do not


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_kinds_that_merge_factors_are_no_merge_of_what_adapters_do(tmp_path, kind):
    again = three(tmp_path, llama, same=SAME, target_modules=ALL)
    alone, _ = recipes(tmp_path, "task-arithmetic", weight=WEIGHTS)
    mergetool.run(alone)
    dense = truth(tmp_path, again)
    density = {} if kind == "linear" else {"density": 1.0}
    theirs = weighted_by_peft(tmp_path, again, kind, **density).merge_and_unload().state_dict()
    assert differs(theirs, dense) > 0.01
    assert differs(merged_by_peft(again, tmp_path / "out"), dense) < 1e-5


@pytest.mark.parametrize("kind", ["cat", "svd"] if LONG else ["cat"])
@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"use_rslora": True}, None),
        ({"lora_bias": True}, None),
        ({"use_dora": True}, "exact"),
    ],
)
def test_what_peft_loses_in_silence_is_kept(tmp_path, kind, settings, rank):
    again = three(tmp_path, NETWORKS["gpt2"][0], same=SAME, target_modules=["c_attn", "c_fc"], **settings)
    merge_on_base(tmp_path, rank=rank)
    dense = truth(tmp_path, again)
    more = {"svd_rank": 9} if kind == "svd" else {}
    theirs = weighted_by_peft(tmp_path, again, kind, **more)
    assert differs(theirs.merge_and_unload().state_dict(), dense) > 0.001
    assert differs(merged_by_peft(again, tmp_path / "out"), dense) < 1e-5


def test_biases_are_merged_where_peft_has_one_adapter_with_biases_at_most(tmp_path):
    again = three(tmp_path, NETWORKS["gpt2"][0], same=SAME, target_modules=["c_attn", "c_fc"], bias="all")
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        weighted_by_peft(tmp_path, again, "cat")
    merge_on_base(tmp_path)
    assert differs(merged_by_peft(again, tmp_path / "out"), truth(tmp_path, again)) < 1e-5


def test_rslora_needs_no_base(tmp_path):
    again = three(tmp_path, llama, same={**SAME, "use_rslora": True}, target_modules=ALL)
    alone, _ = recipes(tmp_path, "task-arithmetic", weight=WEIGHTS)
    mergetool.run(alone)
    assert differs(merged_by_peft(again, tmp_path / "out"), truth(tmp_path, again)) < 1e-5


def test_layers_that_only_the_second_adapter_has_are_kept(tmp_path):
    again = start(tmp_path, llama)
    train(tmp_path, "a", again(), 1, target_modules=ALL, r=2, layers_to_transform=[0])
    train(tmp_path, "b", again(), 2, target_modules=ALL, r=2)
    weights = {"a": 0.7, "b": -0.4}
    alone, _ = recipes(tmp_path, "task-arithmetic", names="ab", weight=weights)
    mergetool.run(alone)
    dense = truth(tmp_path, again, weights)
    theirs = weighted_by_peft(tmp_path, again, "cat", weights).merge_and_unload().state_dict()
    assert differs(theirs, dense) > 0.001
    assert differs(merged_by_peft(again, tmp_path / "out"), dense) < 1e-5


def test_modules_in_full_of_one_adapter_are_kept_and_of_several_merged(tmp_path):
    again = start(tmp_path, llama)
    for seed, name in enumerate("abc"):
        saved = {} if name == "c" else {"modules_to_save": ["lm_head"]}
        train(tmp_path, name, again(), seed, target_modules=ALL, r=2, **saved)
    with pytest.raises(ValueError, match="modules_to_save"):
        weighted_by_peft(tmp_path, again, "cat")
    merge_on_base(tmp_path)
    assert differs(merged_by_peft(again, tmp_path / "out"), truth(tmp_path, again)) < 1e-5

    weights = {"a": 0.7, "c": -0.4}
    theirs = weighted_by_peft(tmp_path, again, "cat", weights)
    own = next(each for each in theirs.modules() if isinstance(each, ModulesToSaveWrapper)).modules_to_save["merged"]
    assert torch.equal(own.weight, again().lm_head.weight)  # PEFT gives the base's
    merge_on_base(tmp_path, weights, path="out2")
    assert differs(merged_by_peft(again, tmp_path / "out2"), truth(tmp_path, again, weights)) < 1e-5


# ---------------------------------------------------------------------- what comes out of the models


def checkpoint_of(folder, method, **merge):
    """The checkpoint of the same merge of base and adapters."""
    _, whole = recipes(folder, method, **merge)
    mergetool.run(whole)
    return folder / "whole"


@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_generation_with_the_adapter_is_the_checkpoints(tmp_path, network):
    make, targets = NETWORKS[network]
    again = three(tmp_path, make, **targets)
    alone, _ = recipes(tmp_path, "task-arithmetic", weight=WEIGHTS)
    mergetool.run(alone)
    whole = type(again()).from_pretrained(checkpoint_of(tmp_path, "task-arithmetic", weight=WEIGHTS)).eval()
    with quiet():
        adapted = PeftModel.from_pretrained(again(), tmp_path / "out").eval()
    words = torch.tensor([[2, 17, 40], [5, 9, 33]])
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = whole.generate(input_ids=words, **asked)
    assert torch.equal(adapted.generate(input_ids=words, **asked), said)
    assert not torch.equal(again().generate(input_ids=words, **asked), said)
    with torch.no_grad():
        torch.testing.assert_close(adapted(said).logits, whole(said).logits, rtol=0, atol=1e-4)


def test_logits_of_an_encoder_are_the_checkpoints(tmp_path):
    again = three(tmp_path, lambda: hf.BertForMaskedLM(BERT), target_modules=["query", "dense"])
    alone, _ = recipes(tmp_path, "task-arithmetic", weight=WEIGHTS)
    mergetool.run(alone)
    whole = hf.BertForMaskedLM.from_pretrained(checkpoint_of(tmp_path, "task-arithmetic", weight=WEIGHTS)).eval()
    with quiet():
        adapted = PeftModel.from_pretrained(again(), tmp_path / "out").eval()
    words = torch.tensor([[2, 17, 40], [5, 9, 33]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(words).logits, whole(words).logits, rtol=0, atol=1e-4)
