"""The study's text: what it asks is right, and never read in training."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import mergetool
from scripts.studies.merge3.genes import HIGHEST, Merges
from scripts.studies.merge3.models import Training, _config, _tokenizer
from scripts.studies.merge3.paths import planted
from scripts.studies.merge3.skills import MEANT, SKILLS, items, lines, mixed_lines

ORACLES = {
    "rank": lambda shown: sorted(shown, key=int)[-2],
    "tally": lambda shown: str(Counter(shown[2:])[shown[0]]),
    "typical": lambda shown: Counter(shown).most_common(1)[0][0],
}


def parts(line):
    """(word, what is shown, answer) of a line."""
    word, *shown, _, answer = line.split()
    return word, shown, answer


@pytest.mark.parametrize("skill", SKILLS)
def test_the_right_choice_is_right_and_the_only_one(skill):
    for item in items(skill, 200):
        word, shown, answer = parts(f"{item.question} {item.choices[item.label]}")
        assert word == skill
        assert answer == ORACLES[skill](shown)
        assert len(set(item.choices)) == 4


@pytest.mark.parametrize("skill", SKILLS)
def test_no_item_is_in_the_training_of_base_or_fine_tune(skill):
    asked = {item.question for item in items(skill, 2000)}
    trained = [*islice(mixed_lines(0), 20000), *islice(lines(skill, 1), 5000)]
    assert asked.isdisjoint(line.rsplit(" ", 1)[0] for line in trained)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_base_reads_the_skill_rarely_and_its_fine_tune_always(skill):
    def share(stream):
        read = [parts(line) for line in stream if line.startswith(f"{skill} ")]
        return sum(answer == ORACLES[skill](shown) for _, shown, answer in read) / len(read)

    assert share(islice(lines(skill, 1), 500)) == 1.0
    assert MEANT - 0.05 < share(islice(mixed_lines(0), 20000)) < MEANT + 0.25


def test_a_merge_of_many_genes_is_the_one_that_mergetool_makes_and_answers_as_alone(tmp_path):
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    for name in ("base", *SKILLS):
        model = LlamaForCausalLM(_config(Training(hidden=16), len(tokenizer)))
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    world = Merges(tmp_path, pool=8, seed=0)
    point = tuple(torch.rand(world.genes).tolist())
    *layers, rest = ({s: HIGHEST * x for s, x in zip(SKILLS, point[g::4], strict=True)} for g in range(4))
    overrides = [{"match": f"*.layers.{k}.*", "weight": weight} for k, weight in enumerate(layers)]
    held = {name: LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("base", *SKILLS)}
    base = held.pop("base")
    settings = {"method": "task-arithmetic", "weight": rest, "overrides": overrides}
    merged = mergetool.merge_state_dicts(settings, held, base=base)
    for name, tensor in world.put(point).items():
        torch.testing.assert_close(tensor, merged[name])
    every = world.answers(point, np.arange(60))
    alone = range(0, 60, 5)
    assert every[alone].tolist() == [world.answers(point, np.array([place])).item() for place in alone]
    assert 0 < every.sum() < 60
    assert world.report.reshape(3, 20).sum(1).tolist() == [12] * 3


def test_a_path_is_the_network_that_mergetool_makes_of_its_layers(tmp_path):
    world = planted(tmp_path, 0)
    method, space = world.space("depth")
    point = space.snap(np.random.default_rng(0).random(len(space.genes)))
    models = {name: str(tmp_path / name) for name in world.parents}
    asked = {"models": models, "merge": {"method": "passthrough"}}
    asked |= method.arranged(space.values(point), tuple(world.parents))
    whole = LlamaForCausalLM.from_pretrained(mergetool.run(asked, output=tmp_path / "out").path).eval()
    tokens = world.asked[0][0]
    with torch.no_grad():
        made, expected = (each(input_ids=tokens).logits for each in (world.network(method, space, point), whole))
    assert made.equal(expected)
