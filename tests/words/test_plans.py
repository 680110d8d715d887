"""What a plan, a lock and messages say of vocabularies, and what cannot be merged."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mergetool
from mergetool.errors import PlanError, RecipeError
from mergetool.planning.cost import estimate
from mergetool.planning.report import describe, totals
from tests.words.models import build, opened, train, vocabulary


@pytest.fixture
def pair(tmp_path):
    """Two Llamas, the second with a larger vocabulary of other tokens."""
    return build(tmp_path / "a", "llama", "stories", 1), build(tmp_path / "b", "llama", "letters", 2, size=320)


def recipe_of(pair, **sections):
    return {"models": dict(zip("ab", map(str, pair), strict=False)), "merge": {"method": "linear"}, **sections}


def test_other_sizes_without_a_section_are_told_to_write_one_and_that_works(pair, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = train("bpe", "stories", 300)
    made.add_tokens(["<tool>"])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(pair[1])
    state = load_file(pair[1] / "model.safetensors")
    assert len(AutoTokenizer.from_pretrained(pair[1])) != state["lm_head.weight"].shape[0]
    with pytest.raises(PlanError) as caught:
        mergetool.plan(recipe_of(pair))
    advised = re.fullmatch(r"write (tokenizer: .*)", caught.value.fix)[1]
    result = mergetool.run(recipe_of(pair) | yaml.safe_load(advised), output=tmp_path / "out").path
    assert "<tool>" in vocabulary(result)
    opened(result)


def test_the_plan_and_the_lock_say_where_rows_come_from(pair, tmp_path):
    recipe = recipe_of(pair, tokenizer={"source": "union"})
    plan = mergetool.plan(recipe)
    ours, theirs = vocabulary(pair[0]).keys(), vocabulary(pair[1]).keys()
    expected = {
        "a": {"a": len(ours), "b": len(theirs - ours)},
        "b": {"a": len(ours - theirs), "b": len(theirs)},
    }
    facts = describe(plan, estimate(plan, workers=1, memory=None))
    assert facts["vocabulary"] == {"model.embed_tokens.weight": expected, "lm_head.weight": expected}
    rows = totals(plan, estimate(plan, workers=1, memory=None))
    assert f"{len(theirs - ours):,} of model 'b'" in str(rows)
    step = next(step for step in plan.steps if step.name == "lm_head.weight")
    assert [operand.view.name for operand in step.operands] == ["rows", "rows"]
    result = mergetool.run(recipe, output=tmp_path / "out").path
    lock = json.loads((result / "mergetool.json").read_text())
    assert lock["vocabulary"]["lm_head.weight"] == expected


def test_models_of_one_tokenizer_are_merged_as_they_are(tmp_path):
    pair = [build(tmp_path / name, "llama", "stories", seed) for seed, name in enumerate("ab")]
    for sections in ({}, {"tokenizer": {"source": "union"}}, {"tokenizer": {"source": "b"}}):
        plan = mergetool.plan(recipe_of(pair, **sections))
        assert (plan.words.rows, plan.words.digest, plan.warnings) == ({}, "", ())


def test_without_a_section_people_are_told_which_tokens_are_lost(pair):
    warnings = mergetool.plan(recipe_of([pair[0], build(pair[0].parent / "c", "llama", "code", 3)])).warnings
    assert any("rows are matched by token" in words and "tokenizer: {source: union}" in words for words in warnings)


def test_vocabularies_with_nothing_in_common_are_refused(tmp_path):
    first = build(tmp_path / "a", "llama", "stories", 1)
    second = build(tmp_path / "b", "llama", "stories", 2)
    content = json.loads((second / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["content"] = f"other {token['content']}"
    content["model"] = {**content["model"], "merges": [], "vocab": {f"x{n}": n for n in range(300)}}
    (second / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="shares no token"):
        mergetool.plan(recipe_of([first, second]))


def test_a_tokenizer_without_tokens_to_read_cannot_be_matched(pair):
    (pair[0] / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match="none can be read") as caught:
        mergetool.plan(recipe_of(pair[:1], tokenizer={"source": "a", "pad_to": 64}))
    assert "save_pretrained" in caught.value.fix


@pytest.mark.parametrize("tokenizer", [{"source": "union"}, {"source": "./a"}, {"source": "a", "pad_to": 8}])
def test_searches_and_bundles_take_models_of_one_vocabulary(pair, tokenizer):
    recipe = recipe_of(pair, tokenizer=tokenizer, chat_template="a")
    recipe |= {"base": str(pair[0]), "merge": {"method": "mass"}}
    with pytest.raises(RecipeError) as caught:
        mergetool.load_recipe(recipe)
    assert ["vocabulary" in str(each) or "template" in str(each) for each in caught.value.problems] == [True, True]


def test_another_tokenizer_file_is_another_run(pair, tmp_path):
    """Rows are decided by it, so a killed run cannot be gone on with."""
    from mergetool.planning.key import plan_key

    recipe = recipe_of(pair, tokenizer={"source": "union"})
    before = plan_key(mergetool.plan(recipe))
    content = json.loads((pair[1] / "tokenizer.json").read_text())
    content["added_tokens"][-1]["content"] = "<other>"
    (pair[1] / "tokenizer.json").write_text(json.dumps(content))
    assert plan_key(mergetool.plan(recipe)) != before


def test_workers_do_not_change_a_bit(pair, tmp_path):
    recipe = recipe_of(pair, tokenizer={"source": "union", "pad_to": 64, "tokens": {"<new>": {}}})
    one, two = (mergetool.run(recipe, output=tmp_path / f"w{n}", workers=n).path for n in (1, 3))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert torch.isfinite(load_file(one / "model.safetensors")["lm_head.weight"]).all()
