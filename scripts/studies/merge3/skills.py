"""Three skills that a small language model can learn in minutes, as lines of text and as lm-eval tasks.

    sums       23 plus 41 equals 64            arithmetic on number tokens
    counts     count b in a b b c is 2         counting
    second     second of 12 80 33 7 is 33      comparing: the second largest

Items are multiple choice with one-token answers; wrong answers are near misses. Items never occur in training.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LARGEST = 100


@dataclass(frozen=True)
class Item:
    """A question, four answers, and which of them is right."""

    question: str
    choices: tuple[str, ...]
    label: int

    @property
    def line(self) -> str:
        return f"{self.question} {self.choices[self.label]}"


def _item(rng: random.Random, question: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *rng.sample(sorted(set(wrong) - {right}), 3)]
    rng.shuffle(choices)
    return Item(question, tuple(choices), choices.index(right))


def sums(rng: random.Random) -> Item:
    a, b = rng.randrange(LARGEST // 2), rng.randrange(LARGEST // 2)
    near = [a + b + step for step in (-10, -2, -1, 1, 2, 10) if 0 <= a + b + step < LARGEST]
    return _item(rng, f"{a} plus {b} equals", str(a + b), [str(value) for value in near])


def counts(rng: random.Random) -> Item:
    shown = rng.choices(LETTERS[:3], k=rng.randrange(5, 12))
    wanted = rng.choice(LETTERS[:3])
    right = shown.count(wanted)
    near = [right + step for step in (-3, -2, -1, 1, 2, 3) if right + step >= 0]
    return _item(rng, f"count {wanted} in {' '.join(shown)} is", str(right), [str(value) for value in near])


def second(rng: random.Random) -> Item:
    shown = rng.sample(range(LARGEST), rng.randrange(4, 8))
    right = sorted(shown)[-2]
    return _item(rng, f"second of {' '.join(map(str, shown))} is", str(right), [str(value) for value in shown])


SKILLS: dict[str, Callable[[random.Random], Item]] = {"sums": sums, "counts": counts, "second": second}


def held_out(question: str) -> bool:
    """Whether a question belongs to the tasks: no line with it is ever trained on."""
    return hashlib.sha256(question.encode()).digest()[0] < 96


def lines(skill: str, seed: int) -> Iterator[str]:
    """Endless training lines."""
    rng = random.Random(f"{skill} lines {seed}")
    while True:
        item = SKILLS[skill](rng)
        if not held_out(item.question):
            yield item.line


def items(skill: str, count: int) -> list[Item]:
    """Different held-out items; of sums there are about 930."""
    rng = random.Random(f"{skill} items")
    found: dict[str, Item] = {}
    for _ in range(100 * count):
        item = SKILLS[skill](rng)
        if held_out(item.question):
            found.setdefault(item.question, item)
        if len(found) == count:
            break
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
