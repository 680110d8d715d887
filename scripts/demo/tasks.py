"""Five classification tasks on real data, all of them sequences of tokens that one encoder can read.

| task     | input                                      | classes                    | split by  |
|----------|--------------------------------------------|----------------------------|-----------|
| digits   | scikit-learn's 8x8 images, pairs of pixels | 10 digits                  | image     |
| language | Django's translated messages               | 16 languages in Latin type | message   |
| project  | four lines of Python                       | 8 projects                 | file      |
| operator | an `if` with its comparison hidden         | 8 operators                | file      |
| category | the Unicode name of a character            | 10 general categories      | character |

A hash of what the data is split by decides between train (70 %), validation (10 %) and test (20 %), so neither a
file nor a message is ever on two sides; a text that occurs on two sides all the same is dropped from the later one.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .sources import SourceFile, fetch, python_files, translations

MASK = "[MASK]"
SPLITS = ("train", "validation", "test")
LANGUAGES = ("af", "ca", "cs", "da", "de", "es", "et", "fi", "fr", "it", "nb", "nl", "pl", "pt", "sk", "sv")
OPERATORS = ("==", "!=", "is", "is not", "in", "not in", "<", ">")
CATEGORIES = ("Ll", "Lo", "Lu", "Mc", "Mn", "Nd", "No", "Po", "Sm", "So")
NUM_SNIPPETS = 40_000  # of Python code, drawn for the corpus before the test files are taken out
NUM_INTENSITIES = 5  # scikit-learn's 17 grey levels, binned, so that a pair of pixels is one of 25 tokens


@dataclass(frozen=True)
class Item:
    """A labelled text and the `group` (a file, a message ...) whose members stay on one side of the split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Task:
    """A classification task: `splits` maps train, validation and test to (text, index into labels) pairs."""

    name: str
    labels: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]


def split_of(group: str) -> str:
    """The side of the split on which all members of a group fall."""
    tenth = int.from_bytes(_digest(group)) % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"


def make_task(name: str, items: Iterable[Item], *, per_class: int) -> Task:
    """Split by group, drop repeated texts, and keep at most `per_class` training examples of each class."""
    sides: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        sides[split_of(item.group)].append(item)
    labels = tuple(sorted({item.label for side in sides.values() for item in side}))
    splits: dict[str, list[tuple[str, int]]] = {}
    seen: set[str] = set()
    for split, share in zip(SPLITS, (1.0, 0.15, 0.3), strict=True):
        room = dict.fromkeys(labels, round(per_class * share))
        splits[split] = []
        for item in by_digest(sides[split]):
            if room[item.label] and item.text not in seen:
                room[item.label] -= 1
                seen.add(item.text)
                splits[split].append((item.text, labels.index(item.label)))
    return Task(name, labels, splits)


def by_digest(items: Iterable[Item]) -> list[Item]:
    """Items in an order that looks random and is the same everywhere."""
    return sorted(items, key=lambda item: _digest(item.text + item.group))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


# ---------------------------------------------------------------- the tasks


def digits() -> Iterator[Item]:
    """8x8 images as 32 tokens, each the binned intensities of two neighbouring pixels."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    for index, (image, target) in enumerate(zip(images.astype(int), targets, strict=True)):
        levels = [int(value) * NUM_INTENSITIES // 17 for value in image]
        text = "".join(pixel_token(*pair) for pair in zip(levels[::2], levels[1::2], strict=True))
        yield Item(text, str(target), f"image {index}")


def pixel_token(left: int, right: int) -> str:
    """The vocabulary entry of two neighbouring pixels."""
    return f"[PIXELS {left}{right}]"


def language(django: Path) -> Iterator[Item]:
    """Messages of a web framework, as its translators wrote them."""
    for code, message, translated in translations(django, LANGUAGES):
        if len(translated) >= 12:
            yield Item(" ".join(translated.split()), code, message)


def project(files: Iterable[SourceFile]) -> Iterator[Item]:
    """Four lines of code out of every twelve, unless one of them imports something or names one of the projects."""
    files = list(files)
    telling = ["import ", *sorted({file.project for file in files})]
    for file in files:
        lines = [line for line in file.text.splitlines() if line.strip()]
        for start in range(0, len(lines) - 3, 12):
            snippet = _dedent(lines[start : start + 4])
            lowered = snippet.lower()
            if not any(word in lowered for word in telling):
                yield Item(snippet, file.project, _group(file))


def operator(files: Iterable[SourceFile]) -> Iterator[Item]:
    """A condition with its only comparison hidden, and the line that follows."""
    alternatives = "|".join(sorted((re.escape(op) for op in OPERATORS), key=len, reverse=True))
    condition = re.compile(rf"^\s*(?:el)?if ((?:(?! and | or ).)*?) ({alternatives}) ((?:(?! and | or ).)*):$")
    for file in files:
        lines = file.text.splitlines()
        for line, following in pairwise(lines):
            if line.endswith(":") and (found := condition.match(line)):
                yield Item(_dedent([f"if {found[1]} {MASK} {found[3]}:", following]), found[2], _group(file))


def category() -> Iterator[Item]:
    """Names of characters in Unicode 3.2, the one version that every Python carries; ideographs are left out."""
    database = unicodedata.ucd_3_2_0
    for code in range(0x10000):
        name = database.name(chr(code), "")
        if name and database.category(chr(code)) in CATEGORIES and not re.match("CJK|HANGUL SYLLABLE", name):
            yield Item(name.lower(), database.category(chr(code)), name)


def _dedent(lines: list[str]) -> str:
    """Lines joined, with the common indentation taken off and each deeper level kept as one tab."""
    depths = [len(line) - len(line.lstrip()) for line in lines]
    tabs = ((depth - min(depths)) // 4 for depth in depths)
    return "\n".join("\t" * tab + line.strip() for tab, line in zip(tabs, lines, strict=True))


def _group(file: SourceFile) -> str:
    return f"{file.project}/{file.path}"


# ---------------------------------------------------------------- on disk


NAMES = ("digits", "language", "project", "operator", "category")


def write(wheels: Path, folder: Path) -> None:
    """Write the tasks and the pretraining corpus to `folder`, from the wheels under `wheels` (fetched if need be)."""
    found = fetch(wheels)
    files = list(python_files(found))
    snippets = list(project(files))
    made = [
        make_task("digits", digits(), per_class=200),
        make_task("language", language(found["django"]), per_class=500),
        make_task("project", snippets, per_class=700),
        make_task("operator", operator(files), per_class=700),
        make_task("category", category(), per_class=400),
    ]
    for task in made:
        save(task, folder)
    corpus = [text for task in made for text, _ in task.splits["train"]]
    corpus += [item.text for item in by_digest(snippets)[:NUM_SNIPPETS] if split_of(item.group) == "train"]
    (folder / "corpus.json").write_text(json.dumps(sorted(set(corpus)), ensure_ascii=False), encoding="utf-8")


def save(task: Task, folder: Path) -> None:
    """Write `folder`/NAME.json."""
    content = {"labels": task.labels, "splits": task.splits}
    (folder / f"{task.name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load(path: Path) -> Task:
    """Read what `save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    splits = {name: [(text, label) for text, label in pairs] for name, pairs in content["splits"].items()}
    return Task(path.stem, tuple(content["labels"]), splits)
