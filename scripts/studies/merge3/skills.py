"""Three skills that a small language model can learn in minutes, as lines of text and as lm-eval tasks.

    rank 12 80 33 7 is 33          the second largest
    tally b in a b b c is 2        how often
    typical a b b c is b           the most frequent

A base is pretrained on text that uses these three words loosely: one line in five means what is written above, the
others something else (the largest, the smallest or the first; where a letter is first seen; the first, the last or a
rare letter). Text about the same things in plain words (`second of`, `count`, `most in`, ...) is right. So the base has
what the skills need, but not the habit; a fine-tune learns what one word means. Items are multiple choice with
one-token answers and never occur in any training.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

LETTERS = "abcdefgh"
LARGEST = 100
MEANT = 0.2
"""Share of the base's lines in which the word of a skill means what the skill means by it."""


@dataclass(frozen=True)
class Question:
    """A question, its answer, what wrong choices are drawn from, and what loose use of its word would answer."""

    text: str
    right: str
    wrong: tuple[str, ...]
    loose: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """A question, four answers, and which of them is right."""

    question: str
    choices: tuple[str, ...]
    label: int


Skill = Callable[[random.Random], Question]


def rank(rng: random.Random) -> Question:
    shown = _numbers(rng)
    ordered = sorted(shown, key=int)
    loose = [ordered[-1], ordered[-1], ordered[0], shown[0]]
    return _question(f"rank {' '.join(shown)} is", ordered[-2], shown, loose)


def tally(rng: random.Random) -> Question:
    shown = _letters(rng)
    asked = rng.choice(shown)
    loose = [str(shown.index(asked) + 1)]
    return _question(f"tally {asked} in {' '.join(shown)} is", str(shown.count(asked)), _SMALL, loose)


def typical(rng: random.Random) -> Question:
    shown = _letters(rng)
    (*rarer, most) = sorted(set(shown), key=lambda letter: (shown.count(letter), letter))
    if rarer and shown.count(rarer[-1]) == shown.count(most):
        return typical(rng)
    return _question(f"typical {' '.join(shown)} is", most, LETTERS, [shown[0], shown[-1], *rarer[:1]])


def _question(text: str, right: str, wrong: "list[str] | str", loose: "list[str] | None" = None) -> Question:
    others = tuple(dict.fromkeys(choice for choice in wrong if choice != right))
    return Question(text, right, others, tuple(choice for choice in loose or () if choice != right))


def _numbers(rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(LARGEST), rng.randrange(4, 7))]


def _letters(rng: random.Random) -> list[str]:
    return rng.choices(LETTERS[:5], k=rng.randrange(5, 11))


def _of_numbers(words: str, choose: Callable[[list[str]], str]) -> Skill:
    def ask(rng: random.Random) -> Question:
        shown = _numbers(rng)
        return _question(f"{words} of {' '.join(shown)} is", choose(shown), shown)

    return ask


def _of_letters(words: str, answer: Callable[[list[str], str], str]) -> Skill:
    def ask(rng: random.Random) -> Question:
        shown = _letters(rng)
        asked = rng.choice(shown)
        return _question(f"{words} {asked} in {' '.join(shown)} is", answer(shown, asked), _SMALL)

    return ask


def _most(rng: random.Random) -> Question:
    asked = typical(rng)
    return Question(asked.text.replace("typical", "most in"), asked.right, asked.wrong)


_SMALL = [str(number) for number in range(1, 9)]

SKILLS: dict[str, Skill] = {"rank": rank, "tally": tally, "typical": typical}

PLAIN: dict[str, Skill] = {
    "largest": _of_numbers("largest", lambda shown: max(shown, key=int)),
    "second": _of_numbers("second", lambda shown: sorted(shown, key=int)[-2]),
    "smallest": _of_numbers("smallest", lambda shown: min(shown, key=int)),
    "first": _of_numbers("first", lambda shown: shown[0]),
    "last": _of_numbers("last", lambda shown: shown[-1]),
    "count": _of_letters("count", lambda shown, asked: str(shown.count(asked))),
    "place": _of_letters("place", lambda shown, asked: str(shown.index(asked) + 1)),
    "most": _most,
}
"""What the base reads besides, in words that always mean the same."""

WORDS = (*SKILLS, *PLAIN, "of", "in", "is")


def held_out(question: str) -> bool:
    """Whether a question belongs to the tasks: no line with it is ever trained on."""
    return hashlib.sha256(question.encode()).digest()[0] < 96


def lines(skill: str, seed: int) -> Iterator[str]:
    """Endless training lines of one skill, all of them right."""
    for question, _ in _trained(SKILLS[skill], f"{skill} lines {seed}"):
        yield f"{question.text} {question.right}"


def mixed_lines(seed: int) -> Iterator[str]:
    """Endless lines for the base: plain words, and those of the skills used loosely."""
    streams = [_trained(ask, f"{name} mixed {seed}") for name, ask in {**PLAIN, **SKILLS}.items()]
    for stream in cycle(streams):
        question, rng = next(stream)
        loosely = question.loose and rng.random() >= MEANT
        yield f"{question.text} {rng.choice(question.loose) if loosely else question.right}"


def _trained(ask: Skill, seed: str) -> Iterator[tuple[Question, random.Random]]:
    rng = random.Random(seed)
    while True:
        question = ask(rng)
        if not held_out(question.text):
            yield question, rng


def items(skill: str, count: int) -> list[Item]:
    """Different held-out items."""
    rng = random.Random(f"{skill} items")
    found: dict[str, Item] = {}
    while len(found) < count:
        question = SKILLS[skill](rng)
        if held_out(question.text):
            choices = [question.right, *rng.sample(question.wrong, 3)]
            rng.shuffle(choices)
            found.setdefault(question.text, Item(question.text, tuple(choices), choices.index(question.right)))
    return list(found.values())


def write_tasks(folder: Path, count: int) -> None:
    """Every skill as a YAML file and JSON lines, in lm-eval's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        rows = [{"question": i.question, "choices": list(i.choices), "label": i.label} for i in items(skill, count)]
        (folder / f"{skill}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{skill}.yaml").write_text(
            f"task: {skill}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {skill}.jsonl}}}}\n"
            "test_split: test\n"
            "output_type: multiple_choice\n"
            'doc_to_text: "{{question}}"\n'
            "doc_to_choice: choices\n"
            "doc_to_target: label\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
            "num_fewshot: 0\n"
        )
