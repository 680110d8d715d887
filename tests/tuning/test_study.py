"""The study's text: what it asks is right, and never read in training."""

from collections import Counter
from itertools import islice

import pytest

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
