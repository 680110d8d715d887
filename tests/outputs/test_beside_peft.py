"""Sums of adapters beside PEFT's `add_weighted_adapter`: the same where it is right, else the dense truth."""

import pytest
import transformers as hf
from peft import PeftModel

import mergetool
from tests.checkpoints.adapters.peft_oracle import quiet
from tests.files import write_recipe
from tests.outputs.test_merged_adapters import BERT, NETWORKS, llama, merged_by_peft, start, train

WEIGHTS = {"a": 0.5, "b": -0.25, "c": 1.0}
ALPHAS = {"a": 6, "b": 8, "c": 5}


def bert():
    return hf.BertForMaskedLM(BERT)


RIGHT = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens"]}),
    "other layers": NETWORKS["other layers"],
}
WRONG = {
    "stabilised": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "biases of B": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "magnitudes": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
}
NOT_THERE = {
    "biases": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "heads": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": NETWORKS["experts"],
}


def three(folder, make, settings):
    again = start(folder, make)
    for seed, (name, alpha) in enumerate(ALPHAS.items()):
        train(folder, name, again(), seed, r=4, lora_alpha=alpha, **settings)
    return again


def truth(folder, again):
    """The base, and what every adapter by itself adds to it."""
    base = again().state_dict()
    merged = {name: merged_by_peft(again, folder / name) for name in WEIGHTS}
    return {
        key: start + sum(weight * (merged[name][key] - start) for name, weight in WEIGHTS.items())
        for key, start in base.items()
    }


def summed_by_peft(folder, again, kind="cat", **more):
    with quiet():
        model = PeftModel.from_pretrained(again(), folder / "a", adapter_name="a")
        for name in "bc":
            model.load_adapter(folder / name, adapter_name=name)
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=kind, **more)
        model.set_adapter("sum")
        return model.merge_and_unload().state_dict()


def summed(folder, again):
    models = {name: {"adapter": name} for name in WEIGHTS}
    merge = {"method": "task-arithmetic", "weight": WEIGHTS}
    output = {"path": "out", "kind": "adapter", "rank": "exact"}
    based = {"base": "base"} if (folder / "base" / "config.json").is_file() else {}
    mergetool.run(write_recipe(folder / "sum.yaml", models=models, merge=merge, output=output, **based))
    return merged_by_peft(again, folder / "out")


def distance(one, other):
    return max(float((one[key] - other[key]).abs().max()) for key in other)


@pytest.mark.parametrize("case", RIGHT | WRONG | NOT_THERE)
def test_a_sum_is_what_the_adapters_add_up_to(case, tmp_path):
    again = three(tmp_path, *(RIGHT | WRONG | NOT_THERE)[case])
    wanted = truth(tmp_path, again)
    assert distance(wanted, again().state_dict()) > 0.01
    assert distance(summed(tmp_path, again), wanted) < 2e-6
    if case in NOT_THERE:
        with pytest.raises(ValueError, match=r"adapter"):
            summed_by_peft(tmp_path, again)
    else:
        assert (distance(summed_by_peft(tmp_path, again), wanted) > 0.1) is (case in WRONG)


def test_a_sum_cut_by_peft_is_the_sum_where_nothing_is_lost(tmp_path):
    again = three(tmp_path, *RIGHT["plain"])
    assert distance(summed(tmp_path, again), summed_by_peft(tmp_path, again, "svd", svd_rank=12)) < 1e-5
